"""`ForwardLightningModule`: a Lightning module whose gradients need no backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Generator, Tensor

from forwardgrad.estimators import Estimator
from forwardgrad.integrations.listening import Listener, estimating
from forwardgrad.integrations.source import GradientSource, LoopLoss, check_scaler, missing
from forwardgrad.processes import several

try:
    from lightning.pytorch import LightningModule
except ImportError as error:
    raise missing("ForwardLightningModule", "lightning", error) from error

KEY = "forwardgrad"  # in a checkpoint


class ForwardLightningModule(LightningModule):
    """`LightningModule` with an estimate of the gradient in place of the backward pass. Its `training_step` returns the loss, as ever.

    Lightning's Trainer does the rest: accumulation, clipping, schedulers, bfloat16, evaluation, checkpoints, which hold the estimator's
    generator and state. An estimate may run `training_step` several times: what its last run logs counts. A module of another kind becomes
    one as `class Mine(ForwardLightningModule, Theirs)`. Hooks for checkpoints that you override have to call `super()`.
    Several processes train it together under `ForwardStrategy`.

    Args:
        estimator: the method; `ForwardGradient()` if left out.
        seed, generator: where directions are drawn from (see `GradientSource`).
    """

    def __init__(
        self, *args: Any, estimator: Estimator | None = None, seed: int = 0, generator: Generator | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.gradients = GradientSource(estimator, seed=seed, generator=generator)
        self._listener: Listener | None = None  # while an estimate is made
        self._estimates: list[tuple[Tensor, Tensor]] | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.training_step is not LightningModule.training_step and not hasattr(cls.training_step, "estimates"):
            cls.training_step = estimating(cls.training_step)

    def _estimate(self, step: Callable[[], Any], code: Any) -> Any:
        """What `training_step` returns in training; the gradients wait for `backward`, as Lightning clears old ones only then."""
        if not self.automatic_optimization:
            raise ValueError("in manual optimization call forwardgrad.estimate_grad_ where manual_backward stands, in a LightningModule")
        check_scaler(getattr(self.trainer.precision_plugin, "scaler", None))
        if (strategy := self.trainer.strategy).model is not self:
            raise ValueError(
                f"{type(strategy).__name__} wraps the module for a backward pass, and here there is none: give the Trainer "
                "strategy=forwardgrad.integrations.ForwardStrategy(), or devices=1"
            )
        self.gradients.join(self.trainer.world_size)
        parts = self.trainer.accumulate_grad_batches
        self._listener = listener = Listener()
        try:
            loss = LoopLoss(lambda _: listener.listened(step) / parts, code)
            record, self._estimates = self.gradients.apart(loss, self, keep=parts > 1)
        finally:
            self._listener = None
        for log in listener.logs(record.loss * parts):
            self.log(*log.args, **log.kwargs)
        return listener.output(record.loss * parts)

    def log(self, *args: Any, **kwargs: Any) -> None:
        super().log(*args, **kwargs) if self._listener is None else self._listener.log(*args, **kwargs)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self._estimates is None:
            if several():
                raise RuntimeError("training_step made no estimate, and nobody would average its backward pass over the processes")
            super().backward(loss, *args, **kwargs)
        for p, estimate in self._estimates or ():
            p.grad = estimate if p.grad is None else p.grad + estimate
        self._estimates = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self.gradients.compare(self)  # every process is here, and one of them saves for all
        checkpoint[KEY] = self.gradients.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if KEY in checkpoint:
            self.gradients.load_state_dict(checkpoint[KEY])
