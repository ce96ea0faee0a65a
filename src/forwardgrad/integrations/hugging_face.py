"""`ForwardTrainer`: Hugging Face's Trainer without a backward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from forwardgrad.estimators import Estimator
from forwardgrad.integrations.source import GradientSource, LoopLoss, check_accelerator, missing

try:
    from transformers import Trainer

    from forwardgrad.integrations.accelerated import Unwrapping
except ImportError as error:
    raise missing("ForwardTrainer", "hf", error) from error

FILE = "forwardgrad.pt"  # beside the optimizer's state in the folder of a checkpoint


class ForwardTrainer(Trainer):
    """transformers' `Trainer`, in which an estimate of the gradient takes the place of the backward pass.

    All else is the Trainer's: arguments, schedules, clipping, accumulation, bfloat16, evaluation, checkpoints. Those hold the estimator's
    generator and state, too, in `forwardgrad.pt`. A Trainer of another kind becomes one as `class Mine(ForwardTrainer, Seq2SeqTrainer)`.
    Several processes train the model together, each on its part of the data (see `Distributed`).
    What the class computes a loss with runs at every evaluation that the estimator makes.

    Args:
        estimator: the method; `ForwardGradient()` if left out.
        generator: where directions are drawn from; one that follows from `args.seed` if left out.
        *args, **kwargs: those of the Trainer.
    """

    def __init__(self, *args: Any, estimator: Estimator | None = None, generator: Generator | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gradients = GradientSource(estimator, seed=self.args.seed, generator=generator)
        self._code = object()  # another Trainer of the same model may have another loss

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.__class__ = Unwrapping

    def train(self, *args: Any, **kwargs: Any) -> Any:
        output = super().train(*args, **kwargs)
        self.gradients.compare(self.model)
        return output

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Add an estimate to `.grad` and return the loss, both as large as this batch's share in the step."""
        check_accelerator(self.accelerator)
        self.gradients.join(self.accelerator.num_processes)
        loss = LoopLoss(lambda model: self._evaluated(model, inputs, num_items_in_batch), self._code)
        return self.gradients.add_(loss, model).loss

    def _evaluated(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> Tensor:
        """The loss that the Trainer's own step hands to its backward pass."""
        found: list[Tensor] = []
        instead = self.accelerator.__dict__
        instead["backward"] = lambda loss, **_: found.append(loss)
        try:
            super().training_step(model, inputs, num_items_in_batch)
        finally:
            del instead["backward"]
        if len(found) != 1:
            raise TypeError(f"{type(self).__name__} makes {len(found)} backward passes in a step, and an estimate takes the place of one")
        return found[0]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.gradients.compare(self.model)  # every process is here, and one of them saves for all
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            whole, part = Path(output_dir, FILE), Path(output_dir, f"{FILE}.part")
            torch.save(self.gradients.state_dict(), part)
            part.replace(whole)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (saved := Path(checkpoint, FILE)).exists():
            self.gradients.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))
