"""A whole step of training as one call: the estimate of the gradient and the optimizer's move."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Generator, Tensor, nn

from forwardgrad.engines import Batch, EagerStep
from forwardgrad.estimators import Backprop, Estimate, Estimator
from forwardgrad.processes import check_processes

if TYPE_CHECKING:
    from forwardgrad.engines import Engine

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
    as the estimate is made, and `.grad` is empty after the step. Other optimizers are handed the gradient (with "graph" they too are
    captured where they are `capturable` and their learning rate is a tensor).

    Raises ValueError for an unknown engine or a limit that is no time, and in a step what `estimate_grad_` raises.

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
    ) -> None:
        if compile_limit is not None and not compile_limit > 0:
            raise ValueError(f"compile_limit must be a number of seconds above 0, or None, not {compile_limit!r}")
        if engine not in get_args(EngineName):
            raise ValueError(f"unknown engine {engine!r}: choose one of {', '.join(get_args(EngineName))}")
        super().__init__(loss, model, optimizer, estimator, generator, {} if state is None else state)
        self.engine = engine
        self._take: Callable[[Batch], Estimate] = self.eagerly if engine == "eager" else _engine(self, engine, compile_limit).take

    def __call__(self, *batch: Any, **named: Any) -> Estimate:
        """Take one step on a batch; the loss is called as `loss(model, *batch, **named)`."""
        check_processes(self.model, reverse=isinstance(self.estimator, Backprop), eager=self.engine == "eager")
        return self._take(Batch(batch, named))


def _engine(step: EagerStep, name: EngineName, limit: float | None) -> Engine:
    """Loaded here, since tracing takes a second to load that an eager step need not wait for."""
    from forwardgrad.engines import Captured, Compiled

    return Compiled(step, limit) if name == "compile" else Captured(step, limit)
