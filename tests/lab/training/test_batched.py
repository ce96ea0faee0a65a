"""Runs trained as one program: each against its own single run, killed and resumed, diverging, planned, and asked for by the command."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from forwardgrad.lab import cli, store
from forwardgrad.lab.data import datasets
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.execution.dispatch import execute
from forwardgrad.lab.execution.place import Place
from forwardgrad.lab.store.progress import Progress
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.run import Optimizer, Run
from forwardgrad.lab.training import batched, evaluation, loop, schedule

FORWARD = {"name": "forward", "clip": 1.0}
RUN = Run("digits", "mlp", FORWARD, Optimizer("sgd", 0.01, decay=1e-3, momentum=0.5), epochs=3)
QUIET = Progress(quiet=True)
FILES = ["environment.json", "evaluations.csv", "losses.csv.gz", "result.json", "run.json", "walk.csv"]
HELD = {"weight_decay": 0.1, "anneal": True, "cap": 0.02}


def grid(run: Run, rates: tuple[float, ...] = (0.01, 0.003), seeds: tuple[int, ...] = (0, 1)) -> list[Run]:
    return [dataclasses.replace(run, seed=seed, optimizer=dataclasses.replace(run.optimizer, lr=lr)) for seed in seeds for lr in rates]


def tables(folder: Path) -> dict[str, dict[str, list[float]]]:
    found = {name: store.read_table(folder / name) for name in ("evaluations.csv", "walk.csv", "losses.csv.gz")}
    del found["evaluations.csv"]["seconds"]
    return found


def left_behind(folder: Path) -> tuple[Any, ...]:
    """Every bit a run leaves behind, but for the time it took."""
    result = store.read_result(folder) or {}
    return {**result, "seconds": 0}, tables(folder), (folder / "losses.csv.gz").read_bytes(), (folder / "walk.csv").read_bytes()


@pytest.mark.some(2)
@pytest.mark.product
@pytest.mark.parametrize(
    "method",
    [{"name": "backprop"}, FORWARD, {"name": "forward", "tangents": 3, "perturb": "low-rank"}],
    ids=lambda m: m.get("perturb", m["name"]),
)
@pytest.mark.parametrize(
    "optimizer",
    [
        Optimizer("sgd", 0.01, 1e-3, momentum=0.5),
        Optimizer("nesterov", 0.01, 1e-3, momentum=0.9),
        Optimizer("adam", 0.001, beta1=0.8),
        Optimizer("adam", 0.001, **HELD),
    ],
    ids=lambda o: o.name + ("-held" if o.anneal else ""),
)
def test_each_run_leaves_what_it_leaves_alone(tmp_path: Path, method: dict[str, Any], optimizer: Optimizer) -> None:
    runs = grid(dataclasses.replace(RUN, estimator=method, optimizer=optimizer, epochs=2), (optimizer.lr, optimizer.lr / 2))
    runs[3] = dataclasses.replace(runs[3], test=False)
    found = batched.train(runs, Store(tmp_path))
    for run in runs:
        folder, single = tmp_path / "runs" / run.identity, tmp_path / "single" / run.identity
        wanted = loop.train(run, single)
        result = found[run.identity]
        assert result.pop("replicas") == 4
        assert result.keys() == wanted.keys()
        for name in ("status", "reason", "diverged_at", "steps", "epochs", "parameters", "forward_passes"):
            assert result[name] == wanted[name]
        assert result["validation_loss"] == pytest.approx(wanted["validation_loss"], rel=1e-3)
        assert result["initial_norm"] == wanted["initial_norm"]
        assert (result["test"] is None) == (not run.test)
        mine, alone = tables(folder), tables(single)
        assert mine.keys() == alone.keys()
        for name, table in alone.items():
            assert mine[name].keys() == table.keys()
            for column, values in table.items():
                assert mine[name][column] == pytest.approx(values, rel=1e-3, abs=2e-3 if column == "validation_accuracy" else 1e-5), column
        assert mine["losses.csv.gz"]["loss"][0] == pytest.approx(alone["losses.csv.gz"]["loss"][0], rel=1e-6)
        assert (folder / "run.json").read_bytes() == (single / "run.json").read_bytes()
        assert json.loads((folder / "environment.json").read_text())["batched"] == 4
        assert sorted(path.name for path in folder.iterdir()) == FILES
    assert not list((tmp_path / "batches").iterdir())


def test_bfloat16_runs_together_too(tmp_path: Path) -> None:
    runs = grid(dataclasses.replace(RUN, precision="bfloat16", epochs=1, optimizer=Optimizer("adam", 0.001)))
    found = batched.train(runs, Store(tmp_path))
    for run in runs:
        wanted = loop.train(run, tmp_path / "single" / run.identity)
        assert found[run.identity]["validation_loss"] == pytest.approx(wanted["validation_loss"], rel=0.02)


class Killed:
    """For tests: ends a batch at given steps, as a signal would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
        self.steps, self.times, tell = list(steps), 0, batched.ManyRuns.tell
        monkeypatch.setattr(batched, "STATUS_SECONDS", 0.0)

        def killed(batch: Any) -> None:
            tell(batch)
            if self.steps and batch.step >= self.steps[0]:
                del self.steps[0]
                self.times += 1
                raise KeyboardInterrupt

        monkeypatch.setattr(batched.ManyRuns, "tell", killed)

    def train(self, runs: list[Run], store: Store) -> None:
        while True:
            try:
                batched.train(runs, store, checkpoint_seconds=0.0)
                return
            except KeyboardInterrupt:
                continue


