"""Five hundred damaged inputs, the same ones every time: each is refused in one sentence or harmless; no number changes, no code runs."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.stored import put, record, seeds, tried, undrawn

from forwardgrad.lab import cli, store
from forwardgrad.lab.commands.options import estimator_of
from forwardgrad.lab.recipes import paper
from forwardgrad.lab.report.figures import plots
from forwardgrad.lab.report.sections import comparison_figures
from forwardgrad.lab.store.files import digest
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.run import Optimizer, Run, to_json

ROOT = Path(__file__).resolve().parents[3]
HUGE = "9" * 400
NASTY: list[Any] = [
    None, True, -1, 0, 1.5, 10**400, -(10**30), 1e308, -1e308, "", "x", "\x00", "\ud800", "../../../etc/passwd", "\x1b[2J",
    "<script>", [], {}, [[]], {"a": {}}, [None], ["x"], [1, "x"], {"values": 1},
]  # fmt: skip

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command line in this process; it fails the test where it raises, or ends in anything but 0, or 2 and one sentence."""
    for module in (plots, comparison_figures):
        monkeypatch.setattr(module, "render", undrawn)

    def run(*words: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["forwardgrad", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        status = int(ended.value.code or 0)
        told = [line for line in err.splitlines() if line.startswith("forwardgrad: ")]
        assert status in (0, 2), (words, status, err)
        assert len(told) == (1 if status else 0), (words, err)
        assert "Traceback" not in err
        if status and words[0] in ("list", "report"):
            assert len(err.splitlines()) == 1, err
        return status, out, err

    return run


@pytest.fixture
def kept(tmp_path: Path) -> Store:
    """A study of two arms with trials, a run of no study, one that was only begun, and measurements."""
    here, study = Store(tmp_path / "out"), paper.demo(epochs=1, seeds=2)
    record(here, study)
    for arm in study.arms:
        for _, trial in tried(study, arm):
            put(here, trial, 0.5, steps=60)
        for run in seeds(arm, 2):
            put(here, run, 0.25, steps=60)
    put(here, Run("digits", "logistic", {"name": "forward", "tangents": 3}, Optimizer("adam", 0.5), epochs=2), 0.75, steps=60)
    begun = Run("digits", "logistic", {"name": "backprop"}, Optimizer("adam", 0.5), epochs=2)
    here.folder(begun.identity).mkdir()
    store.write_json(here.folder(begun.identity) / "run.json", to_json(begun))
    for name in ("bench.json", "functions.json"):
        shutil.copy(ROOT / "results" / name, here.root / name)
    return here


def files(here: Store) -> list[Path]:
    return sorted(path for path in here.root.rglob("*") if path.is_file() and path.suffix in (".json", ".csv", ".gz"))


# Damage to one file, by name. Each is told the file, another one of the same name, and where its luck comes from. ----------------------


def flip(path: Path, other: Path, luck: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[luck.randrange(len(content))] ^= 1 << luck.randrange(8)
    path.write_bytes(content)


def digit(path: Path, other: Path, luck: random.Random) -> None:
    """Another digit in place of one: what no parser could notice."""
    content = bytearray(path.read_bytes())
    places = [place for place, byte in enumerate(content) if byte in b"0123456789"]
    place = luck.choice(places)
    content[place] = luck.choice([byte for byte in b"0123456789" if byte != content[place]])
    path.write_bytes(content)


def cut(path: Path, other: Path, luck: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: luck.randrange(len(content))])


def drop(path: Path, other: Path, luck: random.Random) -> None:
    content = path.read_bytes()
    at = luck.randrange(len(content))
    path.write_bytes(content[:at] + content[at + luck.randint(1, 40) :])


def double(path: Path, other: Path, luck: random.Random) -> None:
    content = path.read_bytes()
    at = luck.randrange(len(content))
    path.write_bytes(content[:at] + content[max(0, at - luck.randint(1, 40)) :])


def swap(path: Path, other: Path, luck: random.Random) -> None:
    path.write_bytes(other.read_bytes())


def folder(path: Path, other: Path, luck: random.Random) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path, other: Path, luck: random.Random) -> None:
    path.unlink()
    path.symlink_to(luck.choice([other, Path("/dev/zero"), path, path.parent, Path("/nowhere")]))


def pipe(path: Path, other: Path, luck: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def deep(path: Path, other: Path, luck: random.Random) -> None:
    path.write_text(luck.choice(["[" * 100_000, '{"a":' * 100_000, "[" * 500 + "]" * 500]))


def numbers(path: Path, other: Path, luck: random.Random) -> None:
    nasty = luck.choice(["NaN", "Infinity", "-Infinity", "1e999", HUGE, "9" * 5000, "nan", "inf"])
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    places = [place for place, letter in enumerate(text) if letter.isdigit()]
    place = luck.choice(places)
    changed = (text[:place] + nasty + text[place + 1 :]).encode()
    path.write_bytes(gzip.compress(changed) if path.suffix == ".gz" else changed)


def gone(path: Path, other: Path, luck: random.Random) -> None:
    path.unlink()


DAMAGE = (flip, digit, cut, drop, double, swap, folder, link, pipe, deep, numbers, gone)


def restore(path: Path, content: bytes) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    elif path.is_symlink() or path.exists():
        path.unlink()
    path.write_bytes(content)


def table(out: str) -> dict[str, list[str]]:
    head, *rows = (line.split("\t") for line in out.splitlines())
    return {row[0]: row for row in rows if len(row) == len(head)}


@pytest.mark.full
def test_200_damaged_stores_change_no_number(kept: Store, call: Call) -> None:
    """Refused, or the same numbers; what is gone is missing and said to be unfinished, never something else."""
    assert call("report", kept.root)[0] == 0
    wanted, rows = (kept.root / "report.md").read_text(), table(call("list", kept.root)[1])
    there, luck, refused, harmless = files(kept), random.Random(5), 0, 0
    for number in range(200):
        damage = DAMAGE[number % len(DAMAGE)]
        path = luck.choice(there)
        other = luck.choice([one for one in there if one.name == path.name and one != path] or there)
        content = path.read_bytes()
        damage(path, other, luck)
        (kept.root / "report.md").unlink(missing_ok=True)
        told = f"number {number}: {damage.__name__} of {path}"
        try:
            status = call("report", kept.root)[0]
            listed, out, _ = call("list", kept.root)
        except BaseException as error:
            raise AssertionError(told) from error
        finally:
            missing = not path.exists()
            restore(path, content)
        refused, harmless = refused + (status == 2), harmless + (status == 0)
        if not status and not missing:
            assert (kept.root / "report.md").read_text() == wanted, told
        for name, row in table(out).items() if not listed else ():
            assert row == rows[name] or (missing and (row[9] == "unfinished" or row[3:] == rows[name][3:])), told
    assert call("report", kept.root)[0] == 0
    assert (kept.root / "report.md").read_text() == wanted
    assert refused > 80
    assert harmless > 10


def paths_in(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something lies in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, part in inside for path in paths_in(part, (*at, key)))]


def set_in(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


@pytest.mark.full
def test_100_stores_of_wrong_types_with_right_digests_are_told(kept: Store, call: Call) -> None:
    """As another program might write them: whatever stands in any field, a command ends in a sentence or in a page."""
    there = [path for path in files(kept) if path.suffix == ".json"]
    luck, refused = random.Random(6), 0
    for number in range(100):
        path = luck.choice(there) if number % 2 else luck.choice([one for one in there if one.parent.parent.name != "runs"])
        content = path.read_bytes()
        value = json.loads(content)
        value.pop("sha256")
        place, new = luck.choice(paths_in(value)[1:]), luck.choice(NASTY)
        set_in(value, place, new)
        result = path.parent / "result.json"
        before = result.read_bytes() if result.exists() else None
        try:
            store.write_json(path, value)
        except ValueError:  # what no JSON file can hold
            path.write_text(json.dumps(value))
        if before is not None and path != result:
            vouched = store.read_json(result) or {}
            vouched["files"][path.name] = digest(path.read_bytes())
            store.write_json(result, vouched)
        try:
            refused += call("report", kept.root)[0] == 2
            refused += call("list", kept.root)[0] == 2
        except BaseException as error:
            raise AssertionError(f"number {number}: {place} of {path} is {new!r}") from error
        restore(path, content)
        if before is not None:
            restore(result, before)
    assert refused > 50


class Hostile:
    """Pickled, it makes a file when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.canary,))


TRAIN = ("train", "--data", "digits", "--model", "logistic", "--estimator", "backprop", "--lr", "0.1", "--epochs", "1", "--out")


def test_40_damaged_checkpoints_are_refused(tmp_path: Path, call: Call) -> None:
    canary, luck = tmp_path / "canary", random.Random(7)
    run = Run("digits", "logistic", estimator_of("backprop"), Optimizer("sgd", 0.1), epochs=1)
    here = Store(tmp_path / "out")
    checkpoint = here.folder(run.identity) / "checkpoint.pt"
    checkpoint.parent.mkdir()
    store.write_json(checkpoint.parent / "run.json", to_json(run))
    buffer = io.BytesIO()
    torch.save({"model": torch.ones(1000), "step": 3}, buffer)
    hostile = io.BytesIO()
    torch.save({"model": Hostile(canary)}, hostile)
    for number in range(40):
        store.write_checkpoint(checkpoint, hostile.getvalue() if number % 4 == 0 else buffer.getvalue())
        if number % 4 == 1:
            flip(checkpoint, checkpoint, luck)
        if number % 4 == 2:
            cut(checkpoint, checkpoint, luck)
        if number % 4 == 3:
            checkpoint.write_bytes(pickle.dumps(Hostile(canary)))
        status, _, err = call(*TRAIN, here.root)
        assert status == 2
        assert "checkpoint.pt is damaged" in err
        assert not canary.exists()
    pickle.loads(pickle.dumps(Hostile(canary)))
    assert canary.exists()  # the harm is real


def idx(kind: int, shape: tuple[int, ...], content: bytes) -> bytes:
    return bytes((0, 0, kind, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + content


def test_60_damaged_data_files_are_refused(tmp_path: Path, call: Call) -> None:
    canary, luck = tmp_path / "canary", random.Random(8)
    mnist, cifar = tmp_path / "MNIST" / "raw", tmp_path / "cifar-10-batches-py"
    mnist.mkdir(parents=True)
    cifar.mkdir()
    bomb = gzip.compress(bytes(100_000_000), 1)
    images, hostile = mnist / "train-images-idx3-ubyte", pickle.dumps({b"labels": Hostile(canary), b"data": b""})
    for number in range(60):
        shape = luck.choice([(60_000, 28, 28), (2**32 - 1,) * 3, (0, 0, 0), (60_000,), (1,) * 200])
        content = luck.choice([b"", idx(8, shape, luck.randbytes(100)), idx(13, shape, b""), luck.randbytes(50), hostile])
        for path in (images, images.with_name(f"{images.name}.gz")):
            path.unlink(missing_ok=True)
        packed = luck.choice([content, gzip.compress(content), gzip.compress(content)[:-4], bomb])
        images.with_name(f"{images.name}{'.gz' if number % 2 else ''}").write_bytes(packed if number % 2 else content)
        for batch in range(1, 6):
            (cifar / f"data_batch_{batch}").write_bytes(luck.choice([content, hostile, b"\x80\x04" + luck.randbytes(30)]))
        name = ("mnist", "cifar10")[number % 4 // 2]
        words = luck.choice([("train", "--data", name, "--out", tmp_path / "out"), ("data", "verify", name)])
        status, _, err = call(*words, "--data-dir", tmp_path)
        assert status == 2
        assert "damaged" in err
        assert not canary.exists()


WORDS = (
    "train", "tune", "report", "list", "reproduce", "data", "verify", "--help", "--version", "--", "-", "--data", "--model", "--estimator",
    "--lr", "--epochs", "--seed", "--seeds", "--out", "--sort", "--limit", "--status", "--csv", "--jobs", "--rows", "--study", "digits",
    "logistic", "mnist", "nothing", "0", "-1", "1", "nan", "inf", "-inf", "1e999", HUGE, "0x10", "1_0", "٣", "½", "", " ",
    "\n", "\udcff\udcfe",
    "a\udc80b", "\u202e", "../..", "/dev/null", "/dev/full", "table1", "demo", "forward(tangents=2)", "forward(", "=", "--lr=", "--=x",
)  # fmt: skip


def test_100_random_command_lines_end_in_a_sentence_or_an_answer(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORWARDGRAD_DATA", str(tmp_path / "nowhere"))
    luck, refused = random.Random(9), 0
    for _ in range(100):
        words = [luck.choice(WORDS[:9]) if place == 0 else luck.choice(WORDS) for place in range(luck.randint(1, 7))]
        if words[0] in ("train", "tune"):  # what is whole by luck shall be short
            words = [words[0], "--data", "digits", "--model", "logistic", "--epochs", "1", "--out", "out", *words[1:]]
        refused += call(*words)[0] == 2
    assert refused > 60


GRAMMAR = ("forward", "backprop", "(", ")", ",", ";", "=", "tangents", "clip", "law", "1", "-1", "1e999", HUGE, "nan", "none", "true",
           "gaussian", "[", "]", "'", '"', "__import__('os')", "{", "}", "\\", "\n", " ", "\ud800", "λ", "((((" * 500)  # fmt: skip


def test_60_random_estimator_texts_end_in_a_sentence_or_an_answer(tmp_path: Path, call: Call) -> None:
    luck, refused = random.Random(10), 0
    for number in range(60):
        text = "".join(luck.choice(GRAMMAR) for _ in range(luck.randint(1, 8)))
        if number % 3 == 0:
            text = f"forward({luck.choice(['tangents', 'clip', 'law', 'chunk_size', 'source'])}={luck.choice(GRAMMAR)})"
        words = (*TRAIN[:5], "--estimator", text, "--lr", "0.1", "--epochs", "1", "--out", tmp_path / "out")
        refused += call(*words)[0] == 2
    assert refused > 40


STUDY_FILE = """
from forwardgrad.lab import Length
from forwardgrad.lab import Optimizer, Run
from forwardgrad.lab import LogUniform
from forwardgrad.lab import Arm, Study

def mine(seeds: int = 1) -> Study:
    run = Run("digits", "logistic", {"name": "backprop"}, Optimizer("sgd", 0.5), epochs=1)
    arm = Arm("a", "g", "backprop", "b", run, {"lr": LogUniform(0.1, 1.0)})
    return Study("mine", "Mine", (arm,), seeds, Length(steps=2), None, 2, "halton")
"""


def test_60_damaged_study_files_end_in_a_sentence_or_an_answer(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters are dropped, doubled, swapped or replaced, words exchanged; whatever Python makes of that is told, not thrown."""
    luck, ends = random.Random(11), {0: 0, 2: 0}
    monkeypatch.setattr(sys, "path", list(sys.path))
    for number in range(60):
        text = list(STUDY_FILE)
        for _ in range(luck.choice((1, 1, 1, 2))):
            place = luck.randrange(len(text))
            change = luck.choice(("drop", "double", "other", "swap"))
            if change == "drop":
                del text[place]
            elif change == "double":
                text.insert(place, text[place])
            elif change == "other":
                text[place] = luck.choice("()[]{}:,.'\"=0189-aZ_ \n\té€")
            else:
                other = luck.randrange(len(text))
                text[place], text[other] = text[other], text[place]
        path = tmp_path / f"damaged_{number}.py"
        path.write_text("".join(text))
        status, _, err = call("study", path, "--out", tmp_path / f"out_{number}")
        ends[status] += 1
        assert "Traceback" not in err
        sys.modules.pop(path.stem, None)
    assert min(ends.values()) > 0
