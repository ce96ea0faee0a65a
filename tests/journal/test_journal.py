"""The file of a log: how long it is, what is read back, and what happens to a file that is not as it was written."""

from __future__ import annotations

import ast
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.cases import seeded
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.journal import digest_of, read_journal, records

FRAME = 1 + 4 + 2 + 4  # kind, length, check of these, CRC-32
STEPS = 12


def train(path: Path, steps: int = STEPS, tangents: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> list[Tensor]:
    """The losses of a training whose log is not closed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)
    optimizer, method = torch.optim.SGD(model.parameters(), lr=0.1), fg.ForwardGradient(tangents, perturb=fg.LowRank())
    x, log = torch.ones(3, 4, dtype=dtype), fg.StepLog(path, **options)
    step = fg.TrainingStep(lambda m: m(x).square().mean(), model, optimizer, method, generator=seeded(), log=log)
    return [step().loss for _ in range(steps)]


def taken(path: Path) -> int:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    return fg.replay(path, model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tangents", [1, 4])
def test_the_length_of_a_log(tangents: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """11 bytes and K + 1 numbers a step, and 27 bytes a digest."""
    sizes = []
    for steps in (10, 30):
        train(path := tmp_path / f"{steps}.log", steps, tangents, dtype, digest_every=5)
        sizes.append(path.stat().st_size)
    known = read_journal(tmp_path / "10.log").steps[0]
    assert known.weights.shape == (tangents,)
    one = FRAME + known.loss.element_size() + tangents * known.weights.element_size()
    assert sizes[1] - sizes[0] == 20 * one + 4 * (FRAME + 16)
    if dtype == torch.float32 and tangents == 1:
        assert one == 19


def test_losses_are_there_to_the_bit(tmp_path: Path) -> None:
    losses = train(tmp_path / "steps.log")
    assert [one.loss.item() for one in read_journal(tmp_path / "steps.log").steps] == [loss.item() for loss in losses]


def test_a_log_cut_anywhere_has_the_steps_that_are_whole(tmp_path: Path) -> None:
    train(path := tmp_path / "steps.log", digest_every=3)
    data = path.read_bytes()
    ends = [one.end for one in read_journal(path).steps]
    torn = tmp_path / "torn.log"
    for length in range(read_journal(path).end, len(data) + 1):
        torn.write_bytes(data[:length])
        expected = sum(record.kind == records.STEP and record.end <= length for record in records.read_records(path))
        assert len(read_journal(torn).steps) == expected
    torn.write_bytes(data[: ends[7] + 10])
    assert taken(torn) == 8
    for length in range(len(records.MAGIC)):
        torn.write_bytes(data[:length])
        with pytest.raises(fg.JournalError, match="it has no beginning"):
            read_journal(torn)


def test_a_flipped_bit_is_refused_with_its_place(tmp_path: Path) -> None:
    """Every bit of the file but those of its name; the record that it lies in is named by where it begins."""
    train(path := tmp_path / "steps.log", steps=3, digest_every=2)
    data, found = path.read_bytes(), list(records.read_records(path))
    bad = tmp_path / "bad.log"
    for record in found:
        for at in sorted({*range(record.start, min(record.start + 12, record.end)), record.end - 5, record.end - 1}):
            for bit in range(8):
                changed = bytearray(data)
                changed[at] ^= 1 << bit
                bad.write_bytes(changed)
                with pytest.raises(fg.JournalError, match=f"damaged in the record at byte {record.start}: "):
                    read_journal(bad)


def test_what_is_no_log(tmp_path: Path) -> None:
    path = tmp_path / "steps.log"
    path.write_text("step,loss\n1,0.5\n")
    with pytest.raises(fg.JournalError, match="is no log of steps: it does not begin"):
        read_journal(path)
    path.write_bytes(records.MAGIC + records.packed(records.HEADER, b'{"format": 2}'))
    with pytest.raises(fg.JournalError, match="was written in format 2, and this version reads format 1"):
        read_journal(path)
    path.write_bytes(records.MAGIC + records.packed(records.STEP, b"12345678"))
    with pytest.raises(fg.JournalError, match="it has no beginning"):
        read_journal(path)
    path.write_bytes(records.MAGIC + records.packed(records.HEADER, json.dumps({"format": 1}).encode()))
    with pytest.raises(fg.JournalError, match="holds what no log of steps has"):
        read_journal(path)
    whole = {"format": 1, "digest": "00", "generator": "", "settings": []}
    head = records.packed(records.HEADER, json.dumps(whole).encode())
    path.write_bytes(records.MAGIC + head)
    assert not read_journal(path).steps
    for kind, content in ((records.STEP, b"12345678"), (records.PLACES, b"{"), (records.SETTINGS, b"7"), (records.STEP, b"")):
        path.write_bytes(records.MAGIC + head + records.packed(kind, content))
        with pytest.raises(fg.JournalError, match="holds what no log of steps has"):
            read_journal(path)
    path.write_bytes(records.MAGIC + head + head)
    with pytest.raises(fg.JournalError, match="begins a second time"):
        read_journal(path)


def test_the_frame_is_what_the_docstring_says(tmp_path: Path) -> None:
    train(path := tmp_path / "steps.log", steps=1)
    data = path.read_bytes()
    assert data[:8] == b"fgsteps\n"
    kind, length = struct.unpack_from("<cI", data, 8)
    header = json.loads(data[8 + 7 : 8 + 7 + length])
    assert kind == b"H"
    assert header["estimator"]["name"] == "forward"
    assert header["settings"][0]["lr"] == 0.1


def test_nothing_of_a_file_is_run() -> None:
    """The room imports nothing that makes objects of what it reads but JSON and struct, and evaluates nothing."""
    for path in (Path(records.__file__).parent).glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not imported & {"pickle", "marshal", "shelve", "importlib"}
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not called & {"eval", "exec", "torch.load", "import_module", "__import__"}


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    train(path := tmp_path / "steps.log")
    data = path.read_bytes()
    with pytest.raises(ValueError, match=r"is there already: give StepLog another path, or since=N"):
        train(path)
    with pytest.raises(ValueError, match="ends after step 12, and is to go on after step 20"):
        train(path, since=20)
    with pytest.raises(ValueError, match=r"is the log of another training: its estimator is"):
        train(path, since=3, tangents=2)
    with pytest.raises(ValueError, match=r"are not those that .* has after step 0"):
        train(path, since=0, dtype=torch.float64)
    assert path.read_bytes() == data
    with pytest.raises(ValueError, match=r"there is no log .* to go on with"):
        train(tmp_path / "none.log", since=2)
    for options in ({"since": -1}, {"since": True}, {"digest_every": 1.5}):
        with pytest.raises(ValueError, match="must be a whole number of at least 0"):
            fg.StepLog(path, **options)  # type: ignore[arg-type]


def test_a_log_belongs_to_one_step(tmp_path: Path) -> None:
    log, model = fg.StepLog(tmp_path / "steps.log"), nn.Linear(2, 1)
    what = lambda m: m(torch.ones(1, 2)).sum(), model, torch.optim.SGD(model.parameters(), lr=0.1), fg.ForwardGradient()
    fg.TrainingStep(*what, generator=seeded(), log=log)
    with pytest.raises(ValueError, match="belongs to a training step already"):
        fg.TrainingStep(*what, generator=seeded(), log=log)


def test_a_digest_knows_every_bit_name_and_shape() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    seen = {digest_of(model)}
    with torch.no_grad():
        for p in model.parameters():
            for index in range(p.numel()):
                p.view(-1).view(torch.int32)[index] ^= 1
                seen.add(digest_of(model))
                p.view(-1).view(torch.int32)[index] ^= 1
    assert len(seen) == 1 + sum(p.numel() for p in model.parameters())
    same = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    same.load_state_dict(model.state_dict())
    assert digest_of(same) == digest_of(model)
    named = nn.Sequential()
    for name, module in zip("ab", model, strict=True):
        named.add_module(name, module)
    assert digest_of(named) != digest_of(model)
    with torch.no_grad():
        same[0].weight = nn.Parameter(model[0].weight.reshape(3, 2))
    assert digest_of(same) != digest_of(model)


class _Filling:
    """A file on a disk that is full after some bytes of the next write."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Any:
        return self._file.__enter__()

    def __exit__(self, *what: Any) -> None:
        self._file.__exit__(*what)

    def write(self, content: bytes) -> int:
        return int(self._file.write(content[: len(content) // 2]))


def test_a_full_disk_leaves_the_steps_before_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer, method, x = torch.optim.SGD(model.parameters(), lr=0.1), fg.ForwardGradient(perturb=fg.LowRank()), torch.ones(3, 4)
    path = tmp_path / "steps.log"
    log = fg.StepLog(path)
    step = fg.TrainingStep(lambda m: m(x).square().mean(), model, optimizer, method, generator=seeded(), log=log)
    for _ in range(STEPS):
        step()
    log._file = _Filling(log._file)  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"):
        step()
    log.close()
    assert len(read_journal(path).steps) == taken(path) == STEPS