@pytest.mark.some(1)
@pytest.mark.parametrize("optimizer", [Optimizer("nesterov", 0.01, momentum=0.9), Optimizer("adam", 0.001, **HELD)], ids=lambda o: o.name)
def test_a_killed_batch_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Optimizer) -> None:
    monkeypatch.setattr(schedule, "FIRST_EVALUATIONS", (7,))
    runs = grid(dataclasses.replace(RUN, optimizer=optimizer), (optimizer.lr, 3e-4))
    batched.train(runs, Store(tmp_path / "whole"))
    killed = Killed(monkeypatch, 7, 17, 40)
    killed.train(runs, Store(tmp_path / "killed"))
    assert killed.times == 3
    for run in runs:
        assert left_behind(tmp_path / "killed" / "runs" / run.identity) == left_behind(tmp_path / "whole" / "runs" / run.identity)
        assert sorted(path.name for path in (tmp_path / "killed" / "runs" / run.identity).iterdir()) == FILES


def test_a_run_that_diverges_is_a_result_and_the_others_keep_their_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "CHECK_EVERY", 10)
    monkeypatch.setattr(loop, "CHECK_EVERY", 10)
    calm = grid(dataclasses.replace(RUN, estimator={"name": "backprop"}, optimizer=Optimizer("sgd", 0.1)), (0.1, 0.05), (0, 1))
    wild = list(calm)
    wild[1] = dataclasses.replace(calm[1], optimizer=Optimizer("sgd", 1e20))
    batched.train(calm, Store(tmp_path / "calm"))
    found = batched.train(wild, Store(tmp_path / "wild"))
    alone = loop.train(wild[1], tmp_path / "alone")
    result = found[wild[1].identity]
    assert result["status"] == alone["status"] == "diverged"
    assert {name: result[name] for name in ("reason", "diverged_at", "steps", "forward_passes", "validation_loss")} == {
        name: alone[name] for name in ("reason", "diverged_at", "steps", "forward_passes", "validation_loss")
    }
    assert (tmp_path / "wild/runs" / wild[1].identity / "walk.csv").read_text() == (tmp_path / "alone" / "walk.csv").read_text()
    for run in (calm[0], *calm[2:]):
        assert left_behind(tmp_path / "wild" / "runs" / run.identity) == left_behind(tmp_path / "calm" / "runs" / run.identity)

    # killed after the divergence, the same command goes on with the same batch
    killed, place = Killed(monkeypatch, 20), Place(batched=True)
    here = Store(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        batched.train(wild, here, checkpoint_seconds=0.0)
    assert here.result(wild[1].identity) is not None
    assert batched.plan([run for run in wild if here.result(run.identity) is None], here) == [tuple(wild)]
    assert execute(wild, here, place, QUIET).keys() == {run.identity for run in wild}
    assert killed.times == 1
    for run in wild:
        assert left_behind(tmp_path / "killed" / "runs" / run.identity) == left_behind(tmp_path / "wild" / "runs" / run.identity)


def test_the_test_split_is_read_only_by_runs_that_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, losses_of, digits = [], evaluation.losses_of, datasets.load("digits", 0)
    monkeypatch.setattr(
        evaluation,
        "losses_of",
        lambda model, data, split, *rest, **named: seen.append(split) or losses_of(model, data, split, *rest, **named),
    )
    runs = [dataclasses.replace(run, test=False) for run in grid(RUN, seeds=(0,))]
    assert all(result["test"] is None for result in batched.train(runs, Store(tmp_path)).values())
    assert seen
    assert all(torch.equal(split.labels, digits.validation.labels) for split in seen)


@pytest.mark.parametrize("held", [{}, HELD], ids=["free", "held"])
def test_steps_do_not_wait_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: dict[str, Any]) -> None:
    runs = grid(dataclasses.replace(RUN, optimizer=Optimizer("sgd", 0.01, momentum=0.5, **held)))
    batch = batched.ManyRuns(runs, Store(tmp_path), torch.device("cpu"), None)
    batch.advance(1)

    def waits(*_: Any, **__: Any) -> None:
        pytest.fail("a step read a value from the device")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    batch.advance(5)
    monkeypatch.undo()
    assert batch.step == 5
    assert batch.losses[:, :5].isfinite().all()


