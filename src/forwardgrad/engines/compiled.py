"""The step as a compiled graph."""

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
from forwardgrad.engines.graphs import Different, Engine, Run
from forwardgrad.engines.limit import within
from forwardgrad.engines.pieces import Pieces, Survey, slots
from forwardgrad.engines.reads import Untraceable
from forwardgrad.engines.trace import Traced, as_compiling, trace, without_autocast
from forwardgrad.estimators import Estimate

Function = Callable[..., Sequence[Any]]
_log = logging.getLogger("forwardgrad")


class Compiled(Engine):
    """Steps that torch's compiler made one function of.

    Random numbers, or the seeds that they follow from inside it, are drawn before it, from the same generators in the same order as in
    the eager step. Part of the function is the move of `torch.optim.SGD` without momentum or weight decay, after which `.grad` is empty,
    and that of optimizers made with `capturable=True` and a tensor for a learning rate. Others are handed the gradient.
    """

    name: ClassVar[str] = "compile"

    def __init__(self, pieces: Pieces, limit: float | None = None) -> None:
        super().__init__(pieces, limit)
        self._rates, self._began = _Rates(), 0.0

    def _moves(self) -> bool:
        return plain_sgd(self.pieces.optimizer) or _capturable(self.pieces.optimizer)

    def _pinned(self, survey: Survey, moves: bool) -> Hashable:
        """Which parameters an optimizer moves inside the graph, and the tensors that it does so by."""
        if not moves:
            return None
        optimizer = self.pieces.optimizer
        moved = tuple(tuple(survey.number_of(p) for p in group["params"]) for group in optimizer.param_groups)
        if plain_sgd(optimizer):
            return moved
        return moved, tuple(id(tensor) for tensor in (*slots(optimizer), *(group["lr"] for group in optimizer.param_groups)))

    def _function(self, traced: Traced, given: list[Tensor], numbers: list[Tensor], plan: Plan, batch: range) -> Function:
        """What computes the graph from what it is given, and draws for it; only the batch is other tensors at every step."""
        function = self._compiled(traced, [*given, *numbers, *_plain(traced.constants)])
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

    def _build(self, survey: Survey, batch: Batch, plan: Plan, moves: bool) -> tuple[Run, torch.dtype]:
        self._began = monotonic()
        if getattr(self.pieces.estimator, "checkpoint", False):
            raise Untraceable("checkpoint=True computes activations twice on purpose, and a compiler would see to it that it does not")
        pieces, numbers, device = self.pieces, plan.again(), survey.tensors[0].device
        descends = moves and plain_sgd(pieces.optimizer)
        rates = self._rates.now(pieces.optimizer, device) if descends else []
        step = _Step(self.pieces, survey, batch, rates, moves)

        def with_numbers() -> list[Tensor]:
            with handed(plan, numbers):
                return step()

        inputs = [*survey.tensors, *rates, *numbers]
        try:
            try:
                traced = trace(with_numbers, inputs)
            except Unsurveyed:  # a model may take other calls while it is compiled
                with as_compiling(), torch.no_grad():
                    with_numbers()
                traced = trace(with_numbers, inputs)
        except Unplanned as error:
            raise Different("the random numbers of a step are not drawn the same way twice") from error
        if any(one is not other for one, other in zip(Survey(pieces, Batch()).tensors, survey.tensors[: survey.given], strict=True)):
            raise Untraceable("the step puts new tensors in place of the model's")
        changing, taught, passes = range(survey.given, len(survey.tensors)), step.taught, step.passes  # nothing is kept of the first batch
        with without_autocast():
            function = self._function(traced, _plain([*survey.tensors, *rates]), numbers, plan, changing)

        def run(survey: Survey) -> Estimate:
            with without_autocast():
                now = self._rates.now(pieces.optimizer, device) if descends else []
                found = function(*survey.tensors, *now)
            clear(pieces.optimizer)
            for index, gradient in zip(taught, found[2:], strict=True):
                survey.trained[index].grad = gradient
            return Estimate(found[0], found[1], passes)

        return run, traced.lowest


class _Step:
    """The step that is traced: it returns the loss, the derivatives and, unless the optimizer moves in it, the gradients there are."""

    def __init__(self, pieces: Pieces, survey: Survey, batch: Batch, rates: list[Tensor], moves: bool) -> None:
        self._pieces, self._survey, self._batch, self._rates, self._moves = pieces, survey, batch, rates, moves
        self._state = dict(pieces.state)
        self.passes, self.taught = 0, list[int]()

    def __call__(self) -> list[Tensor]:
        pieces = self._pieces
        record = pieces.gradient(self._batch)
        self.passes = record.forward_passes
        gradients: dict[int, Tensor] = {}
        if self._rates:
            _descend(pieces.optimizer, self._rates)
        elif self._moves:
            pieces.optimizer.step()
        else:
            gradients = {index: p.grad for index, p in enumerate(self._survey.trained) if p.grad is not None}
        clear(pieces.optimizer)
        for name, kept in self._state.items():  # a graph knows no tensors that come and go
            if pieces.state[name] is not kept:
                kept.copy_(pieces.state[name])
        pieces.state.update(self._state)
        self.taught = list(gradients)
        return [record.loss, record.derivatives, *gradients.values()]


def _plain(tensors: Sequence[Tensor]) -> list[Tensor]:
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


class _Rates:
    """The learning rates of an optimizer as tensors, written to only when one has changed."""

    def __init__(self) -> None:
        self._last: list[tuple[float, Tensor]] = []

    def now(self, optimizer: torch.optim.Optimizer, device: torch.device) -> list[Tensor]:
        for index, group in enumerate(optimizer.param_groups):
            rate = float(group["lr"])
            if index == len(self._last):
                self._last.append((rate, torch.full((), rate, dtype=torch.float64, device=device)))
            elif rate != self._last[index][0]:
                self._last[index] = rate, self._last[index][1].fill_(rate)
        return [tensor for _, tensor in self._last]


def plain_sgd(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer does nothing but θ ← θ − γ g, with numbers for its learning rates."""
    if type(optimizer) is not torch.optim.SGD or _watched(optimizer):
        return False
    extras = ("momentum", "weight_decay", "maximize", "differentiable", "fused")
    return not any(isinstance(group["lr"], Tensor) or any(group.get(extra) for extra in extras) for group in optimizer.param_groups)


def _capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of the optimizer reads nothing on the host."""
    groups = optimizer.param_groups
    return not _watched(optimizer) and all(group.get("capturable") and isinstance(group["lr"], Tensor) for group in groups)


def _watched(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def clear(optimizer: torch.optim.Optimizer) -> None:
    """As `zero_grad`, in less time."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


@torch.no_grad()
def _descend(optimizer: torch.optim.Optimizer, rates: list[Tensor]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        for p in group["params"]:
            if p.grad is not None:
                p.sub_(p.grad * rate)
