"""The step of training as it is written: fill `.grad`, and let the optimizer move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from forwardgrad.empty import estimated
from forwardgrad.engines.batch import Batch
from forwardgrad.engines.logged import Logging, check_told
from forwardgrad.engines.moves import is_by_parameter, move
from forwardgrad.engines.plain_sgd import Rate, descend, is_plain_sgd
from forwardgrad.estimators import Estimate, Estimator
from forwardgrad.factored import Gradient, dense
from forwardgrad.gradient import estimate_grad_
from forwardgrad.objective import Objective
from forwardgrad.optim import Replayed
from forwardgrad.ranks import Distributed
from forwardgrad.sharing import ranks_of, shared_parts


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
        group: Distributed | None = None,
    ) -> None:
        self.loss, self.model, self.optimizer, self.estimator = loss, model, optimizer, estimator
        self.generator, self.state = generator, state
        self.group, self._ranks = group, ranks_of(group)
        self.note: Any = None  # what the last step found out besides its record, for engines to keep with a graph of it
        self.logging: Logging | None = None

    def gradient(self, batch: Batch) -> Estimate:
        """Fill `.grad` as the eager step does."""
        self.optimizer.zero_grad()
        given: dict[str, Any] = {"generator": self.generator, "state": self.state, "group": self.group}
        return estimate_grad_(self._on(batch), self.model, self.estimator, **given)

    def _on(self, batch: Batch) -> Callable[[nn.Module], Tensor]:
        """The loss on a batch. What is learned of a model is remembered by the code of the loss itself, which is the same at every step."""

        def on(model: nn.Module) -> Tensor:
            return self.loss(model, *batch.positional, **batch.named)

        on.of_code = self.loss  # type: ignore[attr-defined]
        return on

    def eagerly(self, batch: Batch, gradient: Callable[[Batch], Estimate] | None = None) -> Estimate:
        """The eager step, or one whose gradient comes from elsewhere."""
        if self.logging is not None:
            return self.logging.take(self._on(batch), self.state)
        if gradient is None and self._goes_by_layers and (is_plain_sgd(self.optimizer) or is_by_parameter(self.optimizer)):
            return self.layerwise(batch)
        if gradient is None and isinstance(self.optimizer, Replayed):
            return self._follow(batch, self.optimizer)
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

    @property
    def _goes_by_layers(self) -> bool:
        return self.estimator.layerwise and not self._ranks.many  # what processes average has to be there first

    def _descend(self, batch: Batch) -> Estimate:
        """A step of plain gradient descent: each part of the estimate moves its parameter as it is made, and no gradient is held."""
        self.optimizer.zero_grad()
        with torch.inference_mode(False), torch.no_grad():
            objective = Objective(self._on(batch), self.model, ranks=self._ranks)
            record, parts = shared_parts(self.estimator, objective, self.generator, self.state)
            descend(self.optimizer, ((objective.parameters[name], part) for name, part in parts))
        return record

    def _follow(self, batch: Batch, optimizer: Replayed) -> Estimate:
        """A step by seeds and numbers: the optimizer makes this estimate and those before it again, parameter by parameter."""
        optimizer.zero_grad()
        with torch.inference_mode(False), torch.no_grad():
            objective = Objective(self._on(batch), self.model, ranks=self._ranks)
            check_told(self.estimator, self._ranks)
            self._ranks.check(objective.parameters, self.generator, repr(self.estimator))
            record, recipe = estimated(
                self.estimator, objective, self.state, lambda method, kept: method.recipe(objective, self.generator, kept)
            )
            self._ranks.finished()
            optimizer.follow(objective.parameters, recipe)
        return record

    def layerwise(self, batch: Batch, rates: Sequence[Rate] | None = None) -> Estimate:
        """A step in which layers move while the pass goes on, and no gradient is left. `rates` as in `move` and `descend`."""
        self.optimizer.zero_grad()
        plain = is_plain_sgd(self.optimizer)
        with torch.inference_mode(False), torch.no_grad():
            objective = Objective(self._on(batch), self.model, batch.tensors())

            def moved(gradients: Mapping[str, Gradient]) -> None:
                named = [(objective.parameters[name], gradient) for name, gradient in gradients.items()]
                if plain:
                    descend(self.optimizer, named, rates)
                    return
                for p, gradient in named:
                    p.grad = dense(gradient).to(p.dtype)
                move(self.optimizer, [p for p, _ in named], rates)

            def learned(method: Estimator, kept: dict[str, Tensor]) -> tuple[Estimate, Mapping[str, Tensor | None]]:
                if method.layerwise:
                    return method.learn(objective, self.generator, kept, moved), {}
                return method.estimate(objective, self.generator, kept)  # without examples, where the loss may turn out to have no value

            record, late = estimated(self.estimator, objective, self.state, learned)
            if late:
                moved({name: gradient for name, gradient in late.items() if gradient is not None})
        return record
