"""Kinds of methods and models that a compiled step has to take as they are, with torch's compiler at work."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.engines.test_engines import OPTIMIZERS, RANK_1, compare, small, uncompiled, whole  # noqa: F401  # a fixture among them
from tests.support.cases import rows
from torch import Tensor, nn

import forwardgrad as fg


def wide() -> nn.Module:
    """As the paper's network, with products large enough for the compiler to join them with what is added to them."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 3))


@pytest.mark.full
@pytest.mark.parametrize(("feedback", "optimizer"), [(True, "sgd"), (False, "adam")], ids=["feedback", "derivative"])
def test_local_losses_are_compiled_as_they_are_written(feedback: bool, optimizer: str) -> None:
    compare(wide, fg.LocalLosses(feedback=feedback), OPTIMIZERS[optimizer], run=whole, graphs=1)


class Encoding(UserDict[str, Tensor]):
    """A batch as a tokenizer returns it."""


@dataclass
class Pair:
    x: Tensor
    weights: Tensor


class Graph:
    """An object of which nobody but its loss knows what is in it."""

    def __init__(self, x: Tensor, weights: Tensor) -> None:
        self.x, self.weights = x, weights


def of_parts(model: nn.Module, batch: Any) -> Tensor:
    x, weights = (batch["x"], batch["weights"]) if hasattr(batch, "keys") else (batch.x, batch.weights)
    return (model(x) * model(weights).tanh()).square().mean() + x.sum()


LARGE = [rows(300, 4, dtype=torch.float32) + index for index in range(3)]  # too large for their texts to differ in the middle
for index, one in enumerate(LARGE):
    one[:4] = one[-4:] = 0.0
    one[150] = index


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "make", [lambda **parts: dict(**parts), lambda **parts: Encoding(parts), Pair], ids=["dict", "encoding", "dataclass"]
)
def test_every_tensor_inside_a_batch_is_read_anew(make: Any) -> None:
    given = [(0, 1), (1, 2), (2, 0), (0, 2)]
    run = lambda step: [step(make(x=LARGE[one], weights=LARGE[other])) for one, other in given]  # noqa: E731
    compare(small, RANK_1, loss=of_parts, run=run, graphs=1)


@pytest.mark.usefixtures("uncompiled")
def test_the_names_in_a_batch_are_part_of_what_a_graph_is_for() -> None:
    def run(step: fg.TrainingStep) -> list[fg.Estimate]:
        one, other = LARGE[:2]
        return [step({"x": one, "weights": other}), step({"weights": one, "x": other}), step(batch={"x": one, "weights": other})]

    compare(small, RANK_1, loss=of_parts, run=run, graphs=3)


@pytest.mark.usefixtures("uncompiled")
def test_a_batch_that_cannot_be_seen_through_makes_steps_eager() -> None:
    with pytest.warns(UserWarning, match="falls back to eager steps: the batch holds a Graph: give tensors, numbers"):
        compare(small, RANK_1, loss=of_parts, run=lambda step: [step(Graph(LARGE[i], LARGE[0])) for i in range(3)], graphs=0, close=0)
