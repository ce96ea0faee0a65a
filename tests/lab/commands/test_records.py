"""Records from end to end: runs are trained, claimed and verified; claims that are false, forged or no claims at all are found."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.command import run

from forwardgrad.lab.execution.dispatch import execute
from forwardgrad.lab.execution.place import Place
from forwardgrad.lab.records.claim import ClaimedRun, RecordClaim, read_claim, write_claim
from forwardgrad.lab.records.claiming import claimed_runs
from forwardgrad.lab.records.tasks import TASKS
from forwardgrad.lab.records.verifying import fresh_runs
from forwardgrad.lab.store.files import write_json
from forwardgrad.lab.store.progress import Progress
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.import_path import signed
from forwardgrad.lab.studies.run import Optimizer, Run

LOCAL = Run("digits", "mlp", {"name": "local", "feedback": True}, Optimizer("adam", 0.01, anneal=True), 8, 32)
FRESH = ("--first-seed", 100)  # else they follow from the claim, whose seconds are others every time
METHODS = """
from dataclasses import dataclass
import forwardgrad as fg

@dataclass(frozen=True)
class Honest(fg.LocalLosses):
    name = "honest"

@dataclass(frozen=True)
class Sly(fg.Backprop):
    name = "sly"
    reverse = False

@dataclass(frozen=True)
class Broken(fg.LocalLosses):
    name = "broken"

    def estimate(self, objective, generator, state):
        raise ArithmeticError("no such luck")
"""

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """The command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: run(monkeypatch, capsys, *words)


@pytest.fixture
def methods(tmp_path: Path) -> Iterator[str]:
    """A module of the current folder with two estimators."""
    before = list(sys.path)
    (tmp_path / "recordmethods.py").write_text(METHODS)
    yield "recordmethods"
    sys.path[:] = before
    sys.modules.pop("recordmethods", None)


def trained(root: Path, run: Run, seeds: tuple[int, ...] = (0, 1, 2)) -> list[Path]:
    store, runs = Store(root), [dataclasses.replace(run, seed=seed) for seed in seeds]
    execute(runs, store, Place(threads=1), Progress(quiet=True))
    return [store.folder(each.identity) for each in runs]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return trained(tmp_path_factory.mktemp("claimed"), LOCAL)


@pytest.fixture
def claim(folders: list[Path]) -> RecordClaim:
    return claimed_runs(folders, TASKS["digits-mlp-accuracy"], "somebody")


def changed(claim: RecordClaim, change: Callable[[ClaimedRun], ClaimedRun]) -> RecordClaim:
    return dataclasses.replace(claim, runs=tuple(map(change, claim.runs)))


def forged(path: Path, claim: RecordClaim, **fields: Any) -> Path:
    """The file of a claim with other fields, and a digest that agrees."""
    write_claim(path, claim)
    write_json(path, {**json.loads(path.read_text()), **fields})
    return path


def last(err: str) -> str:
    """The one sentence of a command's end."""
    (told,) = [line for line in err.splitlines() if line.startswith("forwardgrad: ")]
    return told


def test_a_true_claim_holds_and_its_verification_goes_on_where_it_was(folders: list[Path], command: Command, tmp_path: Path) -> None:
    status, out, err = command("record", "claim", *folders, "--task", "digits-mlp-accuracy", "--who", "me", "--out", "claims/mine.json")
    assert (status, out) == (0, "claims/mine.json\n"), err
    stored = json.loads((tmp_path / "claims" / "mine.json").read_text())
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    assert stored["figures"]["accuracy"]["mean"] == pytest.approx(sum(each["test"]["accuracy"] for each in results) / 3)
    assert stored["figures"]["passes"]["mean"] == results[0]["forward_passes"]
    assert (stored["who"], stored["figures"]["n"], [each["seed"] for each in stored["runs"]]) == ("me", 3, [0, 1, 2])
    status, out, err = command("record", "verify", "claims/mine.json", *FRESH)
    told = out.splitlines()
    assert (status, told[0]) == (0, "rule: forward-only; nothing is saved for a backward pass"), err
    assert told[-1].startswith("holds: claimed ")
    fresh = Store(tmp_path / "verification").runs()
    assert len(fresh) == 3
    assert not set(fresh) & {folder.name for folder in folders}
    seeds = {json.loads((tmp_path / "verification" / "runs" / name / "run.json").read_text())["seed"] for name in fresh}
    assert seeds == {100, 101, 102}
    shutil.rmtree(tmp_path / "verification" / "runs" / fresh[0])  # as after a kill before the last of them
    again, repeated, err = command("record", "verify", "claims/mine.json", *FRESH)
    assert (again, "2 finished before" in err) == (0, True)
    assert repeated.splitlines()[-1] == told[-1]  # the same seeds, and so the same figures


