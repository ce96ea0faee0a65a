"""What changes while a run goes on, and how a checkpoint keeps it."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forwardgrad.estimators import Estimator
from forwardgrad.lab import data, models, store
from forwardgrad.lab.energy import Joules
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.training.norms import norm, trained
from forwardgrad.training_step import TrainingStep

WEIGHTS = "weights.pt"  # what a run that keeps its weights leaves in its folder
COUNTED = ("step", "seconds", "passes", "peak", "strides", "evaluations")  # fields that a checkpoint holds under their own names ...
LATER = ("preparing",)  # ... and those that older checkpoints do not have
EVALUATION = 8  # columns of an evaluation; older checkpoints have rows without the last


@dataclass
class State:
    """Everything that changes while a run goes on.

    A checkpoint holds all of it but the order of the examples, which follows from the seed.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_schedule: torch.optim.lr_scheduler.LRScheduler
    estimator: Estimator
    generator: torch.Generator
    losses: Tensor
    derivatives: Tensor  # of every step: root mean square over its tangents, before any clip; NaN where there are none
    start: float  # the parameters' norm before the first step
    resident: int  # bytes on the GPU before the model was there
    memory: dict[str, Tensor] = field(default_factory=dict)  # what the estimator keeps from step to step
    training_step: TrainingStep | None = None  # made of the above when the first step is taken
    step: int = 0
    seconds: float = 0.0
    preparing: float = 0.0  # seconds in which graphs of steps were made: no part of `seconds`
    passes: int = 0
    peak: int = 0
    joules: Joules | None = field(default_factory=dict)  # used in these seconds; None once some of it is not known
    strides: list[float] = field(default_factory=list)  # relative lengths of the steps measured since the last evaluation
    evaluations: list[list[float]] = field(default_factory=list)
    walk: list[list[float]] = field(default_factory=list)
    status_written: float = -math.inf  # when its status was last written
    order: Tensor | None = None  # of the examples in the epoch `order_epoch`; drawn again after a resume
    draws: Tensor | None = None  # what augmentation does to them in that order
    order_epoch: int = -1
    copies: list[Tensor] | None = None  # memory for a copy of the parameters

    def copy_parameters(self) -> list[Tensor]:
        """The parameters as they are now, in memory that is kept for the next time: fresh pages would cost more than the copy."""
        parameters = [p.detach() for p in trained(self.model)]
        if self.copies is None:
            self.copies = [torch.empty_like(p) for p in parameters]
        torch._foreach_copy_(self.copies, parameters)
        return self.copies

    def norm_growth(self) -> float:
        """The parameters' norm over what it was before the first step."""
        return norm(trained(self.model)) / self.start if self.start else math.inf

    def counts(self) -> dict[str, Any]:
        """What a checkpoint keeps beside model, optimizer and learning rate."""
        return {
            "generator": self.generator.get_state(),
            "losses": self.losses[: self.step].clone(),
            "derivatives": self.derivatives[: self.step].clone(),
            "walk": self.walk,
            "memory": self._at_home(),
            "joules": self.joules,
            **{name: getattr(self, name) for name in (*COUNTED, *LATER)},
        }

    def set_counts(self, content: dict[str, Any]) -> None:
        """The inverse of `counts`."""
        self.generator.set_state(content["generator"])
        for name in COUNTED:
            setattr(self, name, content[name])
        self.evaluations = [[*row, *[math.nan] * (EVALUATION - len(row))] for row in self.evaluations]
        for name in LATER:
            setattr(self, name, content.get(name, getattr(self, name)))
        self.losses[: self.step] = content["losses"].to(self.losses.device)
        self.derivatives[: self.step] = content["derivatives"].to(self.losses.device)
        self.walk = content["walk"]
        self.joules = content.get("joules")  # checkpoints of older versions have none
        self.memory = _put_back(content["memory"], self.losses.device)

    def weights(self) -> bytes:
        """What a finished run keeps: its network, and what its estimator remembers."""
        return as_bytes({"model": self.model.state_dict(), "memory": self._at_home()})

    def _at_home(self) -> dict[str, tuple[bool, Tensor]]:
        """The estimator's memory, and of each tensor whether it lies on the processor whatever the device."""
        return {name: (kept.device.type == "cpu", kept) for name, kept in self.memory.items()}

    def dump(self) -> bytes:
        """A checkpoint of one run."""
        modules = {name: module.state_dict() for name, module in self._modules().items()}
        return as_bytes({**modules, "global": torch.get_rng_state(), **self.counts()})

    def load(self, path: Path, sent: bytes | None = None) -> None:
        """Go on from a checkpoint; UserError where it is damaged. One that was `sent` is not read there."""
        with checkpoint(path, sent) as content:
            for name, module in self._modules().items():
                module.load_state_dict(content[name])
            torch.set_rng_state(content["global"])
            self.set_counts(content)

    def _modules(self) -> dict[str, Any]:
        """What has a state of its own, by its name in a checkpoint."""
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.lr_schedule}


@contextmanager
def checkpoint(path: Path, sent: bytes | None = None) -> Iterator[dict[str, Any]]:
    """What a checkpoint holds. Within this block anything that goes wrong is a damaged checkpoint, told by a UserError."""
    try:
        yield torch.load(io.BytesIO(store.read_checkpoint(path) if sent is None else sent), map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch.load raises many kinds for a damaged file, and so does what takes its content
        raise store.damaged(path, type(error).__name__) from error


def read_weights(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """Load the weights that a run kept into its network, and return what its estimator remembered.

    Raises UserError where they are damaged, or the run kept none.
    """
    if not (folder / WEIGHTS).exists():
        raise UserError(f"the run {folder.name} kept no weights: train with --keep-weights")
    with checkpoint(folder / WEIGHTS) as content:
        model.load_state_dict(content["model"])
        return _put_back(content["memory"], next(model.parameters()).device)


def keep_weights_of(folder: Path, data_dir: Path | str | None = None) -> str:
    """Keep the weights of the run of a folder in the data folder, for other runs to start from; returns their digest.

    Raises UserError where they are damaged, or the run kept none.
    """
    if not (folder / WEIGHTS).exists():
        raise UserError(f"{folder} holds no {WEIGHTS}: name the folder of a run that was trained with --keep-weights")
    with checkpoint(folder / WEIGHTS) as content:
        weights = content["model"]
    return models.keep_start(weights, data.folder(data_dir))


def _put_back(memory: dict[str, tuple[bool, Tensor]], on: torch.device) -> dict[str, Tensor]:
    return {name: kept if at_home else kept.to(on) for name, (at_home, kept) in memory.items()}


def as_bytes(content: dict[str, Any]) -> bytes:
    """A checkpoint's content as torch writes it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def buffers(steps: int, on: torch.device) -> tuple[Tensor, Tensor]:
    """Where the losses and derivatives of so many steps go."""
    return torch.zeros(steps, device=on), torch.full((steps,), math.nan, device=on)
