"""A whole step of training as one call: the estimate of the gradient and the optimizer's move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from forwardgrad.estimators.base import Estimate, Estimator
from forwardgrad.gradient import estimate_grad_


class TrainingStep:
    """One call a step: `zero_grad`, `estimate_grad_` and `optimizer.step` together.

    Formula, bias and variance: those of the estimator. Cost: its forward passes and the optimizer's move.

    Args:
        loss: a function `loss(model, *batch)` that returns a tensor of one element: `lambda model, x, y: loss_fn(model(x), y)`.
        model: the module that is trained.
        optimizer: any `torch.optim` optimizer over its parameters.
        estimator: the method.
        generator: where directions are drawn from; Backprop needs none.
        state: what an estimator remembers from step to step, kept beside the model by the caller; a new one if left out.

    Calling it with a batch, `step(x, y)`, takes a step and returns the record of `estimate_grad_`.

    >>> model, generator = torch.nn.Linear(2, 1), torch.Generator().manual_seed(0)
    >>> from forwardgrad import Backprop
    >>> step = TrainingStep(lambda m, x: m(x).sum(), model, torch.optim.SGD(model.parameters(), lr=0.1), Backprop())
    >>> step(torch.ones(3, 2)).forward_passes
    1
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        estimator: Estimator,
        *,
        generator: Generator | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> None:
        self.loss, self.model, self.optimizer, self.estimator = loss, model, optimizer, estimator
        self.generator, self.state = generator, {} if state is None else state

    def __call__(self, *batch: Any) -> Estimate:
        """Take one step on a batch."""
        record: list[Estimate] = []

        def closure() -> Tensor:  # an optimizer may look ahead: it moves the parameters, and then asks
            self.optimizer.zero_grad()
            found = estimate_grad_(
                lambda model: self.loss(model, *batch), self.model, self.estimator, generator=self.generator, state=self.state
            )
            record.append(found)
            return found.loss

        self.optimizer.step(closure)  # type: ignore[arg-type]
        return record[-1]