def test_fresh_seeds_are_none_of_the_claims(claim: RecordClaim) -> None:
    assert [each.seed for each in fresh_runs(claim, 4, first=1)] == [3, 4, 5, 6]
    usual = fresh_runs(claim)
    assert usual == fresh_runs(claim)
    assert len({each.seed for each in usual} | {0, 1, 2}) == 6
    assert usual != fresh_runs(dataclasses.replace(claim, who="somebody else"))  # nobody knows them before the claim is made
    assert all(dataclasses.replace(each, seed=claim.run.seed) == claim.run for each in usual)


@pytest.mark.full
def test_a_claim_that_is_too_good_does_not_hold(claim: RecordClaim, command: Command, tmp_path: Path) -> None:
    write_claim(tmp_path / "high.json", changed(claim, lambda run: dataclasses.replace(run, accuracy=min(1.0, run.accuracy + 0.2))))
    status, out, _ = command("record", "verify", "high.json", *FRESH)
    assert (status, out.splitlines()[-1].startswith("does not hold: claimed ")) == (1, True)
    write_claim(tmp_path / "few.json", changed(claim, lambda run: dataclasses.replace(run, passes=(run.passes or 0) / 2)))
    status, out, _ = command("record", "verify", "few.json", *FRESH)
    assert (status, "forward passes, and" in out.splitlines()[-1]) == (1, True)


@pytest.mark.full
def test_passes_to_an_accuracy(folders: list[Path], command: Command, tmp_path: Path) -> None:
    claim = claimed_runs(folders, TASKS["digits-mlp-passes"], "somebody")
    for each in claim.runs:
        assert each.target is not None
        rows = [line.split(",") for line in (tmp_path_of(folders, each.run) / "evaluations.csv").read_text().splitlines()[1:]]
        step = next(int(row[0]) for row in rows if float(row[4]) >= 0.9)
        assert each.target["step"] == step
        assert each.target["passes"] == pytest.approx((each.passes or 0) * step / int(rows[-1][0]))
    write_claim(tmp_path / "true.json", claim)
    status, out, _ = command("record", "verify", "true.json", *FRESH)
    assert status in (0, 4)
    assert out.splitlines()[-1].split(":")[0] in ("holds", "not decided")

    def sooner(run: ClaimedRun) -> ClaimedRun:
        return dataclasses.replace(run, target={**(run.target or {}), "passes": 1.0})

    write_claim(tmp_path / "soon.json", changed(claim, sooner))
    status, out, _ = command("record", "verify", "soon.json", *FRESH)
    assert (status, out.splitlines()[-1].split(":")[0]) == (1, "does not hold")


def tmp_path_of(folders: list[Path], name: str) -> Path:
    (found,) = [folder for folder in folders if folder.name == name]
    return found


@pytest.mark.full
def test_seconds_of_another_machine_decide_nothing(folders: list[Path], command: Command, tmp_path: Path) -> None:
    claim = claimed_runs(folders, TASKS["digits-mlp-seconds"], "somebody")
    write_claim(tmp_path / "elsewhere.json", dataclasses.replace(claim, environment={**claim.environment, "device": "another machine"}))
    status, out, _ = command("record", "verify", "elsewhere.json", *FRESH)
    told = out.splitlines()
    assert (status, told[-1].split(":")[0]) == (4, "not decided")
    assert any(line.startswith("seconds: not compared, the claim's device is another machine, here ") for line in told)