def test_a_plan_batches_what_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Store(tmp_path)
    runs = grid(RUN)
    trial = dataclasses.replace(runs[0], seed=9, test=False)
    others = [
        dataclasses.replace(RUN, model="logistic"),
        *(dataclasses.replace(run, estimator={"name": "feedback"}) for run in runs[:2]),
        dataclasses.replace(RUN, optimizer=Optimizer("adam", 0.01)),
    ]
    assert batched.plan([*runs, trial, *others], here) == [(*runs, trial), *((run,) for run in others)]
    folder = here.folder(runs[1].identity)
    folder.mkdir()
    (folder / "checkpoint.pt").touch()
    assert sorted(map(len, batched.plan(runs, here))) == [1, 3]
    monkeypatch.setattr(batched, "LARGEST", 2)
    (folder / "checkpoint.pt").unlink()
    assert sorted(map(len, batched.plan([*runs, trial], here))) == [1, 2, 2]


@pytest.mark.full
def test_execution_batches_on_request_alone_or_in_a_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = grid(dataclasses.replace(RUN, model="logistic", epochs=1))
    plain = execute(runs, Store(tmp_path / "plain"), Place(), QUIET)
    assert not any("replicas" in result for result in plain.values())
    monkeypatch.setattr(batched, "LARGEST", 2)
    for jobs in (1, 2):
        found = execute(runs, Store(tmp_path / str(jobs)), Place(jobs=jobs, batched=True), QUIET)
        assert {result["replicas"] for result in found.values()} <= {2, 4}
        for key, result in plain.items():
            assert found[key]["validation_loss"] == pytest.approx(result["validation_loss"], rel=1e-4)
    again = execute(runs, Store(tmp_path / "1"), Place(batched=True), QUIET)
    assert again.keys() == plain.keys()


def test_mistakes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, here = grid(RUN), Store(tmp_path)
    with store.alone(here.folder(runs[2].identity)), pytest.raises(UserError, match="another process is training"):
        batched.train(runs, here)
    Killed(monkeypatch, 17)
    with pytest.raises(KeyboardInterrupt):
        batched.train(runs, here, checkpoint_seconds=0.0)
    (checkpoint,) = tmp_path.glob("batches/*/checkpoint.pt")
    checkpoint.write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged .* delete the folder"):
        batched.train(runs, here)


def test_the_command_batches_and_the_report_says_that_time_was_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "tune --data digits --model logistic --lr 0.01,0.003 --epochs 1 --tuning-epochs 1 --seeds 2 --batched --out"
    monkeypatch.setattr(sys, "argv", ["forwardgrad", *words.split(), str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code, capsys.readouterr().err
    results = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/result.json")]
    assert [result["replicas"] for result in results] == [2, 2, 2, 2]
    assert sorted(result["test"] is None for result in results) == [False, False, True, True]
    assert "shared by 2 runs at once" in (tmp_path / "report.md").read_text()


@pytest.mark.full
def test_the_benchmark_runs() -> None:
    script = Path(__file__).resolve().parents[3] / "benchmarks" / "batched_runs.py"
    words = ("--model", "logistic", "--runs", "1,3", "--rounds", "2", "--optimizer", "nesterov")
    found = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert [line.split(" ms")[0].rsplit(maxsplit=1)[0].strip() for line in found.stdout.splitlines()[2:]] == [
        "one alone",
        "1 batched",
        "3 batched",
    ]
    wrong = subprocess.run([sys.executable, script, "--device", "cuda:99"], capture_output=True, text=True, timeout=300)
    assert wrong.returncode == 2
    assert "no GPU for --device cuda:99" in wrong.stderr
