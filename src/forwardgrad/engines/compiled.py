"""The step as one function made by torch's compiler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from time import monotonic
from typing import Any, ClassVar

import torch
from torch import Tensor

from forwardgrad.calls import Unsurveyed
from forwardgrad.directions import Plan, Unplanned, handed
from forwardgrad.engines.batch import Batch
from forwardgrad.engines.eager import EagerStep
from forwardgrad.engines.graphs import Different, Engine, Run
from forwardgrad.engines.limit import within
from forwardgrad.engines.moves import is_by_parameter, move, rates_by_parameter, settings_of
from forwardgrad.engines.plain_sgd import HeldRates, Rate, descend, has_step_hooks, is_plain_sgd, rates_of, tensors_of
from forwardgrad.engines.reads import Untraceable
from forwardgrad.engines.snapshot import slots
from forwardgrad.engines.step_survey import StepSurvey
from forwardgrad.engines.trace import Traced, as_compiling, trace, without_autocast
from forwardgrad.estimators import Estimate

Function = Callable[..., Sequence[Any]]
_log = logging.getLogger("forwardgrad")


class Compiled(Engine):
    """Steps that torch's compiler made one function of.

    Random numbers, or the seeds that they follow from inside it, are drawn before it, from the same generators in the same order as in
    the eager step. Part of the function is the move of plain SGD (see `plain_sgd`), on a processor that of SGD, Adam and AdamW with all
    their options (see `moves`), and that of optimizers made with `capturable=True` and a tensor for a learning rate: after those `.grad`
    is empty. Others are handed the gradient.
    """

    name: ClassVar[str] = "compile"

    def __init__(self, step: EagerStep, limit: float | None = None) -> None:
        super().__init__(step, limit)
        self._rates, self._began = HeldRates(), 0.0
        self._next: list[Rate] | None = None
        self._settings: Hashable = None

    def _moves(self) -> bool:
        return self._goes_by_rates() or _capturable(self.step.optimizer)

    def _goes_by_rates(self) -> bool:
        """Whether the move is made here, by rates that are inputs of the graph; they are those of the step to come."""
        optimizer = self.step.optimizer
        if is_plain_sgd(optimizer):
            self._next = rates_of(optimizer)
        elif is_by_parameter(optimizer) and _on_cpu(optimizer):
            # Where a schedule changes more than the rate, such as the momentum, a graph would have to be made at every step.
            self._settings = self._settings or settings_of(optimizer)
            self._next = rates_by_parameter(optimizer) if self._settings == settings_of(optimizer) else None
        else:
            self._next = None
        return self._next is not None

    def _pinned(self, survey: StepSurvey, moves: bool) -> Hashable:
        """Which parameters an optimizer moves inside the graph, and the tensors that it does so by."""
        if not moves:
            return None
        optimizer = self.step.optimizer
        moved = tuple(tuple(survey.number_of(p) for p in group["params"]) for group in optimizer.param_groups)
        if is_plain_sgd(optimizer):  # its rates are inputs of the graph, but whether weights decay is written into it
            return moved, tuple(rate.keep is not None for rate in rates_of(optimizer))
        if self._next is not None:
            return moved, settings_of(optimizer), tuple(map(id, slots(optimizer)))
        return moved, tuple(id(tensor) for tensor in (*slots(optimizer), *(group["lr"] for group in optimizer.param_groups)))

    def _function(self, traced: Traced, given: list[Tensor], numbers: list[Tensor], plan: Plan, batch: range) -> Function:
        """What computes the graph from what it is given, and draws for it; only the batch is other tensors at every step."""
        function = self._compiled(traced, [*given, *numbers, *_detached(traced.constants)])
        return lambda *given: function(*given, *plan.again(), *traced.constants)

    def _compiled(self, traced: Traced, inputs: list[Tensor]) -> Function:
        """The compiler's function, or Late where it takes longer than it may."""
        _log.info("engine=%r: traced %d operations in %.1f s, compiling", self.name, len(traced.graph.graph.nodes), self._seconds())
        if self.limit is None:
            function = compiled(traced, inputs)
        else:

            def make() -> Function:
                with torch.no_grad():
                    return compiled(traced, inputs)

            function = within(self.limit - self._seconds(), make)
        _log.info("engine=%r: compiled after %.1f s", self.name, self._seconds())
        return function

    def _seconds(self) -> float:
        return monotonic() - self._began

    def _build(self, survey: StepSurvey, batch: Batch, plan: Plan, moves: bool) -> tuple[Run, torch.dtype]:
        self._began = monotonic()
        if getattr(self.step.estimator, "checkpoint", False):
            raise Untraceable("checkpoint=True computes activations twice on purpose, and a compiler would see to it that it does not")
        if getattr(self.step.estimator, "in_place", False):
            raise Untraceable("in_place=True moves the parameters a block at a time, which no graph does")
        eager, numbers, device = self.step, plan.again(), survey.tensors[0].device
        rates = self._rates.written(self._next, device) if moves and self._goes_by_rates() and self._next is not None else None
        step = _TracedStep(eager, survey, batch, rates, moves)

        def with_numbers() -> list[Tensor]:
            with handed(plan, numbers):
                return step()

        held = tensors_of(rates or [])
        inputs = [*survey.tensors, *held, *numbers]
        try:
            try:
                traced = trace(with_numbers, inputs)
            except Unsurveyed:  # a model may take other calls while it is compiled
                with as_compiling(), torch.no_grad():
                    with_numbers()
                traced = trace(with_numbers, inputs)
        except Unplanned as error:
            raise Different("the random numbers of a step are not drawn the same way twice") from error
        if any(one is not other for one, other in zip(StepSurvey(eager, Batch()).tensors, survey.tensors[: survey.given], strict=True)):
            raise Untraceable("the step puts new tensors in place of the model's")
        changing, taught, passes = range(survey.given, len(survey.tensors)), step.taught, step.passes  # nothing is kept of the first batch
        descends, note = rates is not None, eager.note
        with without_autocast():
            function = self._function(traced, _detached([*survey.tensors, *held]), numbers, plan, changing)

        def run(survey: StepSurvey) -> Estimate:
            with without_autocast():
                now = tensors_of(self._rates.written(self._next or [], device)) if descends else []
                found = function(*survey.tensors, *now)
            clear(eager.optimizer)
            eager.note = note
            for index, gradient in zip(taught, found[2:], strict=True):
                survey.trained[index].grad = gradient
            return Estimate(found[0], found[1], passes)

        return run, traced.lowest


