"""A packed store says what its folders said, takes new runs beside the pack, tells damage, and loses no run however packing ends."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import disk
from tests.support.stored import fail, put, record, seeds, tried, undrawn

from forwardgrad.lab.commands import reading
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.execution import dispatch
from forwardgrad.lab.execution.place import Place
from forwardgrad.lab.recipes import noise, paper
from forwardgrad.lab.report import document, thinning
from forwardgrad.lab.report.figures import plots
from forwardgrad.lab.report.sections import comparison_figures
from forwardgrad.lab.statistics import stats, summary, walk
from forwardgrad.lab.store import catalogue, packing, results
from forwardgrad.lab.store.files import PACKED
from forwardgrad.lab.store.locks import alone
from forwardgrad.lab.store.packed import as_lines, packed_runs
from forwardgrad.lab.store.packing import pack
from forwardgrad.lab.store.progress import Progress
from forwardgrad.lab.store.standing import snapshot
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.run import Optimizer, Run
from forwardgrad.lab.studies.study import Study

STUDY = paper.demo(epochs=1, seeds=2)
ALONE = Run("digits", "logistic", {"name": "forward", "tangents": 3}, Optimizer("sgd", 0.5), epochs=2)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn, which takes the most time of a report."""
    for module in (plots, comparison_figures):
        monkeypatch.setattr(module, "render", undrawn)


