"""What a run is at each step: network, optimizer, generators and counts, and how a checkpoint keeps them."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forwardgrad.estimators import Estimator
from forwardgrad.lab import data, store
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import Optimizer, Run, is_path, stream
from forwardgrad.lab.training import parts as own
from forwardgrad.lab.training.norms import norm
from forwardgrad.lab.training.precision import arranged
from forwardgrad.optim import Nesterov
from forwardgrad.training_step import TrainingStep

COUNTED = ("step", "seconds", "passes", "peak", "strides", "evaluations")  # what a run has counted so far, as a checkpoint holds it


@dataclass
class State:
    """Everything that changes while a run goes on; a checkpoint holds all of it but the batch order, which follows from the seed."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    estimator: Estimator
    generator: torch.Generator
    losses: Tensor
    derivatives: Tensor  # of every step: root mean square over its tangents, before any clip; NaN where there are none
    start: float  # the parameters' norm before the first step
    resident: int  # bytes on the GPU before the model was there
    memory: dict[str, Tensor] = field(default_factory=dict)  # what the estimator keeps from step to step
    whole: TrainingStep | None = None  # made of the above when the first step is taken
    step: int = 0
    seconds: float = 0.0
    passes: int = 0
    peak: int = 0
    strides: list[float] = field(default_factory=list)  # relative lengths of the steps measured since the last evaluation
    evaluations: list[list[float]] = field(default_factory=list)
    walk: list[list[float]] = field(default_factory=list)
    said: float = -math.inf  # when its status was last written
    order: Tensor | None = None  # of the epoch `drawn`; drawn again after a resume
    drawn: int = -1
    room: list[Tensor] | None = None  # where a copy of the parameters goes

    def copied(self) -> list[Tensor]:
        """The parameters as they are now, in memory that is kept for the next time: fresh pages would cost more than the copy."""
        parameters = [p.detach() for p in self.model.parameters()]
        if self.room is None:
            self.room = [torch.empty_like(p) for p in parameters]
        torch._foreach_copy_(self.room, parameters)
        return self.room

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}

    def own(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the parts."""
        return {
            "generator": self.generator.get_state(),
            "losses": self.losses[: self.step].clone(),
            "derivatives": self.derivatives[: self.step].clone(),
            "walk": self.walk,
            "memory": {name: (kept.device.type == "cpu", kept) for name, kept in self.memory.items()},
            **{name: getattr(self, name) for name in COUNTED},
        }

    def take(self, content: dict[str, Any]) -> None:
        """The inverse of `own`."""
        self.generator.set_state(content["generator"])
        for name in COUNTED:
            setattr(self, name, content[name])
        self.losses[: self.step] = content["losses"].to(self.losses.device)
        self.derivatives[: self.step] = content["derivatives"].to(self.losses.device)
        self.walk = content["walk"]
        self.memory = {name: kept if at_home else kept.to(self.losses.device) for name, (at_home, kept) in content["memory"].items()}

    def dump(self) -> bytes:
        parts = {name: part.state_dict() for name, part in self.parts().items()}
        return as_bytes({**parts, "global": torch.get_rng_state(), **self.own()})

    def load(self, path: Path) -> None:
        content = torch.load(io.BytesIO(store.read_checkpoint(path)), map_location="cpu", weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(content[name])
        torch.set_rng_state(content["global"])
        self.take(content)


def as_bytes(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def begin(run: Run, dataset: data.Dataset, on: torch.device) -> State:
    """A run before its first step."""
    resident = torch.cuda.memory_allocated(on) if on.type == "cuda" else 0
    estimator, model = own.estimator(run), build_model(run, dataset, on)
    optimizer = build_optimizer(run.optimizer, model, fused=run.precision != "float32")
    steps = total_steps(run, dataset)
    schedule = build_schedule(run.optimizer, optimizer, steps)
    losses, derivatives = buffers(steps, on)
    return State(model, optimizer, schedule, estimator, directions(run, on), losses, derivatives, norm(model.parameters()), resident)


def build_model(run: Run, dataset: data.Dataset, on: torch.device) -> nn.Module:
    """The network of a run, initialised by its seed: the global generator is that of the run from here on."""
    torch.manual_seed(stream(run.seed, "initialisation"))
    return arranged(own.model(run, dataset).to(on), run.precision)


def directions(run: Run, on: torch.device) -> torch.Generator:
    return torch.Generator(on).manual_seed(stream(run.seed, "directions"))


def buffers(steps: int, on: torch.device) -> tuple[Tensor, Tensor]:
    """Where the losses and derivatives of so many steps go."""
    return torch.zeros(steps, device=on), torch.full((steps,), math.nan, device=on)


def build_optimizer(options: Optimizer, model: nn.Module, *, fused: bool = False) -> torch.optim.Optimizer:
    """The optimizer of a run; Nesterov is the true look-ahead form for every arm. `fused` takes Adam's one kernel for a step: faster, and
    other bits than the plain form, which float32 runs keep."""
    if is_path(options.name):
        return own.optimizer(options, model)
    if options.name == "sgd":
        return torch.optim.SGD(model.parameters(), options.lr, momentum=options.momentum)
    if options.name == "nesterov":
        return Nesterov(model.parameters(), options.lr, options.momentum)
    return torch.optim.Adam(model.parameters(), options.lr, (options.beta1, options.beta2), fused=fused or None)


def build_schedule(options: Optimizer, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate's course over a run of so many steps."""
    if not options.anneal:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, math.exp(-options.decay))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, course(options, steps))


def course(options: Optimizer, steps: int) -> Callable[[int], float]:
    """What the learning rate is multiplied by at each step of a run of so many."""
    if not options.anneal:
        return lambda step: math.exp(-options.decay * step)
    return lambda step: math.exp(-options.decay * step) * (1 + math.cos(math.pi * step / steps)) / 2


def resume(state: State, folder: Path) -> None:
    path = folder / "checkpoint.pt"
    if not path.exists():
        return
    try:
        state.load(path)
    except UserError:
        raise
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise store.damaged(path, type(error).__name__) from error


def steps_per_epoch(run: Run, dataset: data.Dataset) -> int:
    return math.ceil(len(dataset.train.labels) / run.batch_size)


def total_steps(run: Run, dataset: data.Dataset) -> int:
    """The optimizer steps of a whole run."""
    return run.steps or run.epochs * steps_per_epoch(run, dataset)


def draw_order(run: Run, dataset: data.Dataset, state: State) -> Tensor:
    """The order of the training examples in the epoch under way."""
    epoch = state.step // steps_per_epoch(run, dataset)
    if state.order is None or state.drawn != epoch:
        state.order = order_of(run.seed, epoch, len(dataset.train)).to(state.losses.device)
        state.drawn = epoch
    return state.order


def order_of(seed: int, epoch: int, examples: int) -> Tensor:
    return torch.randperm(examples, generator=torch.Generator().manual_seed(stream(seed, f"order of epoch {epoch}")))


def growth(state: State) -> float:
    return norm(state.model.parameters()) / state.start if state.start else math.inf