class _TracedStep:
    """The step that is traced: it returns the loss, the derivatives and, unless the optimizer moves in it, the gradients there are."""

    def __init__(self, eager: EagerStep, survey: StepSurvey, batch: Batch, rates: list[Rate] | None, moves: bool) -> None:
        self._eager, self._survey, self._batch, self._rates, self._moves = eager, survey, batch, rates, moves
        self._state = dict(eager.state)
        self.passes, self.taught = 0, list[int]()

    def __call__(self) -> list[Tensor]:
        eager = self._eager
        layerwise = self._rates is not None and eager.estimator.layerwise
        record = eager.layerwise(self._batch, self._rates) if layerwise else eager.gradient(self._batch)
        self.passes = record.forward_passes
        gradients: dict[int, Tensor] = {}
        if layerwise:
            pass
        elif self._rates is not None:
            taught = [p for group in eager.optimizer.param_groups for p in group["params"] if p.grad is not None]
            if is_plain_sgd(eager.optimizer):
                descend(eager.optimizer, ((p, p.grad) for p in taught if p.grad is not None), self._rates)
            else:
                move(eager.optimizer, taught, self._rates)
        elif self._moves:
            eager.optimizer.step()
        else:
            gradients = {index: p.grad for index, p in enumerate(self._survey.trained) if p.grad is not None}
        clear(eager.optimizer)
        for name, kept in self._state.items():  # a graph knows no tensors that come and go
            if eager.state[name] is not kept:
                kept.copy_(eager.state[name])
        eager.state.update(self._state)
        self.taught = list(gradients)
        return [record.loss, record.derivatives, *gradients.values()]


def _detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same memory, without a parameter's claim to a gradient."""
    return [tensor.detach() for tensor in tensors]


def compiled(traced: Traced, inputs: list[Tensor]) -> Function:
    """The graph by the compiler behind `torch.compile`. What the model draws from the global generators keeps its bits."""
    import torch._inductor as inductor  # takes a second to load

    options: dict[str, Any] = {"size_asserts": bool(traced.constants)}  # of all others a survey of the step has seen to that
    if traced.random:
        options["fallback_random"] = True
    function: Function = inductor.compile(traced.graph, inputs, options=options)  # type: ignore[arg-type]
    return function


def _capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of the optimizer reads nothing on the host."""
    groups = optimizer.param_groups
    return not has_step_hooks(optimizer) and all(group.get("capturable") and isinstance(group["lr"], Tensor) for group in groups)


def _on_cpu(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all that is trained lies on the processor, where reading an optimizer's count of steps waits for nothing."""
    return all(p.device.type == "cpu" for group in optimizer.param_groups for p in group["params"])


def clear(optimizer: torch.optim.Optimizer) -> None:
    """As `zero_grad`, in less time."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None