@pytest.mark.full
def test_code_of_the_author_is_imported_only_where_that_is_allowed(methods: str, command: Command, tmp_path: Path) -> None:
    words = ("train", "--data", "digits", "--model", "mlp", "--optimizer", "adam", "--lr", 0.01, "--epochs", 6, "--batch-size", 32)
    for seed in (0, 1, 2):
        assert command(*words, "--seed", seed, "--estimator", f"{methods}:Honest(feedback=true)")[0] == 0
    runs = sorted((tmp_path / "runs" / "runs").iterdir())
    asked = ("record", "claim", *runs, "--task", "digits-mlp-accuracy", "--out", "own.json")
    status, _, err = command(*asked)
    assert (status, "add --allow-code" in last(err)) == (2, True)
    assert not (tmp_path / "own.json").exists()
    assert command(*asked, "--allow-code")[0] == 0
    sys.modules.pop(methods)
    status, _, err = command("record", "verify", "own.json")
    assert (status, methods in sys.modules, "add --allow-code" in last(err)) == (2, False, True)
    status, out, err = command("record", "verify", "own.json", "--allow-code", *FRESH)
    assert (status in (0, 4), "nothing is saved for a backward pass" in out) == (True, True), err
    (tmp_path / f"{methods}.py").write_text(METHODS.replace('name = "honest"', 'name = "honest"\n    other = 1'))
    sys.modules.pop(methods)
    status, _, err = command("record", "verify", "own.json", "--allow-code")
    assert (status, f"the code of {methods}:Honest is not that of the claim" in last(err)) == (2, True)


def test_a_backward_pass_is_found_in_what_an_estimator_says_and_in_what_it_does(
    folders: list[Path], methods: str, command: Command, tmp_path: Path
) -> None:
    backprop = trained(tmp_path / "exact", dataclasses.replace(LOCAL, estimator={"name": "backprop"}))
    status, _, err = command("record", "claim", *backprop, "--task", "digits-mlp-accuracy", "--out", "no.json")
    assert (status, "'backprop' makes a backward pass" in last(err)) == (2, True)
    claim = claimed_runs(backprop, TASKS["digits-mlp-accuracy"], "somebody")
    write_claim(tmp_path / "said.json", claim)
    status, _, err = command("record", "verify", "said.json")
    assert (status, "records are forward-only" in last(err)) == (2, True)
    for seed in (0, 1, 2):
        words = ("--optimizer", "adam", "--lr", 0.01, "--epochs", 1, "--seed", seed, "--estimator", f"{methods}:Sly")
        assert command("train", "--data", "digits", "--model", "mlp", *words)[0] == 0
    runs = sorted((tmp_path / "runs" / "runs").iterdir())
    assert command("record", "claim", *runs, "--task", "digits-mlp-accuracy", "--out", "sly.json", "--allow-code")[0] == 0
    status, _, err = command("record", "verify", "sly.json", "--allow-code")
    assert (status, "bytes for a backward pass: records are forward-only" in last(err)) == (2, True)
    broken = signed(dataclasses.replace(claim.run, estimator={"name": f"{methods}:Broken"}))
    names = [dataclasses.replace(broken, seed=each.seed).identity for each in claim.runs]
    others = tuple(dataclasses.replace(each, run=name) for each, name in zip(claim.runs, names, strict=True))
    write_claim(tmp_path / "broken.json", dataclasses.replace(claim, run=broken, runs=others))
    status, _, err = command("record", "verify", "broken.json", "--allow-code")
    assert (status, "the first 3 steps stop with ArithmeticError: no such luck" in last(err)) == (2, True)
    assert not (tmp_path / "verification").exists()


