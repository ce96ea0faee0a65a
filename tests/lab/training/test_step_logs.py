"""A run that writes a log: the same run, whole or killed and gone on with; and the command that builds its model again."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.command import run as command

from forwardgrad.journal import read_journal
from forwardgrad.lab import store
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store import Store
from forwardgrad.lab.studies import Optimizer, Run
from forwardgrad.lab.training import builders, loop, state

CPU = torch.device("cpu")
RUN = Run("digits", "mlp", {"name": "forward", "tangents": 2}, Optimizer("sgd", 0.01), epochs=2)
RUNS = {
    "plain": RUN,
    "all that an optimizer may have": dataclasses.replace(
        RUN,
        estimator={"name": "forward", "perturb": "low-rank"},
        optimizer=Optimizer("nesterov", 0.01, decay=0.01, momentum=0.5, weight_decay=0.1, cap=0.005, anneal=True, warm_up=5),
    ),
    "adam": dataclasses.replace(RUN, estimator={"name": "zeroth-order", "perturb": "low-rank"}, optimizer=Optimizer("adam", 1e-3)),
}
STEPS = 34  # 1,080 examples, 64 a step, twice


def weights(out: Path, run: Run) -> list[torch.Tensor]:
    model = builders.initialised_model(run, builders.dataset(run, CPU), CPU)
    state.read_weights(Store(out).folder(run.identity), model)
    return [p.detach() for p in model.parameters()]


def killed(monkeypatch: pytest.MonkeyPatch, folder: Path, run: Run, *at: int, **options: Any) -> None:
    """Train with a checkpoint after every stretch of steps, and die at these steps, the log ahead of its checkpoint."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "CHECK_EVERY", 2)
        for step in at:

            def tell(self: Any, step: int = step) -> None:
                if self.step >= step:
                    self.training.advance(min(self.step + 3, STEPS))
                    raise KeyboardInterrupt

            patch.setattr(loop.SingleRun, "tell", tell)
            with pytest.raises(KeyboardInterrupt):
                loop.train(run, folder, checkpoint_seconds=0, **options)


@pytest.mark.parametrize("name", RUNS)
def test_a_log_changes_nothing_and_gives_the_weights_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RUNS[name]
    for out, log in (("plain", False), ("logged", True)):
        loop.train(run, Store(tmp_path / out).folder(run.identity), keep_weights=True, log=log)
    assert all(map(torch.equal, weights(tmp_path / "plain", run), weights(tmp_path / "logged", run)))
    assert not (Store(tmp_path / "plain").folder(run.identity) / "steps.log").exists()
    folder = Store(tmp_path / "logged").folder(run.identity)
    status, out, err = command(monkeypatch, capsys, "replay", folder, "--out", tmp_path / "again.pt")
    assert (status, err) == (0, "")
    assert re.match(rf"{STEPS} steps in [\d.]+ s, where training took [\d.]+ s: the parameters have the digest of the log, and are", out)
    assert "and are those that the run kept\n" in out
    assert all(map(torch.equal, weights(tmp_path / "plain", run), torch.load(tmp_path / "again.pt", weights_only=True).values()))


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_cuts_its_log_and_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RUNS[name]
    loop.train(run, Store(tmp_path / "whole").folder(run.identity), keep_weights=True)
    folder = Store(tmp_path / "killed").folder(run.identity)
    killed(monkeypatch, folder, run, 4, 9, 20, log=True)
    behind = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < behind < len(read_journal(folder / "steps.log").steps)
    loop.train(run, folder, keep_weights=True, log=True)
    assert all(map(torch.equal, weights(tmp_path / "whole", run), weights(tmp_path / "killed", run)))
    assert len(read_journal(folder / "steps.log").steps) == STEPS
    status, out, _ = command(monkeypatch, capsys, "replay", folder / "steps.log")
    assert status == 0
    assert "and are those that the run kept" in out


