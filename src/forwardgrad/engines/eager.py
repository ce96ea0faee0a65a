"""The step of training as it is written: fill `.grad`, and let the optimizer move."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from forwardgrad.empty import estimated
from forwardgrad.engines.batch import Batch
from forwardgrad.engines.plain_sgd import descend, is_plain_sgd
from forwardgrad.estimators import Estimate, Estimator
from forwardgrad.gradient import estimate_grad_
from forwardgrad.objective import Objective


class EagerStep:
    """A loss, a model, its optimizer, an estimator, a generator and a state: all of a step but the batch; and how they take it."""

    def __init__(
        self,
        loss: Callable[..., Tensor],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        estimator: Estimator,
        generator: Generator | None,
        state: dict[str, Tensor],
    ) -> None:
        self.loss, self.model, self.optimizer, self.estimator = loss, model, optimizer, estimator
        self.generator, self.state = generator, state

    def gradient(self, batch: Batch) -> Estimate:
        """Fill `.grad` as the eager step does."""
        self.optimizer.zero_grad()
        return estimate_grad_(self._on(batch), self.model, self.estimator, generator=self.generator, state=self.state)

    def _on(self, batch: Batch) -> Callable[[nn.Module], Tensor]:
        """The loss on a batch: one function for all, since what is learned of a model is remembered by the code of its loss."""
        return lambda model: self.loss(model, *batch.positional, **batch.named)

    def eagerly(self, batch: Batch, gradient: Callable[[Batch], Estimate] | None = None) -> Estimate:
        """The eager step, or one whose gradient comes from elsewhere."""
        if gradient is None and is_plain_sgd(self.optimizer):
            return self._descend(batch)
        record: list[Estimate] = []

        def closure() -> Tensor:  # an optimizer may look ahead: it moves the parameters, and then asks
            record.append((gradient or self.gradient)(batch))
            return record[-1].loss

        self.optimizer.step(closure)  # type: ignore[arg-type]
        if not record:
            name = type(self.optimizer).__name__
            raise TypeError(f"{name}.step did not call the closure that it was given: call it first, as torch's own optimizers do")
        return record[-1]

    def _descend(self, batch: Batch) -> Estimate:
        """A step of plain gradient descent: each part of the estimate moves its parameter as it is made, and no gradient is held."""
        self.optimizer.zero_grad()
        with torch.inference_mode(False), torch.no_grad():
            objective = Objective(self._on(batch), self.model)
            record, parts = estimated(
                self.estimator, objective, self.state, lambda method, kept: method.parts(objective, self.generator, kept)
            )
            descend(self.optimizer, ((objective.parameters[name], part) for name, part in parts))
        return record
