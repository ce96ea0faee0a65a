"""What a run keeps where it is asked to: its final weights, also in a pack, and the joules beside its seconds."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from forwardgrad.lab import store
from forwardgrad.lab.energy import EnergyCounter, EnergyMeter
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.execution import Place, execute
from forwardgrad.lab.store import Progress, Store, catalogue, describe
from forwardgrad.lab.studies import Optimizer, Run
from forwardgrad.lab.training import batched, builders, loop, state
from forwardgrad.lab.training.evaluation import losses_of, summary
from forwardgrad.lab.training.training import Training

CPU = torch.device("cpu")
RUN = Run("digits", "logistic", {"name": "backprop"}, Optimizer("sgd", 0.05), epochs=2)
LOCAL = dataclasses.replace(RUN, model="mlp", estimator={"name": "local", "feedback": True}, optimizer=Optimizer("adam", 1e-3))


def ticking(on: torch.device) -> EnergyMeter:
    """A counter that moves by a joule whenever it is read: every stretch of a run uses one."""
    ticks = itertools.count(1)
    return EnergyMeter([EnergyCounter("cpu", lambda: float(next(ticks)))])


@pytest.mark.parametrize("run", [RUN, LOCAL], ids=["backprop", "local"])
def test_kept_weights_give_the_stored_result_again(run: Run, tmp_path: Path) -> None:
    folder = Store(tmp_path).folder(run.identity)
    result = loop.train(run, folder, keep_weights=True)
    dataset = builders.dataset(run, CPU)
    model = builders.initialised_model(run, dataset, CPU)
    memory = state.read_weights(folder, model)
    assert summary(losses_of(model, dataset, dataset.test)) == (result["test"]["loss"], result["test"]["accuracy"])
    assert bool(memory) == (run is LOCAL)
    assert not (folder / "checkpoint.pt").exists()


def test_weights_are_kept_of_final_runs_that_finished_and_where_asked(tmp_path: Path) -> None:
    out = Store(tmp_path)
    diverges = dataclasses.replace(RUN, optimizer=Optimizer("sgd", 1e20))
    for run, keep in ((RUN, False), (dataclasses.replace(RUN, test=False), True), (diverges, True)):
        folder = out.folder(run.identity)
        loop.train(run, folder, keep_weights=keep)
        assert not (folder / "weights.pt").exists()
        with pytest.raises(UserError, match=rf"the run {run.identity} kept no weights: train with --keep-weights"):
            state.read_weights(folder, torch.nn.Linear(1, 1))


def test_a_pack_leaves_the_weights_readable_and_a_changed_file_is_refused(tmp_path: Path) -> None:
    out = Store(tmp_path)
    folder = out.folder(RUN.identity)
    loop.train(RUN, folder, keep_weights=True)
    assert store.pack(out) == 1
    assert [path.name for path in folder.iterdir()] == ["weights.pt"]
    dataset = builders.dataset(RUN, CPU)
    model = builders.initialised_model(RUN, dataset, CPU)
    state.read_weights(folder, model)
    assert summary(losses_of(model, dataset, dataset.test))[1] == out.result(RUN.identity)["test"]["accuracy"]  # type: ignore[index]
    content = bytearray((folder / "weights.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "weights.pt").write_bytes(content)
    with pytest.raises(UserError, match="do not agree"):
        state.read_weights(folder, model)


def test_runs_of_one_program_keep_theirs(tmp_path: Path) -> None:
    runs, out = [dataclasses.replace(RUN, seed=seed) for seed in (0, 1)], Store(tmp_path)
    results = batched.train(runs, out, keep_weights=True)
    for run in runs:
        dataset = builders.dataset(run, CPU)
        model = builders.initialised_model(run, dataset, CPU)
        state.read_weights(out.folder(run.identity), model)
        assert summary(losses_of(model, dataset, dataset.test))[0] == pytest.approx(results[run.identity]["test"]["loss"], rel=1e-12)


def test_the_joules_of_a_run_alone_stand_beside_its_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "energy_meter", ticking)
    out = Store(tmp_path)
    folder = out.folder(RUN.identity)
    result = loop.train(RUN, folder, alone=True)
    assert list(result["joules"]) == ["cpu"]
    assert 1 < result["joules"]["cpu"] < result["steps"]
    assert out.result(RUN.identity)["joules"] == result["joules"]  # type: ignore[index]
    assert describe(result).endswith(" J cpu") and " s, " in describe(result)  # noqa: PT018
    (row,) = catalogue.rows(out)
    assert row["joules_cpu"] == result["joules"]["cpu"]


def test_nothing_is_said_where_the_machine_does_not_tell_or_runs_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "energy_meter", lambda on: EnergyMeter())
    found = Store(tmp_path / "silent")
    for alone in (True, False):
        result = loop.train(dataclasses.replace(RUN, seed=int(alone)), found.folder(f"{alone:012x}"), alone=alone)
        assert "joules" not in result
        assert " J" not in describe(result)
        monkeypatch.setattr(loop, "energy_meter", ticking)  # the second shares the machine
    assert Place().alone
    assert not Place(jobs=2).alone
    assert not Place(executor="ray").alone


def test_nothing_is_said_of_a_run_beside_which_other_programs_worked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crowded(on: torch.device) -> EnergyMeter:
        ticks = itertools.count(1)
        return EnergyMeter([EnergyCounter("cpu", lambda: 1.0 * next(ticks))], lambda: (2.0 * next(ticks), 0.0))

    for module in (loop, batched):
        monkeypatch.setattr(module, "energy_meter", crowded)
    out = Store(tmp_path)
    assert "joules" not in loop.train(RUN, out.folder(RUN.identity), alone=True)
    others = [dataclasses.replace(RUN, seed=seed) for seed in (1, 2)]
    assert not any("joules" in result for result in batched.train(others, out, alone=True).values())


def test_a_place_with_one_job_asks_for_the_joules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def train(run: Run, folder: Path, **options: Any) -> dict[str, Any]:
        asked.append(options)
        return loop.train(run, folder, **options)

    from forwardgrad.lab import training

    monkeypatch.setattr(training, "train", train, raising=False)
    execute([RUN], Store(tmp_path), Place(keep_weights=True), Progress(quiet=True))
    assert (asked[0]["alone"], asked[0]["keep_weights"]) == (True, True)


def test_runs_of_one_program_share_their_joules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "energy_meter", ticking)
    runs = [dataclasses.replace(RUN, seed=seed) for seed in (0, 1)]
    first, second = batched.train(runs, Store(tmp_path), alone=True).values()
    assert first["joules"] == second["joules"]
    assert first["joules"]["cpu"] > 1
    assert first["replicas"] == 2


def test_a_run_that_went_on_without_a_meter_says_nothing(tmp_path: Path) -> None:
    """Half of the joules beside all of the seconds would mislead; a checkpoint of an older version has none."""
    dataset = builders.dataset(RUN, CPU)
    measured = Training.begin(RUN, dataset, CPU)
    measured.meter = ticking(CPU)
    measured.advance_timed(3)
    assert measured.state.joules == {"cpu": 1.0}
    measured.meter = EnergyMeter()
    measured.advance_timed(4)
    assert measured.state.joules is None
    content = measured.state.counts()
    del content["joules"]
    again = Training.begin(RUN, dataset, CPU)
    again.state.set_counts(content)
    assert again.state.joules is None


def test_joules_that_are_no_numbers_are_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "energy_meter", ticking)
    out = Store(tmp_path)
    folder = out.folder(RUN.identity)
    loop.train(RUN, folder, alone=True)
    result = json.loads((folder / "result.json").read_text())
    result.pop("digest", None)
    store.write_json(folder / "result.json", {**result, "joules": {"cpu": "many"}})
    with pytest.raises(UserError, match="damaged"):
        out.result(RUN.identity)