def filled(root: Path, *studies: Study, steps: int = 5000) -> Store:
    """Studies with all their trials and final runs, one of which diverged, and a run of no study."""
    here = Store(root)
    for study in studies or (STUDY,):
        record(here, study)
        for arm in study.arms:
            for _, trial in tried(study, arm):
                put(here, trial, 0.5, steps=60)
            for seed, run in enumerate(seeds(arm, study.seeds)):
                put(here, run, 0.25, steps=steps if seed else steps // 2, diverged=None if seed else "the loss is nan")
    put(here, ALONE, 0.75, steps=60)
    return here


def said(here: Store) -> dict[str, Any]:
    """Everything that a report, a listing and a look say of a store."""
    document.write(here)
    made = {path.relative_to(here.root): path.read_bytes() for kind in ("figures", "tables") for path in (here.root / kind).iterdir()}
    pages = {name: (here.root / name).read_bytes() for name in ("report.md", "report.html")}
    looked = snapshot(here)
    counts = [(each.name, each.done, each.planned, each.diverged) for each in (*looked.studies, *looked.arms)]
    return {**made, **pages, "rows": catalogue.rows(here, where=True), "counts": sorted(counts), "unread": looked.unread}


@pytest.mark.full
@pytest.mark.parametrize("thin", [False, True])
def test_a_packed_store_says_what_its_folders_said(tmp_path: Path, thin: bool) -> None:
    here = filled(tmp_path / "out", STUDY, noise.noise(["paper-x10"], epochs=1))
    before, names = said(here), here.runs()
    assert pack(here, thinning.thinning_of(here) if thin else None) == len(names)
    assert not list((here.root / "runs").iterdir())
    assert said(here) == before
    assert here.runs() == names
    content = (here.root / PACKED).read_bytes()
    assert pack(here) == len(names)  # nothing is new
    assert (here.root / PACKED).read_bytes() == content
    shutil.rmtree(here.root / "runs")  # as version control leaves an empty folder
    assert said(Store(here.root, create=False)) == before


def test_a_thin_pack_keeps_what_is_read_and_no_more(tmp_path: Path) -> None:
    here = filled(tmp_path / "out")
    finals = {run.identity for arm in STUDY.arms for run in seeds(arm, 2)}
    whole = pack_size(here, tmp_path / "whole", None)
    assert pack_size(here, tmp_path / "thin", thinning.thinning_of(here)) < whole
    thin = Store(tmp_path / "thin")
    kept = packed_runs(thin.root)
    assert {run for run, files in kept.items() if "losses.json" in files} == finals
    assert not [run for run, files in kept.items() if "losses.csv.gz" in files]
    (done, *_) = results.studies(thin)[0].arms[0].done
    assert done.has_losses
    assert done.evaluations["step"]
    with pytest.raises(UserError, match=r"losses.csv.gz of run [0-9a-f]{12} was left out when .* was packed"):
        done.losses()
    shutil.copytree(here.folder(done.folder.name), thin.folder(done.folder.name))  # a remade run comes before the packed one
    assert len(done.losses()) == done.result["steps"]
    assert done.loss_summary() is None


def pack_size(here: Store, root: Path, thin: packing.Thin | None) -> int:
    shutil.copytree(here.root, root)
    pack(Store(root), thin)
    return (root / PACKED).stat().st_size


def test_new_runs_go_beside_a_pack_and_packed_ones_are_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, runs = (
        Store(tmp_path / "out"),
        [Run("digits", "logistic", {"name": "backprop"}, Optimizer("sgd", lr), 1) for lr in (0.1, 0.2, 0.3)],
    )
    quiet = Progress(quiet=True)
    first = dispatch.execute(runs[:2], here, Place(), quiet)
    assert pack(here) == 2
    packed = (here.root / PACKED).read_bytes()
    again = dispatch.execute(runs, here, Place(), quiet)
    assert {run: again[run] for run in first} == first
    assert [path.name for path in (here.root / "runs").iterdir() if path.is_dir()] == [runs[2].identity]
    assert (here.root / PACKED).read_bytes() == packed
    assert pack(here) == 3
    assert dispatch.execute(runs, here, Place(), quiet) == again


def test_what_has_not_finished_stays_a_folder(tmp_path: Path) -> None:
    here, begun = filled(tmp_path / "out"), Run("digits", "logistic", {"name": "backprop"}, Optimizer("adam", 0.5), 2)
    failed = Run("digits", "logistic", {"name": "backprop"}, Optimizer("adam", 0.25), 2)
    fail(here, failed, "no memory")
    here.folder(begun.identity).mkdir()
    shutil.copy(here.folder(failed.identity) / "run.json", here.folder(begun.identity))
    (here.folder(begun.identity) / "run.json").unlink()
    count = len(here.runs())
    assert pack(here) == count - 2
    assert {path.name for path in (here.root / "runs").iterdir()} == {failed.identity, begun.identity}
    assert (here.result(failed.identity) or {})["status"] == "failed"


@pytest.mark.usefixtures("quick")
def test_a_folder_that_is_held_or_has_other_files_is_left(tmp_path: Path) -> None:
    here = filled(tmp_path / "out")
    one, other = here.folder(ALONE.identity), here.folder(seeds(STUDY.arms[0], 1)[0].identity)
    (other / "notes.txt").write_text("mine")
    before = said(here)
    with alone(one):
        pack(here)
    assert {path.name for path in (here.root / "runs").iterdir()} == {one.name, other.name}
    assert [path.name for path in other.iterdir()] == ["notes.txt"]
    assert said(here) == before
    pack(here)
    assert {path.name for path in (here.root / "runs").iterdir()} == {other.name}


def test_what_a_run_leaves_that_was_killed_after_its_result_goes_with_its_folder(tmp_path: Path) -> None:
    here = Store(tmp_path / "out")
    put(here, ALONE, 0.5, steps=60)
    for name in ("checkpoint.pt", "status.json"):
        (here.folder(ALONE.identity) / name).write_text("of the last steps")
    assert pack(here) == 1
    assert not list((here.root / "runs").iterdir())


def test_damage_before_packing_changes_nothing(tmp_path: Path) -> None:
    here = filled(tmp_path / "out")
    path = here.folder(ALONE.identity) / "evaluations.csv"
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    before = {path: path.read_bytes() for path in here.root.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"evaluations\.csv is damaged"):
        pack(here)
    assert {path: path.read_bytes() for path in here.root.rglob("*") if path.is_file() and path.name != "records.lock"} == before


def complaint(here: Store, before: dict[str, Any]) -> str:
    """What is said of a store that is damaged; nothing where it says what it said before."""
    try:
        assert said(here) == before
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.usefixtures("quick")
def test_any_other_byte_in_a_pack_is_noticed(tmp_path: Path) -> None:
    here, luck = filled(tmp_path / "out"), random.Random(0)
    pack(here, thinning.thinning_of(here))
    before, path = said(here), here.root / PACKED
    content = path.read_bytes()
    for number in range(40):
        changed = bytearray(content)
        if number < 20:
            changed[luck.randrange(10, len(changed))] ^= 1 << luck.randrange(8)
        else:
            del changed[luck.randrange(len(changed)) :]
        path.write_bytes(changed)
        told = complaint(here, before)
        if told:  # else it was a byte that gunzip does not look at
            assert f"{path} is damaged" in told
            assert "put back a copy of it" in told
            assert len(told.splitlines()) == 1
            assert snapshot(here).unread or number < 20
    path.write_bytes(content)
    assert said(here) == before


def test_any_other_digit_of_a_packed_run_is_noticed(tmp_path: Path) -> None:
    """Changed by somebody who packs it again: every file is vouched for, as in a folder."""
    here, luck = filled(tmp_path / "out"), random.Random(1)
    pack(here, thinning.thinning_of(here))
    runs, changed = packed_runs(here.root), 0
    name = seeds(STUDY.arms[0], 1)[0].identity
    for file, content in runs[name].items():
        places = [place for place, byte in enumerate(content) if byte in b"0123456789"]
        for place in luck.sample(places, 10):
            other = content[:place] + bytes([(content[place] - 47) % 10 + 48]) + content[place + 1 :]
            (here.root / PACKED).write_bytes(as_lines({**runs, name: {**runs[name], file: other}}))
            with pytest.raises(UserError, match=f"runs.jsonl.gz is damaged .*{file} of run {name}"):
                read_all(here, name)
            changed += 1
    assert changed == 50
    (here.root / PACKED).write_bytes(as_lines({**runs, name: {**runs[name], "losses.json": runs[other_run(runs, name)]["losses.json"]}}))
    with pytest.raises(UserError, match="it is of another run"):
        read_all(here, name)


def other_run(runs: dict[str, Any], name: str) -> str:
    return next(run for run, files in runs.items() if run != name and "losses.json" in files)


def read_all(here: Store, name: str) -> None:
    found, folder = here.stored(name), here.folder(name)
    assert found is not None
    assert found.result is not None
    done = results.Done(folder, found.result, results.environment(folder, found), found.files)
    results.described(folder, found)
    assert done.evaluations
    assert done.loss_summary()


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([], "it is empty"),
        ([{"format": 2, "runs": 0}], "its format is 2"),
        ([{"format": 1, "runs": 1}], "it should hold 1 runs"),
        ([{"format": 1, "runs": 1}, {"run": "../../x", "files": {}}], "it should hold 1 runs"),
        ([{"format": 1, "runs": 1}, {"run": "0" * 12, "files": {"../x": ""}}], "a run in it has a file '../x'"),
        ([{"format": 1, "runs": 1}, {"run": "0" * 12, "files": {"losses.csv.gz": "?"}}], "base64"),
        ([{"format": 1, "runs": 1}, {"run": "0" * 12, "files": [1]}], "'list' object"),
        ([[]], "list indices"),
    ],
)
def test_a_pack_of_something_else_is_refused(tmp_path: Path, lines: list[Any], why: str) -> None:
    here = Store(tmp_path / "out")
    (here.root / PACKED).write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    with pytest.raises(UserError, match=f"is damaged .*{why}"):
        here.runs()


