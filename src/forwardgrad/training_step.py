"""A whole step of training as one call: the estimate of the gradient and the optimizer's move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from forwardgrad.estimators.base import Estimate, Estimator
from forwardgrad.gradient import estimate_grad_
from forwardgrad.objective import Objective


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
        if _descends(self.optimizer):
            return self._descend(batch)
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

    def _descend(self, batch: tuple[Any, ...]) -> Estimate:
        """A step of plain gradient descent: each part of the estimate moves its parameter as it is made, and no gradient is held."""
        with torch.inference_mode(False), torch.no_grad():
            objective = Objective(lambda model: self.loss(model, *batch), self.model)
            record, parts = self.estimator.parts(objective, self.generator, self.state)
            groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
            shrunk = set[int]()
            for name, part in parts:
                p = objective.parameters[name]
                if (group := groups.get(id(p))) is None:
                    continue
                if group["weight_decay"] and id(p) not in shrunk:
                    shrunk.add(id(p))
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                if isinstance(part, Tensor):
                    p.add_(part, alpha=-group["lr"]) if isinstance(group["lr"], float) else p.sub_(part * group["lr"])
                else:
                    part.add_to_(p, -group["lr"])
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # a schedule asks whether the optimizer was there before it
        return record


def _descends(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is θ ← θ(1 − γλ) − γĝ and nothing else, which can be taken part by part."""
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return (
        type(optimizer) is torch.optim.SGD
        and not hooks
        and not any(group["momentum"] or group["maximize"] or group["differentiable"] for group in optimizer.param_groups)
    )
