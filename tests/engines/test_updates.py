"""Updates of weight matrices by a product are one product that adds, and everything else is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from forwardgrad.engines.updates import fold_updates

ADDS = torch.ops.forwardgrad.add_product_.default


def traced(write: object, shape: tuple[int, int] = (512, 256)) -> tuple[GraphModule, list[Tensor]]:
    """The graph of a function of a weight, two factors and a rate, and such tensors."""
    generator = torch.Generator().manual_seed(0)
    weight, left, right = (torch.randn(size, generator=generator) for size in (shape, (shape[0], 8), (8, shape[1])))
    inputs = [weight, left, right, torch.tensor(0.1, dtype=torch.float64)]
    return make_fx(write)(*inputs), inputs  # type: ignore[arg-type]


def update(weight: Tensor, left: Tensor, right: Tensor, rate: Tensor) -> Tensor:
    read = weight.sum(1)
    weight.copy_(weight - (left @ right) * rate)
    return read


def read_behind(weight: Tensor, left: Tensor, right: Tensor, rate: Tensor) -> Tensor:
    moved = weight - (left @ right) * rate
    read = (weight * 2).sum(0)
    weight.copy_(moved)
    return read


def added(weight: Tensor, left: Tensor, right: Tensor, rate: Tensor) -> Tensor:
    weight.copy_(weight.view(len(left), -1).addmm(left * rate, right))
    return rate


def asked_for(weight: Tensor, left: Tensor, right: Tensor, rate: Tensor) -> Tensor:
    gradient = left @ right
    weight.copy_(weight - gradient * rate)
    return gradient


def decayed(weight: Tensor, left: Tensor, right: Tensor, rate: Tensor) -> Tensor:
    weight.copy_(weight * 0.9 - (left @ right) * rate)
    return rate


@pytest.mark.parametrize(("write", "folds"), [(update, 1), (read_behind, 1), (added, 1), (asked_for, 0), (decayed, 0)])
def test_an_update_is_folded_where_nothing_else_asks_for_the_gradient_and_gives_the_same(write: object, folds: int) -> None:
    graph, inputs = traced(write)
    wanted = [t.clone() for t in inputs]
    result = graph(*wanted)
    fold_updates(graph)
    assert sum(node.target is ADDS for node in graph.graph.nodes) == folds
    torch.testing.assert_close(graph(*inputs), result)
    torch.testing.assert_close(inputs[0], wanted[0])


def test_small_and_transposed_weights_are_left_alone() -> None:
    graph, _ = traced(update, (64, 32))
    fold_updates(graph)
    assert not any(node.target is ADDS for node in graph.graph.nodes)
    weight = torch.zeros(256, 512).t()
    graph = make_fx(update)(weight, torch.ones(512, 8), torch.ones(8, 256), torch.tensor(0.1))
    fold_updates(graph)
    assert not any(node.target is ADDS for node in graph.graph.nodes)
