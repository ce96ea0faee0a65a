"""Values read off tensors while a step is traced: taken where they are the same at every step, told with their place everywhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.engines.test_engines import RANK_1, X, Y, compare, loss, uncompiled  # noqa: F401  # a fixture among them
from tests.support.cases import rows
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.engines.reads import Untraceable
from forwardgrad.engines.trace import trace


class Rotating(nn.Module):
    """Positions that a model counts by itself, and looks at, as a Llama whose frequencies follow from the length does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(len(x)).unsqueeze(0)
        length = torch.max(positions) + 1
        base = 10.0 * float(length) if length > 10 else 10.0
        return self.layer(x * torch.cos(positions.T / base))


class Masked(nn.Module):
    """Attention that looks whether all of a mask is set."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if mask.all():
            return x
        return x * mask


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(4, 3)
        self.blocks = nn.ModuleList([Masked()])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layer(self.blocks[0](x, mask))


@pytest.mark.usefixtures("uncompiled")
def test_positions_that_a_model_counts_by_itself_may_be_read() -> None:
    compare(Rotating, RANK_1, loss=loss, run=lambda step: [step(X, Y), step(X, Y), step(X[:6], Y[:6]), step(X[:6], Y[:6])], graphs=2)


@pytest.mark.usefixtures("uncompiled")
def test_where_a_value_of_the_batch_is_read_is_told_with_its_module() -> None:
    def masked(model: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        return model(x, mask).square().mean()

    def run(step: fg.TrainingStep) -> list[fg.Estimate]:
        ones = torch.ones(12, 1)
        return [step(X, ones), step(X, ones), step(X, 0 * ones)]

    place = r"a value is read off a tensor .* at engines/test_reads\.py:\d+ in blocks\.0 \(Masked\): `if mask\.all\(\):`; give the loss"
    with pytest.warns(UserWarning, match=place):
        compare(Nested, RANK_1, loss=masked, run=run, graphs=0, close=0)


def fresh_and_written(x: Tensor) -> Tensor:
    counted = torch.zeros(3)
    view = counted[:1]
    view.copy_(x[:1])
    return x * counted.sum().item()


def written_by_view_before(x: Tensor) -> Tensor:
    counted = torch.zeros(3)
    last = counted[2:]
    counted.copy_(x[:3])
    return x * last.item()


WEIGHT = torch.ones(3)


@pytest.mark.parametrize(
    "function",
    [
        fresh_and_written,
        written_by_view_before,
        lambda x: x * torch.rand(3).max().item(),
        lambda x: x * torch.zeros(3).bernoulli_().sum().item(),
        lambda x: x * WEIGHT.sum().item(),
        lambda x: x * torch.zeros_like(x).add(x).sum().item(),
        lambda x: x if torch.equal(torch.arange(4).to(x.dtype), x) else -x,
        lambda x: x[torch.arange(4) < x.sum()],
    ],
    ids=["written", "seen from a view", "random", "random in place", "from elsewhere", "from the input", "equal", "mask"],
)
def test_what_may_change_is_never_read(function: Callable[[Tensor], Tensor]) -> None:
    x = rows(4)
    with pytest.raises(Untraceable, match=r" at engines/test_reads\.py:\d+"):
        trace(lambda: [function(x)], [x])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.arange(4).max().item(),
        lambda x: x * torch.full((), 3.0).add_(2).item(),
        lambda x: x if torch.equal(torch.arange(len(x)), torch.arange(4)) else -x,
    ],
    ids=["counted", "in place", "equal"],
)
def test_what_follows_from_numbers_alone_is_read(function: Callable[[Tensor], Tensor]) -> None:
    x, other = rows(4), rows(4) + 1
    found = trace(lambda: [function(x)], [x])
    assert torch.equal(found.graph(other, *found.constants)[0], function(other))
