"""Runs in bfloat16: what changes, what stays in float32, and that nothing is lost on the way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.interrupted import killed_and_resumed
from torch import nn

from forwardgrad.lab import store
from forwardgrad.lab.data.splits import Dataset, Split
from forwardgrad.lab.studies.run import Optimizer, Run
from forwardgrad.lab.training import evaluation, loop, precision

LOCAL = {"name": "local", "feedback": True, "head": "pooled", "cells": 2}
METHODS = [{"name": "backprop"}, LOCAL]
SMALL = "vgg8b-w32"  # convolutions with few channels: some processors take seconds for a step with many in bfloat16


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Ten bright places on dark images of MNIST's size, in place of every data set."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(320) % 10
    pixels = torch.randint(0, 60, (320, 1, 28, 28), dtype=torch.uint8, generator=generator)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[0, 5 * (label // 2) + 3 : 5 * (label // 2) + 7, 14 * (label % 2) + 4 : 14 * (label % 2) + 9] = 255
    cuts = [Split(pixels[start:stop], labels[start:stop]) for start, stop in ((0, 192), (192, 256), (256, 320))]
    dataset = Dataset("mnist", 10, *cuts)
    monkeypatch.setattr("forwardgrad.lab.data.load", lambda *_: dataset)
    return dataset


def made(method: dict[str, Any], kind: Any = "bfloat16", epochs: int = 3, model: str = SMALL) -> Run:
    return Run("mnist", model, method, Optimizer("adam", 3e-3, anneal=True), epochs, precision=kind)


@pytest.mark.parametrize("method", [METHODS[0], *(pytest.param(method, marks=pytest.mark.full) for method in METHODS[1:])], ids=str)
def test_a_network_learns_in_bfloat16(tmp_path: Path, images: Dataset, method: dict[str, Any]) -> None:
    results = {kind: loop.train(made(method, kind, 30, "mlp"), tmp_path / kind) for kind in ("float32", "bfloat16")}
    assert all(result["test"]["accuracy"] > 0.9 for result in results.values())
    first = [store.read_table(tmp_path / kind / "losses.csv.gz")["loss"][0] for kind in results]
    assert first[0] != first[1]
    assert first[0] == pytest.approx(first[1], abs=0.01)  # the same network on the same batch, in 8 bits instead of 24


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_a_killed_run_goes_on_to_the_same_bits(
    tmp_path: Path, images: Dataset, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any]
) -> None:
    run = made(method)
    loop.train(run, tmp_path / "undisturbed")
    killed_and_resumed(run, tmp_path / "killed", monkeypatch, step=4)
    for name in ("losses.csv.gz", "walk.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_layers_compute_in_bfloat16_and_parameters_and_losses_do_not(images: Dataset) -> None:
    model = precision.arranged(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 10)), "bfloat16")
    seen: list[torch.dtype] = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    losses, _ = evaluation.losses_of(model, images, images.test, "bfloat16")
    assert seen == [torch.bfloat16]
    assert losses.dtype == torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    plain, _ = evaluation.losses_of(model, images, images.test)
    torch.testing.assert_close(losses, plain, rtol=0.05, atol=0.02)
    assert not torch.equal(losses, plain)
