"""What larger networks are trained with: augmentation, smoothed labels, warm-up, decoupled weight decay; against loops written by hand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from forwardgrad.lab import models, store
from forwardgrad.lab.data import crop_flip, datasets, draws_of_epoch
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.statistics.walk import rates
from forwardgrad.lab.store import Store
from forwardgrad.lab.studies.run import Optimizer, Run, stream
from forwardgrad.lab.training import batched, builders, loop
from forwardgrad.lab.training.training import Training

LOCAL = {"name": "local", "feedback": True, "head": "pooled", "cells": 4}
RUN = Run("digits", "resnet8-w4", {"name": "backprop"}, Optimizer("sgd", 0.05, momentum=0.9), epochs=2, batch_size=128, augment="crop-flip")
PLAIN = dataclasses.replace(RUN, model="logistic")


def left_behind(folder: Path) -> tuple[Any, ...]:
    """All that a run leaves behind, but for the time it took."""
    result, table = store.read_result(folder), store.read_table(folder / "evaluations.csv")
    assert result is not None
    del table["seconds"]
    return {**result, "seconds": 0}, table, (folder / "losses.csv.gz").read_bytes(), (folder / "walk.csv").read_bytes()


def test_training_images_are_augmented_and_no_others(tmp_path: Path) -> None:
    """With warm-up, smoothed labels and weight decay: AdamW of torch's own, in a loop that takes every crop from the seed."""
    options = Optimizer("adam", 0.01, weight_decay=0.1, warm_up=10, anneal=True)
    result = loop.train(dataclasses.replace(PLAIN, optimizer=options, label_smoothing=0.2), tmp_path)
    digits = datasets.load("digits", 0)
    torch.manual_seed(stream(0, "initialisation"))
    model, losses = models.build("logistic", digits.shape, 10), []
    optimizer, total = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1), 2 * math.ceil(len(digits.train) / 128)
    for epoch in range(2):
        order = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(stream(0, f"order of epoch {epoch}")))
        drawn = draws_of_epoch(0, epoch, len(order))
        for batch, draws in zip(order.split(128), drawn.split(128), strict=True):
            t = len(losses)
            optimizer.param_groups[0]["lr"] = 0.01 * min(1, (t + 1) / 10) * (1 + math.cos(math.pi * t / total)) / 2
            images = crop_flip(digits.train.inputs[batch], draws)
            loss = F.cross_entropy(model(images.float() / 16), digits.train.labels[batch], label_smoothing=0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert store.read_table(tmp_path / "losses.csv.gz")["loss"] == pytest.approx(losses, rel=1e-5)
    with torch.no_grad():
        for split, found in ((digits.validation, result["validation_loss"]), (digits.test, result["test"]["loss"])):
            assert found == pytest.approx(float(F.cross_entropy(model(split.inputs.float() / 16), split.labels)), rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("estimator", [{"name": "backprop"}, LOCAL], ids=lambda e: e["name"])
def test_a_killed_run_with_batch_norm_and_augmentation_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: dict[str, Any]
) -> None:
    run = dataclasses.replace(RUN, estimator=estimator, optimizer=dataclasses.replace(RUN.optimizer, warm_up=5))
    loop.train(run, tmp_path / "undisturbed")
    tell, kills = loop.write_status, [3, 9, 12]

    def killed(training: Training, *rest: Any) -> None:
        tell(training, *rest)
        if kills and training.state.step >= kills[0]:
            del kills[0]
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "write_status", killed)
    interruptions = 0
    while not (tmp_path / "killed" / "result.json").exists():
        try:
            loop.train(run, tmp_path / "killed", checkpoint_seconds=0.0)
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions == 3
    assert left_behind(tmp_path / "killed") == left_behind(tmp_path / "undisturbed")


def test_runs_together_are_augmented_as_each_alone(tmp_path: Path) -> None:
    runs = [dataclasses.replace(RUN, model="mlp", seed=seed) for seed in (0, 1)]
    runs.append(dataclasses.replace(runs[0], optimizer=dataclasses.replace(RUN.optimizer, lr=0.02, warm_up=4)))
    found = batched.train(runs, Store(tmp_path / "together"))
    for run in runs:
        wanted = loop.train(run, tmp_path / "alone" / run.identity)
        assert found[run.identity]["validation_loss"] == pytest.approx(wanted["validation_loss"], rel=1e-4)
    other = [dataclasses.replace(runs[0], augment=None), dataclasses.replace(runs[0], label_smoothing=0.1)]
    assert len(batched.plan([*runs, *other], Store(tmp_path / "new"))) == 3


def test_a_residual_network_trains_in_a_batch_of_runs(tmp_path: Path) -> None:
    runs = [dataclasses.replace(RUN, seed=seed, epochs=1) for seed in (0, 1)]
    found = batched.train(runs, Store(tmp_path))
    for run in runs:
        wanted = loop.train(run, tmp_path / "alone" / run.identity)
        assert found[run.identity]["validation_loss"] == pytest.approx(wanted["validation_loss"], rel=1e-2)


@pytest.mark.parametrize("anneal", [False, True])
def test_the_rate_rises_in_a_line(anneal: bool) -> None:
    options = Optimizer("sgd", 0.5, decay=0.01, warm_up=4, anneal=anneal)
    model = models.build("logistic", (1, 8, 8), 10)
    optimizer = builders.optimizer(options, model)
    schedule, found = builders.lr_schedule(options, optimizer, 10), []
    for _ in range(10):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    cosine = [(1 + math.cos(math.pi * t / 10)) / 2 if anneal else 1.0 for t in range(10)]
    assert found == pytest.approx([0.5 * min(1.0, (t + 1) / 4) * math.exp(-0.01 * t) * cosine[t] for t in range(10)])
    assert rates(options, 10, 10) == pytest.approx(found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"augment": "cutout"}, "unknown augmentation 'cutout': choose one of crop-flip"),
        ({"label_smoothing": 1.0}, "label_smoothing must lie in"),
        ({"label_smoothing": math.nan}, "label_smoothing must lie in"),
        ({"label_smoothing": 0.1, "loss": "mine:loss"}, "belongs to cross-entropy"),
    ],
)
def test_bad_options_are_told(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        dataclasses.replace(RUN, **change)


@pytest.mark.parametrize("steps", [-1, 0.5])
def test_a_warm_up_is_a_whole_number_of_steps(steps: Any) -> None:
    with pytest.raises(UserError, match="warm_up must be a whole number"):
        Optimizer("sgd", 0.1, warm_up=steps)


def test_augmentation_needs_images(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.rand(12, 3), torch.zeros(12, dtype=torch.int64)
    monkeypatch.setattr(builders.import_path, "find", lambda *_: lambda seed: {"train": rows, "test": rows})
    with pytest.raises(UserError, match="needs images"):
        builders.dataset(dataclasses.replace(RUN, data="mine:rows"), torch.device("cpu"))
