"""`ForwardAccelerator`: accelerate's loop without a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Generator, Tensor, nn

from forwardgrad.estimators import Estimate, Estimator
from forwardgrad.integrations.source import GradientSource, LoopLoss, check_accelerator, missing
from forwardgrad.objective import code_of

try:
    from accelerate import Accelerator
except ImportError as error:
    raise missing("ForwardAccelerator", "accelerate", error) from error


class ForwardAccelerator(Accelerator):
    """accelerate's `Accelerator` with `estimate_grad_(loss, model)` where its loops have `backward(loss)`.

    All else of the loop stays: `prepare`, `accumulate`, `clip_grad_norm_`, schedulers, bfloat16, `save_state` and `load_state`, which keep
    the estimator's generator and state, too.

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

        The record holds the batch's whole loss, to be logged, and the derivatives of its share. Raises ValueError in float16 and where the
        parameters are sharded.
        """
        check_accelerator(self)
        parts = self.gradient_accumulation_steps
        record = self.gradients.add_(LoopLoss(lambda model: loss(model) / parts, code_of(loss)), model)
        return replace(record, loss=record.loss * parts)
