"""A whole step of training as one call: the estimate of the gradient and the optimizer's move."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Generator, Tensor, nn

from forwardgrad.engines import Batch, EagerStep, Logging
from forwardgrad.estimators import UNREPLAYABLE, Backprop, Estimate, Estimator
from forwardgrad.journal import StepLog
from forwardgrad.optim import Replayed
from forwardgrad.processes import check_processes
from forwardgrad.ranks import Distributed, Ranks
from forwardgrad.sharing import ranks_of

if TYPE_CHECKING:
    from forwardgrad.engines import Engine, Grouped

EngineName = Literal["eager", "compile", "graph"]


class TrainingStep(EagerStep):
    """One call a step: `zero_grad`, `estimate_grad_` and `optimizer.step` together, on request as one compiled or captured graph.

    Formula, bias and variance: those of the estimator. Cost: its forward passes and the optimizer's move.

    Args:
        loss: a function `loss(model, *batch, **named)` that returns a tensor of one element: `lambda model, x, y: loss_fn(model(x), y)`.
        model: the module that is trained.
        optimizer: any `torch.optim` optimizer over its parameters.
        estimator: the method.
        generator: where directions are drawn from; Backprop needs none.
        state: what an estimator remembers from step to step, kept beside the model by the caller; a new one if left out.
        engine: "eager"; "compile": one function made by torch's compiler; "graph": one captured CUDA graph.
        compile_limit: the seconds that a graph may take to be made; None: as long as it takes. What takes longer stays eager (with
            "graph", is captured without the compiler). The logger "forwardgrad" tells how far it is, at level INFO.
        group: processes that take the step together, each with its part of the batch or of the directions (`Distributed`). None: this one
            alone. With "compile" and "graph" it is the measuring that is a graph, and the move is made as it is written, to the same bits
            in every process. Estimators whose gradients are more than a few numbers stay eager.
        log: where the numbers go that each step was taken by, so that `replay` can take the steps again without the data. With the engine
            "eager" and a generator of the CPU alone; the parameters get the bits that they get without it.

    Calling it with a batch, `step(x, y)`, `step(x, y, weights=w)` or `step(**batch)`, takes a step and returns the record of
    `estimate_grad_`.

    A graph stands for Python that no longer runs. It is made in the first step of its kind (in seconds, if compiled): another shape of
    batch, mode of a module, precision of autocast or set of trained parameters has a graph of its own, up to 8. What the loss reads
    besides the model and the batch stays what it was in that step, but for the values of tensors: give what changes as part of the
    batch. Learning rates may change at any time. Directions and the generator's state are those of the eager step, up to rounding.
    Before a graph is used its loss, derivatives, gradient (or the parameters' moves), buffers and state are compared with those of the
    eager step: their norms have to agree to 1e-4 in float32, 1e-8 in float64 and 5e-2 where anything is computed in half precision (with
    `ZerothOrder` plus the rounding of its differences). Where there is no graph to be had, or it differs, one warning says why and
    steps are eager.
    With plain `torch.optim.SGD` (no momentum, `maximize`, `differentiable` or hooks; weight decay may be), every engine moves parameters
    as the estimate is made, and `.grad` is empty after the step. So it is with all of torch's SGD, Adam and AdamW in two cases: where an
    estimator lets layers learn while the pass goes on (`LocalLosses(feedback=True)`), and where "compile" has their arithmetic in its
    function. That is on the CPU, while options but the learning rate stay what they were, and while the parameters of a group have taken
    the same number of Adam's steps. Optimizers that are `capturable` with a tensor for a learning rate move inside graphs, too. Others are
    handed the gradient, and leave it. `ReplayedSGD` and `ReplayedAdam` get seeds and numbers instead, and go with the engine "eager" alone.

    Raises ValueError for an unknown engine, a limit that is no time, an estimator that the optimizer cannot replay or that a log cannot
    hold, and in a step what `estimate_grad_` raises.

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
        engine: EngineName = "eager",
        compile_limit: float | None = None,
        group: Distributed | None = None,
        log: StepLog | None = None,
    ) -> None:
        if compile_limit is not None and not compile_limit > 0:
            raise ValueError(f"compile_limit must be a number of seconds above 0, or None, not {compile_limit!r}")
        if engine not in get_args(EngineName):
            raise ValueError(f"unknown engine {engine!r}: choose one of {', '.join(get_args(EngineName))}")
        if isinstance(optimizer, Replayed):
            _check_replayed(optimizer, estimator, engine)
        super().__init__(loss, model, optimizer, estimator, generator, {} if state is None else state, group)
        self.engine = engine
        if log is not None:
            if engine != "eager":
                raise ValueError("the steps of a log are drawn again, which no graph can: use engine='eager', or no log")
            self.logging = Logging(log, model, optimizer, estimator, generator, ranks_of(group))
        began = perf_counter()
        self._graphs = None if engine == "eager" else _engine(self, engine, compile_limit, ranks_of(group))
        self._take: Callable[[Batch], Estimate] = self.eagerly if self._graphs is None else self._graphs.take
        self._loading = perf_counter() - began

    def __call__(self, *batch: Any, **named: Any) -> Estimate:
        """Take one step on a batch; the loss is called as `loss(model, *batch, **named)`."""
        together, eager = self.group is not None, self.engine == "eager"
        check_processes(self.model, reverse=isinstance(self.estimator, Backprop), eager=eager, together=together)
        return self._take(Batch(batch, named))

    @property
    def preparing(self) -> float:
        """Seconds that went into graphs so far (tracing, compiling, comparing) and into no step; 0 with the engine "eager"."""
        return 0.0 if self._graphs is None else self._loading + self._graphs.preparing

    @property
    def fallback(self) -> str:
        """Why steps are eager that should be graphs; empty where none are."""
        return "" if self._graphs is None else self._graphs.fallback


def _check_replayed(optimizer: Replayed, estimator: Estimator, engine: str) -> None:
    if not estimator.replayable:
        raise ValueError(f"{type(optimizer).__name__} makes estimates again: {UNREPLAYABLE.format(estimator)}")
    if engine != "eager":
        raise ValueError(f"{type(optimizer).__name__} draws the directions of earlier steps again, which no graph can: use engine='eager'")


def _engine(step: EagerStep, name: EngineName, limit: float | None, ranks: Ranks) -> Engine | Grouped:
    """Loaded here, since tracing takes a second to load that an eager step need not wait for."""
    from forwardgrad.engines import Captured, Compiled, Grouped

    kind = Compiled if name == "compile" else Captured
    return Grouped(step, ranks, kind, limit) if isinstance(ranks, Distributed) else kind(step, limit)
