"""`ForwardAccelerator`: accelerate's loop without a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Generator, Tensor, nn

from forwardgrad.estimators import Estimate, Estimator
from forwardgrad.integrations.source import GradientSource, LoopLoss, check_accelerator, missing
from forwardgrad.objective import code_of
from forwardgrad.processes import several
from forwardgrad.ranks import Distributed

try:
    from accelerate import Accelerator
except ImportError as error:
    raise missing("ForwardAccelerator", "accelerate", error) from error


class Unwrapping(Accelerator):
    """An `Accelerator` that leaves models unwrapped: DistributedDataParallel averages in a backward pass alone, and here there is none."""

    def prepare_model(self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False) -> Any:
        if self.num_processes == 1 or evaluation_mode:
            return super().prepare_model(model, device_placement, evaluation_mode)
        check_accelerator(self)
        known = any(model is one for one in self._models)
        prepared: Any = model if known else super().prepare_model(model, device_placement, evaluation_mode=True)
        _unmark(prepared)
        if several():
            Distributed().broadcast(prepared)  # as DistributedDataParallel does
        return prepared

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super().prepare(*args, **kwargs)
        if self.num_processes > 1:
            for model in self._models:
                _unmark(model)
        return prepared


def _unmark(model: Any) -> None:
    """An Accelerator that trains the model later has to wrap it, and would leave it as it is if it were marked as prepared."""
    model._is_accelerate_prepared = False


class ForwardAccelerator(Unwrapping):
    """accelerate's `Accelerator` with `estimate_grad_(loss, model)` where its loops have `backward(loss)`.

    All else of the loop stays: `prepare`, `accumulate`, `clip_grad_norm_`, schedulers, bfloat16, `save_state` and `load_state`, which keep
    the estimator's generator and state, too. Several processes estimate together, each from its part of the data (see `Distributed`), and
    `prepare` gives all of them the parameters of the first.

    Args:
        estimator: the method; `ForwardGradient()` if left out.
        seed, generator: where directions are drawn from (see `GradientSource`).
        *args, **kwargs: those of `Accelerator`.
    """

    def __init__(
        self, *args: Any, estimator: Estimator | None = None, seed: int = 0, generator: Generator | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.gradients = GradientSource(estimator, seed=seed, generator=generator)
        self.register_for_checkpointing(self.gradients)

    def estimate_grad_(self, loss: Callable[[nn.Module], Tensor], model: nn.Module) -> Estimate:
        """Add the estimate for one batch to `.grad`: its share, where several batches make a step, as `backward` does.

        The record holds the batch's whole loss, to be logged, and the derivatives of its share: their means over all processes. Raises
        ValueError in float16 and where parameters or examples are divided among processes.
        """
        check_accelerator(self)
        self.gradients.join(self.num_processes)
        parts = self.gradient_accumulation_steps
        record = self.gradients.add_(LoopLoss(lambda model: loss(model) / parts, code_of(loss)), model)
        return replace(record, loss=record.loss * parts)
