"""TensorBoard's files, read back with TensorBoard's own reader: what a run wrote, once each, and the run none the worse for it."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.lab.training.test_loop import left_behind
from tests.support.command import run as command

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.execution.dispatch import execute
from forwardgrad.lab.execution.place import Place
from forwardgrad.lab.store.files import read_table
from forwardgrad.lab.store.progress import Progress
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.run import Optimizer, Run
from forwardgrad.lab.training import loop, tensorboard

RUN = Run("digits", "logistic", {"name": "forward", "clip": 1.0}, Optimizer("sgd", 0.01, decay=1e-3, anneal=True), epochs=3)


@pytest.fixture(autouse=True)
def _points_at_every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "NOTED_SECONDS", 0.0)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of a folder of events as (step, value), as TensorBoard sees them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_all_there(boards: Path, folder: Path, run: Run) -> None:
    """The events of a run are its files' numbers, each step once."""
    found = scalars(boards / run.identity)
    evaluations, walk, losses = (read_table(folder / name) for name in ("evaluations.csv", "walk.csv", "losses.csv.gz"))
    for tag, table, column in [
        ("validation/loss", evaluations, "validation_loss"),
        ("validation/accuracy", evaluations, "validation_accuracy"),
    ]:
        assert [step for step, _ in found[tag]] == table["step"]
        assert [value for _, value in found[tag]] == pytest.approx(table[column], rel=1e-6)
    assert [step for step, _ in found["walk/norm_growth"]] == walk["step"]
    assert [value for _, value in found["walk/norm_growth"]] == pytest.approx(walk["norm_growth"], rel=1e-6)
    for tag in ("train/loss", "train/learning_rate"):
        steps = [step for step, _ in found[tag]]
        assert steps == sorted(set(steps))
        assert set(evaluations["step"]) <= set(steps)
    total = len(losses["loss"])
    at = 0
    for step, value in found["train/loss"]:
        assert value == pytest.approx(sum(losses["loss"][at:step]) / (step - at), rel=1e-5)
        at = step
    for step, value in found["train/learning_rate"]:
        rate = 0.01 * math.exp(-1e-3 * (step - 1)) * (1 + math.cos(math.pi * (step - 1) / total)) / 2
        assert value == pytest.approx(rate, rel=1e-6)
    result = json.loads((folder / "result.json").read_text())
    assert found["final/test_accuracy"] == [(total, pytest.approx(result["test"]["accuracy"]))]
    assert found["final/validation_loss"] == [(total, pytest.approx(result["validation_loss"]))]


def test_a_run_is_there_with_every_number_and_keeps_its_bits(tmp_path: Path) -> None:
    loop.train(RUN, tmp_path / "plain")
    loop.train(RUN, tmp_path / "boarded", tensorboard=tmp_path / "boards")
    assert left_behind(tmp_path / "plain") == left_behind(tmp_path / "boarded")
    assert_all_there(tmp_path / "boards", tmp_path / "boarded", RUN)


def test_the_table_of_hyperparameters(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    loop.train(RUN, tmp_path / "run", tensorboard=tmp_path / "boards")
    events = EventAccumulator(str(tmp_path / "boards" / RUN.identity))
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    given = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert given["optimizer.lr"].number_value == 0.01
    assert given["estimator.name"].string_value == "forward"
    assert given["optimizer.anneal"].number_value == 1
    assert given["optimizer.cap"].string_value == "None"
    assert set(given) == set(tensorboard.hyperparameters(RUN))


def test_a_run_that_goes_on_within_a_second_is_read_after_what_it_goes_on_from(tmp_path: Path) -> None:
    loop.train(RUN, tmp_path / "first", tensorboard=tmp_path / "first")  # what takes long for the first time
    board = tmp_path / RUN.identity
    board.mkdir()
    while time.time() % 1 > 0.1:
        time.sleep(0.01)
    earlier = board / f"events.out.tfevents.{int(time.time())}.zzz.9.0"  # of this second, and the last in it by name
    earlier.touch()
    loop.train(RUN, tmp_path / "run", tensorboard=tmp_path)
    assert max(board.iterdir()) != earlier
    assert_all_there(tmp_path, tmp_path / "run", RUN)


SCRIPT = """
import sys
from pathlib import Path
from forwardgrad.lab.training import loop, tensorboard
from forwardgrad.lab.studies import from_json
import json
tensorboard.NOTED_SECONDS = 0.0
run, root = from_json(json.loads(sys.argv[2])), Path(sys.argv[1])
loop.train(run, root / "run", tensorboard=root / "boards", checkpoint_seconds=0.05)
"""


@pytest.mark.full
def test_a_run_killed_and_resumed_has_every_step_once(tmp_path: Path) -> None:
    from forwardgrad.lab.studies.run import to_json

    run = dataclasses.replace(RUN, epochs=100)
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    for _ in range(2):  # killed twice, each time some steps after a checkpoint
        seen = {checkpoint.stat().st_mtime_ns} if checkpoint.exists() else set()
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), json.dumps(to_json(run))])
        deadline = time.monotonic() + 60
        while len(seen) < 4:
            if checkpoint.exists():
                seen.add(checkpoint.stat().st_mtime_ns)
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "run" / "result.json").exists()
    loop.train(run, tmp_path / "run", tensorboard=tmp_path / "boards")
    assert_all_there(tmp_path / "boards", tmp_path / "run", run)
    loop.train(run, tmp_path / "undisturbed")
    assert left_behind(tmp_path / "run") == left_behind(tmp_path / "undisturbed")


def test_runs_of_one_program_each_have_their_own(tmp_path: Path) -> None:
    runs = [dataclasses.replace(RUN, seed=seed, optimizer=Optimizer("sgd", lr)) for seed, lr in ((0, 0.01), (1, 0.02))]
    store = Store(tmp_path)
    execute(runs, store, Place(batched=True, tensorboard=True), Progress(quiet=True))
    for run in runs:
        found = scalars(tmp_path / "tensorboard" / run.identity)
        rates = [value for _, value in found["train/learning_rate"]]
        assert rates == pytest.approx([run.optimizer.lr] * len(rates))
        evaluations = read_table(store.folder(run.identity) / "evaluations.csv")
        assert [value for _, value in found["validation/loss"]] == pytest.approx(evaluations["validation_loss"], rel=1e-6)
        assert len(found["final/test_loss"]) == 1


def test_the_command_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words: list[Any] = ["train", "--data", "digits", "--model", "logistic", "--epochs", "1", "--out", tmp_path]
    assert command(monkeypatch, capsys, *words, "--seed", "1")[0] == 0
    assert not (tmp_path / "tensorboard").exists()
    assert command(monkeypatch, capsys, *words, "--tensorboard")[0] == 0
    (folder,) = (tmp_path / "tensorboard").iterdir()
    assert scalars(folder)["final/steps"] == [(17, 17.0)]
    assert (tmp_path / "runs" / folder.name / "result.json").exists()


def test_without_the_package_one_sentence_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'forwardgrad\[tensorboard\]'"):
        tensorboard.installed()
    for words in (["train", "--data", "digits"], ["tune", "--lr", "0.1"], ["reproduce", "table1"]):
        status, _, err = command(monkeypatch, capsys, *words, "--tensorboard", "--out", tmp_path / "out")
        assert status == 2
        assert err.count("\n") == 1
        assert "pip install 'forwardgrad[tensorboard]'" in err
    assert not (tmp_path / "out").exists()
