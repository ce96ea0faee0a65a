"""`GradientSource`: an estimator with all that a loop has to keep for it, in one object that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from forwardgrad.estimators import Estimate, Estimator
from forwardgrad.gradient import estimate_grad_
from forwardgrad.processes import several
from forwardgrad.ranks import Distributed

_UNDIVIDED = ("NO", "MULTI_CPU", "MULTI_GPU")  # others shard parameters, or take steps in an engine of their own
_APART = 0x666F7277  # a seed also makes the weights and the order of the examples: directions must not be those numbers again


class GradientSource:
    """Where the gradients of a training loop come from: an estimator, its generator, and what it remembers from step to step.

    `add_` stands where `loss.backward()` would. `state_dict` and `load_state_dict` are what frameworks ask of whatever a checkpoint is to
    hold: a run that is resumed draws the directions that it would have drawn.

    Args:
        estimator: the method; `ForwardGradient()` if left out.
        seed: of the generator that is made on the model's device when the first gradient is asked for.
        generator: one to draw from instead.
        group: the processes that train the model together, each with its part of the batch or of the directions (see `Distributed`).

    >>> source = GradientSource(seed=1)
    >>> model = torch.nn.Linear(2, 1)
    >>> source.add_(lambda model: model(torch.ones(3, 2)).sum(), model).forward_passes
    2
    >>> sorted(source.state_dict())
    ['device', 'generator', 'state']
    """

    def __init__(
        self, estimator: Estimator | None = None, *, seed: int = 0, generator: Generator | None = None, group: Distributed | None = None
    ) -> None:
        self.estimator, self.generator, self.group, self._seed = estimator, generator, group, seed
        self.state: dict[str, Tensor] = {}
        self._at_home: set[str] | None = None  # of a state that was loaded, what stays on the processor whatever the model's device

    def add_(self, loss: Callable[[nn.Module], Tensor], model: nn.Module) -> Estimate:
        """Evaluate the loss and add an estimate of its gradient to `.grad`, as `estimate_grad_`."""
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "DataParallel copies the model where no direction follows: let the process see one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if self.generator is None:
            self.generator = Generator(device).manual_seed(self._seed ^ _APART)
        if self._at_home is not None:
            self.state = {name: kept if name in self._at_home else kept.to(device) for name, kept in self.state.items()}
            self._at_home = None
        return estimate_grad_(loss, model, self.estimator, generator=self.generator, state=self.state, group=self.group)

    def apart(self, loss: Callable[[nn.Module], Tensor], model: nn.Module, *, keep: bool) -> tuple[Estimate, list[tuple[Tensor, Tensor]]]:
        """As `add_`, but each estimate comes beside its parameter, and `.grad` is what it was, or empty unless it is to be kept."""
        parameters = list(model.parameters())
        before = [p.grad if keep else None for p in parameters]
        model.zero_grad()
        try:
            record = self.add_(loss, model)
            return record, [(p, p.grad) for p in parameters if p.grad is not None]
        finally:
            for p, gradient in zip(parameters, before, strict=True):
                p.grad = gradient

    def join(self, processes: int) -> None:
        """Estimate together with the other processes of torch.distributed, if the loop divides the data among so many.

        Raises ValueError where ranks of the group would need the same data.
        """
        if self.group is None and processes > 1 and several():
            self.group = Distributed()
        if self.group is not None and self.group.directions > 1:
            raise ValueError(
                f"{self.group.directions} ranks divide the directions of a batch, and this loop gives each rank a batch of its own: take "
                "Distributed(directions=1), or divide directions in a loop of your own"
            )

    def compare(self, model: nn.Module) -> None:
        """RuntimeError where the parameters of the processes that train a model have come to differ (see `Distributed.compare`)."""
        if self.group is not None:
            self.group.compare(model)

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, as tensors and texts that `torch.load(weights_only=True)` reads."""
        generator, at_home = self.generator, self._at_home
        if at_home is None:
            at_home = {name for name, kept in self.state.items() if kept.device.type == "cpu"}
        return {
            "device": None if generator is None else generator.device.type,
            "generator": None if generator is None else generator.get_state(),
            "state": {name: (name in at_home, kept) for name, kept in self.state.items()},
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned. A generator of another device than the saved one's is replaced."""
        if saved["generator"] is not None:
            if self.generator is None or self.generator.device.type != saved["device"]:
                self.generator = Generator(saved["device"])
            self.generator.set_state(saved["generator"].cpu())
        self.state = {name: kept for name, (_, kept) in saved["state"].items()}
        self._at_home = {name for name, (at_home, _) in saved["state"].items() if at_home}


class LoopLoss:
    """The loss of a batch as a loop computes it. `code` stands for it in all that is learned of a model under this loss."""

    def __init__(self, evaluate: Callable[[nn.Module], Tensor], code: Hashable) -> None:
        self.evaluate, self.__code__ = evaluate, code

    def __call__(self, model: nn.Module) -> Tensor:
        return self.evaluate(model)


def missing(name: str, extra: str, error: ImportError) -> ImportError:
    """What to raise where a framework cannot be imported."""
    return ImportError(f"{name} needs a package that cannot be imported ({error}): pip install 'forwardgrad[{extra}]'")


def check_scaler(scaler: object) -> None:
    """ValueError where gradients would be divided by a scale that no loss was multiplied with."""
    if scaler is not None:
        raise ValueError("float16 scales the loss for a backward pass, and here there is none: train in bfloat16, which needs no scale")


def check_accelerator(accelerator: Any) -> None:
    """ValueError where an accelerator is set up for what only a backward pass can do."""
    check_scaler(accelerator.scaler)
    if (kind := accelerator.distributed_type.value) not in _UNDIVIDED:
        raise ValueError(f"under {kind} parameters move in an engine that waits for a backward pass, and here there is none: leave it out")
    plan = getattr(accelerator, "parallelism_config", None)
    if plan is not None and plan.non_data_parallel_size > 1:
        raise ValueError(
            "tensor, context and sequence parallelism divide a model or an example among processes, and estimates divide a batch: leave "
            "parallelism_config out"
        )
