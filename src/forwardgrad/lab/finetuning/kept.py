"""What changes while a run of fine-tuning goes on, and the checkpoint that keeps it.

A checkpoint goes straight to the disk: no second copy of the model is made in memory. It holds what is trained and the buffers; frozen
weights are those of the model's folder.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forwardgrad.estimators import Estimator
from forwardgrad.gradient import estimate_grad_
from forwardgrad.lab import store
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.finetuning.asked import FineTuning
from forwardgrad.lab.finetuning.outcomes import TextLoss
from forwardgrad.lab.finetuning.tokens import PaddedBatch
from forwardgrad.lab.studies import stream
from forwardgrad.training_step import TrainingStep

COUNTED = ("step", "seconds", "passes", "peak", "evaluations")  # fields that a checkpoint holds under their own names
SEAL = 32  # bytes at the end of a checkpoint


@dataclass
class Fitting:
    """A model under way, and how far it has come."""

    asked: FineTuning
    model: nn.Module
    optimizer: torch.optim.Optimizer
    estimator: Estimator
    generator: torch.Generator
    loss: TextLoss
    losses: Tensor  # of every step
    memory: dict[str, Tensor] = field(default_factory=dict)  # what the estimator keeps from step to step
    training_step: TrainingStep | None = None
    step: int = 0
    seconds: float = 0.0
    passes: int = 0
    peak: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def begin(cls, asked: FineTuning, model: nn.Module, estimator: Estimator, loss: TextLoss, total: int, on: torch.device) -> Fitting:
        """A model before its first step."""
        trained = [p for p in model.parameters() if p.requires_grad]
        options = {"lr": asked.lr, "weight_decay": asked.weight_decay}
        kind = torch.optim.SGD if asked.optimizer == "sgd" else torch.optim.AdamW
        generator = torch.Generator(on).manual_seed(stream(asked.seed, "directions"))
        return cls(asked, model, kind(trained, **options), estimator, generator, loss, torch.zeros(total, device=on))  # type: ignore[arg-type]

    def advance(self, batch: PaddedBatch) -> None:
        """Take a step on a batch, at the learning rate that the schedule has for it."""
        rate = self.rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        try:
            record = self._clipped(batch) if self.asked.clip else self._plain(batch)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:  # not every estimator can train every model
            why = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"the estimator {self.estimator.name} takes no step on this model: {why}") from error
        self.losses[self.step] = record.loss
        self.passes += record.forward_passes
        self.step += 1

    def rate(self) -> float:
        """The learning rate of the step to come: the one asked for, or what is left of it on a line that ends at zero."""
        assert self.asked.lr is not None
        left = 1 - self.step / len(self.losses) if self.asked.schedule == "linear" else 1.0
        return self.asked.lr * left

    def _plain(self, batch: PaddedBatch) -> Any:
        if self.training_step is None:
            what = self.loss, self.model, self.optimizer, self.estimator
            self.training_step = TrainingStep(*what, generator=self.generator, state=self.memory)
        return self.training_step(batch)

    def _clipped(self, batch: PaddedBatch) -> Any:
        """A step whose gradient is there in full before it is taken, so that its norm can be held to the limit."""
        self.optimizer.zero_grad()
        loss = lambda model: self.loss(model, batch)  # noqa: E731  # one function for all steps: what is learned of a model hangs on its code
        record = estimate_grad_(loss, self.model, self.estimator, generator=self.generator, state=self.memory)
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], self.asked.clip or 0.0)
        self.optimizer.step()
        return record

    def tensors(self) -> dict[str, Tensor]:
        """What training changes in the model: parameters that are trained, and buffers."""
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return {**trained, **dict(self.model.named_buffers())}

    def save(self, path: Path, run: str) -> None:
        """Write a checkpoint that belongs to the run of this name."""
        content = {
            "tensors": self.tensors(),
            "optimizer": self.optimizer.state_dict(),
            "memory": {name: (kept.device.type == "cpu", kept) for name, kept in self.memory.items()},
            "generator": self.generator.get_state(),
            "global": torch.get_rng_state(),
            "losses": self.losses[: self.step].clone(),
            **{name: getattr(self, name) for name in COUNTED},
        }
        save_sealed(path, content, run)

    def load(self, path: Path, run: str) -> None:
        """Go on from a checkpoint; UserError where it is damaged or another run's."""
        content = read_sealed(path, run)
        try:
            on, here = self.losses.device, self.tensors()
            with torch.no_grad():
                for name, kept in content["tensors"].items():
                    here[name].copy_(kept)
            self.optimizer.load_state_dict(content["optimizer"])
            for name, (at_home, kept) in content["memory"].items():
                self.memory[name] = kept if at_home else kept.to(on)
            self.generator.set_state(content["generator"])
            torch.set_rng_state(content["global"])
            self.losses[: content["step"]] = content["losses"].to(on)
            for name in COUNTED:
                setattr(self, name, content[name])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise store.damaged(path, type(error).__name__) from error


def save_sealed(path: Path, content: dict[str, Any], run: str) -> None:
    """Write tensors and numbers whole or not at all, with a digest of them and of the run's name behind them."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        torch.save(content, file)
    seal = _digest(temporary, run, temporary.stat().st_size)
    with temporary.open("ab") as file:
        file.write(seal)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    store.sync(path.parent)


def read_sealed(path: Path, run: str) -> dict[str, Any]:
    """What `save_sealed` wrote, the tensors on the processor; UserError where the file is damaged or belongs to another run."""
    size = path.stat().st_size - SEAL
    with path.open("rb") as file:
        file.seek(max(0, size))
        if size < 0 or file.read() != _digest(path, run, size):
            raise store.damaged(path, "its content and its digest do not agree")
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch.load raises many kinds
        raise store.damaged(path, type(error).__name__) from error
    return found


def _digest(path: Path, run: str, size: int) -> bytes:
    """The digest of the first bytes of a file and of a run's name."""
    found, left = hashlib.sha256(run.encode()), size
    with path.open("rb") as file:
        while left and (piece := file.read(min(left, 1 << 20))):
            found.update(piece)
            left -= len(piece)
    return found.digest()
