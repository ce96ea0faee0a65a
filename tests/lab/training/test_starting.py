"""Runs that start from the kept weights of another run: found by their digest, refused where they are damaged or another network's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from forwardgrad.lab import models
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.models.starting import digest_of
from forwardgrad.lab.records import record_task
from forwardgrad.lab.store import Store
from forwardgrad.lab.studies import Optimizer, Run, from_json, to_json
from forwardgrad.lab.training import batched, builders, keep_weights_of, loop
from forwardgrad.lab.tuning import check_buildable, measure_pace

BASE = Run("digits", "logistic", {"name": "backprop"}, Optimizer("sgd", 0.05), epochs=1)
STILL = Optimizer("sgd", 1e-30)  # too little to change a weight


def kept(tmp_path: Path) -> tuple[str, dict[str, object]]:
    folder = Store(tmp_path / "out").folder(BASE.identity)
    result = loop.train(BASE, folder, keep_weights=True)
    return keep_weights_of(folder, tmp_path / "data"), result


def test_a_run_begins_where_the_other_ended(tmp_path: Path) -> None:
    digest, base = kept(tmp_path)
    for seed in (0, 5):
        run = dataclasses.replace(BASE, optimizer=STILL, steps=1, start=digest, seed=seed)
        check_buildable([run], tmp_path / "data")
        result = loop.train(run, Store(tmp_path / "out").folder(run.identity), data_dir=tmp_path / "data")
        assert result["test"] | {"last16": 0, "last16_low": 0, "last16_high": 0} == base["test"] | {  # type: ignore[operator]
            "last16": 0,
            "last16_low": 0,
            "last16_high": 0,
        }
        assert json.loads((tmp_path / "out/runs" / run.identity / "run.json").read_text())["start"] == digest
    assert measure_pace(run, data_dir=tmp_path / "data").seconds > 0


def test_runs_of_one_program_begin_there_too(tmp_path: Path) -> None:
    digest, base = kept(tmp_path)
    runs = [dataclasses.replace(BASE, optimizer=STILL, steps=1, start=digest, seed=seed) for seed in (1, 2)]
    for result in batched.train(runs, Store(tmp_path / "out"), data_dir=tmp_path / "data").values():
        assert result["test"]["loss"] == pytest.approx(base["test"]["loss"], rel=1e-6)  # type: ignore[index]


def test_a_run_has_another_name_for_other_weights_and_its_old_name_for_none() -> None:
    digests = ["a" * 64, "b" * 64, None]
    runs = [dataclasses.replace(BASE, start=digest) for digest in digests]
    assert len({run.identity for run in runs}) == 3
    assert "start" not in to_json(BASE)
    assert [from_json(to_json(run)) for run in runs] == runs
    for bad in ("a" * 63, "A" * 64, 7):
        with pytest.raises(UserError, match="start must be a digest of weights, 64 hexadecimal digits"):
            dataclasses.replace(BASE, start=bad)


def test_the_digest_is_of_names_shapes_types_and_numbers(tmp_path: Path) -> None:
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    same = {"b": torch.ones(4)[::2], "a": weights["a"].clone()}
    others = [
        {**weights, "b": torch.tensor([1.0, 1.0000001])},
        {**weights, "a": weights["a"].reshape(3, 2)},
        {**weights, "b": weights["b"].double()},
        {"a": weights["a"], "c": weights["b"]},
    ]
    assert digest_of(weights) == digest_of(same) == models.keep_start(weights, tmp_path) == models.keep_start(same, tmp_path)
    assert len({digest_of(each) for each in [weights, *others]}) == 5
    assert [path.name for path in (tmp_path / "weights").iterdir()] == [f"{digest_of(weights)}.pt"]


def test_weights_that_are_missing_damaged_or_of_another_network_are_refused(tmp_path: Path) -> None:
    digest, _ = kept(tmp_path)
    data, run = tmp_path / "data", dataclasses.replace(BASE, start=digest)
    (file,) = (data / "weights").iterdir()
    digits = builders.dataset(BASE, torch.device("cpu"))
    with pytest.raises(
        UserError, match=r"the weights \w{12} that this run starts from are not in .*: name the folder of the run that made"
    ):
        builders.started(run, digits, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"are of another network \(1\.weight is \[64, 64\] here and \[10, 64\] among them\)"):
        check_buildable([dataclasses.replace(run, model="mlp")], data)
    torch.save({"1.weight": torch.zeros(10, 64), "1.bias": torch.zeros(10)}, file)
    with pytest.raises(UserError, match="its weights are not those of its name"):
        builders.started(run, digits, data)
    file.write_bytes(b"no weights")
    with pytest.raises(UserError, match="is damaged"):
        builders.started(run, digits, data)
    with pytest.raises(UserError, match=r"holds no weights\.pt: name the folder of a run that was trained with --keep-weights"):
        keep_weights_of(tmp_path, data)


def test_no_record_starts_from_another_run() -> None:
    run = dataclasses.replace(BASE, model="mlp", estimator={"name": "forward"})
    record_task("digits-mlp-accuracy").check(run)
    with pytest.raises(UserError, match="the run starts from the weights of another run, and how those came about cannot be seen"):
        record_task("digits-mlp-accuracy").check(dataclasses.replace(run, start="a" * 64))
