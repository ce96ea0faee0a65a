"""Steps in which blocks learn while the pass goes on, beside steps of the whole model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import seeded
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.calls.passes import _Early

Optimizers = Callable[[nn.Module], torch.optim.Optimizer]
CLASSES = 3


class Whole(fg.LocalLosses):
    """The same method, whose gradients all wait for the loss."""

    layerwise = False  # type: ignore[assignment]


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES)]
    return nn.Sequential(*layers).double()


def batch(number: int, count: int = 12) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(count, 6, generator=generator, dtype=torch.float64), torch.randint(CLASSES, (count,), generator=generator)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def still(number: int, step: fg.TrainingStep) -> None:
    """Nothing happens between steps."""


@dataclass
class Taken:
    """Steps that were taken: their records, what they warned of, and in how many of them a block learned before the loss was there."""

    step: fg.TrainingStep
    records: list[fg.Estimate]
    said: list[str]
    early: int

    def numbers(self) -> dict[str, Any]:
        """All that steps change, and what they tell."""
        found: dict[str, Any] = {name: t.clone() for name, t in self.step.model.state_dict().items()}
        found |= {f"state {name}": t.clone() for name, t in self.step.state.items()}
        found |= {
            f"optimizer {index} {name}": torch.as_tensor(value).double()
            for index, slots in self.step.optimizer.state_dict()["state"].items()
            for name, value in slots.items()
            if value is not None
        }
        found["losses"] = torch.stack([record.loss for record in self.records])
        found["passes"] = torch.tensor([record.forward_passes for record in self.records])
        assert self.step.generator is not None
        found["generator"] = self.step.generator.get_state()
        return found

    @property
    def empty(self) -> bool:
        return all(p.grad is None for p in self.step.model.parameters())


def take(
    make: Callable[[], nn.Module] = perceptron,
    optimizer: Optimizers = adam,
    *,
    whole: bool = False,
    steps: int = 6,
    loss: Callable[..., Tensor] = loss,
    batch: Callable[[int], tuple[Any, ...]] = batch,
    between: Callable[[int, fg.TrainingStep], None] = still,
    engine: Any = "eager",
    **options: Any,
) -> Taken:
    model = make()
    method = (Whole if whole else fg.LocalLosses)(feedback=True, **options)
    step = fg.TrainingStep(loss, model, optimizer(model), method, generator=seeded(1), state={}, engine=engine)
    torch.manual_seed(7)
    counts, records, early = list[int](), list[fg.Estimate](), _Early.__call__

    def counted(self: _Early, *args: Any) -> None:
        early(self, *args)
        counts.append(self.learned)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        patch.setattr(_Early, "__call__", counted)
        for number in range(steps):
            between(number, step)
            records.append(step(*batch(number)))
    told = [str(one.message) for one in said if not issubclass(one.category, DeprecationWarning)]
    return Taken(step, records, told, sum(count == 1 for count in counts))


def both(make: Callable[[], nn.Module] = perceptron, optimizer: Optimizers = adam, **options: Any) -> tuple[Taken, Taken]:
    """Steps layer by layer, and eager ones of the whole model from the same start."""
    one = take(make, optimizer, **options)
    options.pop("engine", None)
    return one, take(make, optimizer, whole=True, **options)


def same(one: Taken, other: Taken, close: float = 0.0) -> None:
    """All of both the same: to the bit, or this close."""
    found, wanted = one.numbers(), other.numbers()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=close, atol=close, msg=lambda text, name=name: f"{name}: {text}")  # type: ignore[misc]