def test_a_power_cut_after_any_operation_of_packing_loses_no_run(tmp_path: Path) -> None:
    """From every state that the disk can be in every run is read as it was, and packing goes on."""
    runs = [Run("digits", "logistic", {"name": "backprop"}, Optimizer("sgd", lr), 1) for lr in (0.1, 0.2)]
    trees: dict[str, dict[Path, bytes | None]] = {}
    packing_now = False

    def happened(now: disk.Disk) -> None:
        if packing_now:
            trees.update((disk.key(tree), tree) for tree in now.cuts())

    root = tmp_path / "watched"
    root.mkdir()
    with disk.Operations(root, happened).watched():
        here = Store(root)
        for run in runs:
            put(here, run, 0.25, steps=20)
        packing_now = True
        pack(here)
    assert len(trees) > 10
    for number, tree in enumerate(trees.values()):
        disk.build(tree, left := tmp_path / str(number))
        after = Store(left)
        for again in range(2):
            assert {run.identity: (after.result(run.identity) or {}).get("validation_loss") for run in runs} == {
                run.identity: 0.25 for run in runs
            }
            assert again or pack(after) == 2
        assert not [path for path in (left / "runs").glob("*/*") if path.is_file()]


@pytest.mark.usefixtures("quick")
def test_a_full_disk_leaves_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = filled(tmp_path / "out")
    before = said(here)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            pack(here)
    assert not list(here.root.glob(f"*{PACKED}*"))
    assert said(here) == before


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = Store(tmp_path / "out")
    reading.pack(here.root)
    assert capsys.readouterr().out == "no run has finished: nothing to pack\n"
    filled(here.root)
    count = len(here.runs())
    reading.pack(here.root, thin=True)
    assert capsys.readouterr().out == f"{count} of {count} runs: {here.root / PACKED}\n"


@pytest.mark.parametrize("seed", range(5))
def test_a_summary_answers_as_the_whole_series_does(seed: int) -> None:
    luck = np.random.default_rng(seed)
    curves = [(2 - np.linspace(0, seed, n) + luck.normal(size=n) + np.linspace(0, 4, n) ** seed).tolist() for n in (2300, 977)]
    curves[1][700 + seed] = math.nan
    for few, pair in ((400, curves), (150, curves[1:])):
        width = stats.bin_width(max(map(len, pair)), few)
        short = [summary.from_json(json.loads(json.dumps(summary.summarized(curve, (width, 1 + width)).to_json()))) for curve in pair]
        one, other = stats.binned(pair, few), stats.binned(short, few)
        assert (one.at, one.low, one.high) == (other.at, other.low, other.high)
        assert one.mean == pytest.approx(other.mean, rel=1e-14)
        if len(pair) == 1:
            assert one.mean == other.mean
        for curve, kept in zip(pair, short, strict=True):
            for low, high in ((-math.inf, 4.0), (0.5, math.inf), (1.5, 2.5), (-math.inf, math.inf), (-9.0, 1e9)):
                assert walk.first_outside(kept, low, high) == walk.first_outside(curve, low, high)


def test_bins_of_another_width_are_made_of_the_narrowest_there_are() -> None:
    curve = [float(step) for step in range(1000)]
    kept = summary.summarized(curve, (2, 7))
    (whole, other) = (stats.binned([each], 100) for each in (curve, kept))
    assert whole == other  # ten steps are five bins of two
    with pytest.raises(ValueError, match="means of 20 losses, not of 4"):
        walk.first_outside(kept, 0.0, 1.0, window=4)