def test_a_step_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights of step 17 are those of a run of one epoch."""
    run, half = dataclasses.replace(RUN, epochs=2), dataclasses.replace(RUN, epochs=1)
    loop.train(run, Store(tmp_path).folder(run.identity), log=True)
    loop.train(half, Store(tmp_path).folder(half.identity), keep_weights=True)
    folder = Store(tmp_path).folder(run.identity)
    status, out, _ = command(monkeypatch, capsys, "replay", folder, "--step", "17", "--out", tmp_path / "weights.pt")
    assert (status, out.split(" s:")[1]) == (0, f" the log has no digest at this step\n{tmp_path / 'weights.pt'}\n")
    assert all(map(torch.equal, weights(tmp_path, half), torch.load(tmp_path / "weights.pt", weights_only=True).values()))


def test_a_packed_run_is_replayed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    loop.train(RUN, Store(tmp_path).folder(RUN.identity), log=True)
    store.pack(Store(tmp_path))
    status, out, _ = command(monkeypatch, capsys, "replay", Store(tmp_path).folder(RUN.identity))
    assert status == 0
    assert "the parameters have the digest of the log" in out


def test_what_cannot_be_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Store(tmp_path).folder(RUN.identity)
    loop.train(RUN, folder, keep_weights=True, log=True)
    shutil.copytree(folder, alone := tmp_path / "alone")
    damaged = bytearray((folder / "steps.log").read_bytes())
    damaged[-60] ^= 1
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((tmp_path,), f"the run in {tmp_path} has no steps.log: name the folder of a run that was trained with --log"),
        ((tmp_path / "no.log",), f"there is no {tmp_path / 'no.log'}: name"),
        ((alone,), "there is no run.json beside the log in"),
        ((folder, "--step", 35), "holds the steps 1 to 34, and none up to step 35"),
        ((folder, "--out", tmp_path / "no" / "weights.pt"), "there is no folder"),
        ((folder, "--out", tmp_path), "it is a folder, so name a file in it"),
    ]
    for arguments, said in cases:
        status, out, err = command(monkeypatch, capsys, "replay", *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert said in err
    model = builders.initialised_model(RUN, builders.dataset(RUN, CPU), CPU)
    content: dict[str, Any] = {"model": model.state_dict(), "memory": {}}
    store.write_checkpoint(folder / "weights.pt", state.as_bytes(content))
    status, out, err = command(monkeypatch, capsys, "replay", folder, "--out", tmp_path / "weights.pt")
    assert (status, out) == (2, "")
    assert "but they are not those in weights.pt" in err
    (folder / "steps.log").write_bytes(damaged)
    status, out, err = command(monkeypatch, capsys, "replay", folder, "--out", tmp_path / "weights.pt")
    assert (status, out) == (2, "")
    assert "is damaged in the record at byte" in err
    assert not (tmp_path / "weights.pt").exists()


def test_what_cannot_be_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for changed, said in (
        ({"estimator": {"name": "backprop"}}, "--log: .* cannot be taken again from a log"),
        ({"engine": "compile"}, "--log goes with --engine eager on --device cpu"),
    ):
        run = dataclasses.replace(RUN, **changed)
        with pytest.raises(UserError, match=said):
            loop.train(run, tmp_path / run.identity, log=True)
        assert not (tmp_path / run.identity).exists()
    folder = Store(tmp_path).folder(RUN.identity)
    killed(monkeypatch, folder, RUN, 9)
    with pytest.raises(UserError, match="was begun without --log: go on without it"):
        loop.train(RUN, folder, log=True)
    loop.train(RUN, folder)


def test_a_log_that_stops_short_of_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was begun with a log and went on without."""
    folder = Store(tmp_path).folder(RUN.identity)
    killed(monkeypatch, folder, RUN, 4, log=True)
    killed(monkeypatch, folder, RUN, 20)
    with pytest.raises(UserError, match=r"ends after step \d+, and is to go on after step \d+"):
        loop.train(RUN, folder, log=True)


def test_the_command_writes_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("train", "--data", "digits", "--model", "logistic", "--epochs", "1", "--out", tmp_path)
    assert command(monkeypatch, capsys, *words)[0] == 0
    status, _, err = command(monkeypatch, capsys, *words, "--log")
    assert status == 0
    assert "this run was finished before, and wrote no log" in err
    shutil.rmtree(tmp_path / "runs")
    assert command(monkeypatch, capsys, *words, "--log")[0] == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert command(monkeypatch, capsys, "replay", folder)[0] == 0