def test_runs_that_make_no_claim(folders: list[Path], command: Command, tmp_path: Path) -> None:
    other = trained(tmp_path / "other", dataclasses.replace(LOCAL, epochs=5), (3,))
    asked: list[tuple[list[Path], str, str]] = [
        (folders[:2], "digits-mlp-accuracy", "a record needs 3 seeds or more, not 2"),
        ([*folders, folders[0]], "digits-mlp-accuracy", "a run is named twice"),
        ([*folders, *other], "digits-mlp-accuracy", "the runs differ in more than their seeds"),
        (folders, "mnist-nn-accuracy", "the run does not match the task mnist-nn-accuracy: it has data 'digits' in place of 'mnist'"),
        (folders, "fastest", "unknown task 'fastest': choose one of digits-mlp-accuracy"),
        ([tmp_path], "digits-mlp-accuracy", "is no folder of a run"),
        ([folders[0].parent / "000000000000"], "digits-mlp-accuracy", "has not finished"),
    ]
    for runs, task, why in asked:
        status, _, err = command("record", "claim", *runs, "--task", task, "--out", "none.json")
        assert (status, why in last(err)) == (2, True), err
    assert not (tmp_path / "none.json").exists()


def test_files_that_are_no_claim(claim: RecordClaim, command: Command, tmp_path: Path) -> None:
    write_claim(tmp_path / "fine.json", claim)
    described = json.loads((tmp_path / "fine.json").read_text())
    (tmp_path / "cut.json").write_text((tmp_path / "fine.json").read_text()[:-40])
    (tmp_path / "edited.json").write_text((tmp_path / "fine.json").read_text().replace('"somebody"', '"nobody"'))
    forged(tmp_path / "task.json", claim, task="fastest")
    forged(tmp_path / "schema.json", claim, schema=99)
    forged(tmp_path / "run.json", claim, run={**described["run"], "model": "logistic"})
    forged(tmp_path / "length.json", claim, run={**described["run"], "epochs": 50})
    forged(tmp_path / "figures.json", claim, figures={**described["figures"], "accuracy": {"mean": 1.0, "low": 1.0, "high": 1.0}})
    forged(tmp_path / "seeds.json", claim, runs=described["runs"][:2])
    forged(tmp_path / "impossible.json", claim, runs=[{**each, "accuracy": 7.0} for each in described["runs"]])
    write_json(tmp_path / "other.json", {"schema": 1})
    wrong = {
        "missing": "there is no file missing.json",
        "cut": "cut.json is damaged",
        "edited": "its content and its digest do not agree",
        "other": "other.json is no claim that this version reads",
        "schema": "schema 99",
        "task": "unknown task 'fastest'",
        "run": "the run does not match the task digits-mlp-accuracy",
        "length": "is not the one that it describes",
        "figures": "its figures do not follow from its runs",
        "seeds": "it has 2 runs, and a record needs 3",
        "impossible": "the figures of seed 0 are impossible",
    }
    for name, why in wrong.items():
        status, out, err = command("record", "verify", f"{name}.json")
        assert (status, out, why in last(err)) == (2, "", True), err
    assert not (tmp_path / "verification").exists()
    assert read_claim(tmp_path / "fine.json") == claim


def test_a_claim_stands_in_the_table(claim: RecordClaim, command: Command, tmp_path: Path) -> None:
    (tmp_path / "results" / "records").mkdir(parents=True)
    write_claim(tmp_path / "results" / "records" / "mine.json", claim)
    status, out, err = command("record", "list")
    assert status == 0, err
    row = next(line for line in out.splitlines() if line.startswith("| `digits-mlp-accuracy`"))
    assert f"{100 * claim.value():.2f} %" in row
    assert "1. mine.json by somebody: `local(feedback=true)`, adam with lr 0.01, anneal true, 8 epochs, batches of 32." in out
    write_claim(tmp_path / "results" / "records" / "mine.json", dataclasses.replace(claim, who="a\n| b\x1b[2J`", commands=("c\nd`e",)))
    (line,) = [line for line in command("record", "list")[1].splitlines() if line.startswith("1. ")]
    assert "by a \\| b \\[2J\\`: " in line
    assert line.endswith("`c d'e`")
    assert command("record", "list", "nowhere")[0] == 2
