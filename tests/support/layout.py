"""What the cases of `layouts` are made of: a case, a model with its forward pass as a function, and losses of its outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tests.support.cases import rows
from torch import Tensor, nn

Loss = Callable[[nn.Module], Tensor]
Build = Callable[[], tuple[nn.Module, Loss]]
N, D, H, C, T, P = 4, 6, 5, 3, 7, 2  # examples, inputs, hidden units, classes, positions, patches
LABELS = torch.tensor([0, 2, 1, 0])


@dataclass(frozen=True)
class Layout:
    """One case.

    `examples_apart`: whether the loss is a sum of terms that each depend on the inputs of one example alone; None where there is but one.
    `shared`: whether some layer's output serves all examples (positions, a common context), so that moving it moves every term.
    """

    name: str
    make: Build
    examples_apart: bool | None
    shared: bool = False

    def build(self) -> tuple[nn.Module, Loss]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2022)
            model, loss = self.make()
            return model.double(), loss

    def __str__(self) -> str:
        return self.name


def perceptron(inputs: int = D, outputs: int = C) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, H), nn.ReLU(), nn.Linear(H, outputs))


def sequence() -> Tensor:
    return rows(T, N, D)  # time first


class Steps(nn.Module):
    """Layers by name, and a forward pass that is given as a function of them."""

    def __init__(self, walk: Callable[[Steps, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.walk = walk

    def forward(self, x: Tensor) -> Tensor:
        return self.walk(self, x)


def classified(model: nn.Module, x: Tensor) -> tuple[nn.Module, Loss]:
    return model, lambda m: F.cross_entropy(m(x), LABELS)


def embedded(score: Callable[[Tensor], Tensor], inputs: Tensor | None = None) -> tuple[nn.Module, Loss]:
    """A loss of the embeddings z [N, C] of a batch, which may compare them."""
    x = rows(N, D) if inputs is None else inputs
    return perceptron(), lambda m: score(m(x))


def scored(score: Callable[[nn.Module, Tensor], Tensor]) -> tuple[nn.Module, Loss]:
    """A loss of the outputs [N, C] of independent examples."""
    return perceptron(), lambda m: score(m, m(rows(N, D)))


def cases() -> tuple[Callable[..., Callable[[Build], Build]], list[Layout]]:
    """A decorator for functions that build a case, and the list that it fills."""
    found: list[Layout] = []

    def case(apart: bool | None, name: str = "", *, shared: bool = False) -> Callable[[Build], Build]:
        def add(make: Build) -> Build:
            found.append(Layout(name or make.__name__, make, apart, shared))
            return make

        return add

    return case, found
