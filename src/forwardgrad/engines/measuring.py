"""Steps of several processes in which a graph measures, and the move is made as it is written.

What a graph computes and what Python does have other roundings, and a process may be without a graph where another has one. So that the
parameters stay equal to the bit in all of them, nothing but numbers that are told to one another comes out of a graph.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from forwardgrad.empty import estimated
from forwardgrad.engines.batch import Batch
from forwardgrad.engines.eager import EagerStep
from forwardgrad.engines.graphs import Engine
from forwardgrad.engines.logged import move_by
from forwardgrad.estimators import Estimate, needed, twin
from forwardgrad.objective import Objective
from forwardgrad.ranks import Apart, Distributed
from forwardgrad.recipe import Measured


class MeasuringStep(EagerStep):
    """A step that ends where it knows its loss and its derivatives: those of this process, before it tells them to the others."""

    def gradient(self, batch: Batch) -> Estimate:
        with torch.inference_mode(False), torch.no_grad():
            objective = Objective(self._on(batch), self.model, ranks=Apart(self._ranks))
            record, found = estimated(
                self.estimator, objective, self.state, lambda method, kept: method.measured(objective, self.generator, kept)
            )
        self.note = found.passes
        return record


class Grouped:
    """Takes the steps of a group: `engine` measures, the processes tell one another, and each of them moves by the same code."""

    def __init__(self, step: EagerStep, group: Distributed, engine: type[Engine], limit: float | None) -> None:
        self._step, self._group = step, group
        self._measuring = MeasuringStep(step.loss, step.model, step.optimizer, step.estimator, step.generator, step.state, group)
        self._engine = engine(self._measuring, limit)
        self._why = _reason(step)
        if self._why:
            warnings.warn(f"engine={engine.name!r} falls back to eager steps: {self._why}", stacklevel=4)

    @property
    def preparing(self) -> float:
        """As an engine's."""
        return self._engine.preparing

    @property
    def fallback(self) -> str:
        """As an engine's."""
        return self._why or self._engine.fallback

    def take(self, batch: Batch) -> Estimate:
        """A whole step."""
        if self._why:
            return self._step.eagerly(batch)
        step, generator = self._step, needed(self._step.generator)
        parameters = Objective(lambda model: model, step.model).parameters
        self._group.check(parameters, generator, repr(step.estimator))
        again, records = twin(generator), list[Estimate]()

        def measure() -> tuple[Tensor, Measured]:
            own = self._engine.gradient(batch)
            loss, derivatives = self._group.joined(own.loss, own.derivatives)
            self._group.finished()
            records.append(Estimate(loss, derivatives, own.forward_passes))
            return loss, Measured(self._measuring.note, step.estimator.weigh(derivatives))

        move_by(step.optimizer, parameters, step.estimator, again, measure)
        return records[-1]


def _reason(step: EagerStep) -> str:
    """Why a graph cannot measure for a step, empty where it can."""
    if not step.estimator.told_by_numbers:
        return f"processes of a group average the gradients of {step.estimator!r}, and a graph cannot wait for that"
    try:
        step.estimator.weigh(torch.zeros(1, dtype=torch.float64))
    except ValueError as error:
        return f"{error}, and processes of a group have to tell one another in between"
    if step.generator is not None and step.generator.device.type != "cpu":
        return "directions of a generator on a GPU cannot be drawn again for the move of a group: pass a generator of the CPU"
    return ""
