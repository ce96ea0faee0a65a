"""A few estimates of one estimator on one case, with all that they leave: what the promises are read off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Generator, Tensor, nn

from forwardgrad.estimators import Estimate, Estimator
from forwardgrad.gradient import estimate_grad_
from forwardgrad.testing.cases import Case, Loss, gpus

Made = TypeVar("Made")
SEED = 7  # of the global generator ahead of every evaluation: what dropout draws


@dataclass(frozen=True)
class FreshEstimate:
    """An estimate of the gradient of a fresh model, and what it left."""

    model: nn.Module
    record: Estimate
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    random: list[Tensor]
    """The states of the global generators."""
    saved: tuple[int, int] | None
    """How many tensors were saved for a backward pass, and how many bytes; None where torch would not let that be seen."""
    kept: bool
    """Whether parameters and buffers are the objects that they were."""


@dataclass(frozen=True)
class PromiseEvidence:
    """What the promises are read off. Estimates take most of the time of a check, and are made once for all of them."""

    estimator: Estimator
    case: Case
    device: str
    first: FreshEstimate
    same: FreshEstimate
    """A fresh model, and the seed of the first."""
    other: FreshEstimate
    """A fresh model, and another seed."""
    added: FreshEstimate
    """A fresh model, the seed of the first, and −3 times the first gradient in its `.grad`."""

    def build(self) -> tuple[nn.Module, Loss]:
        return self.case.build(self.device)


def gather(estimator: Estimator, case: Case, device: str = "cpu") -> PromiseEvidence:
    """Make the estimates, each on a model of its own; the global random state is left alone."""
    with torch.random.fork_rng(devices=gpus(device)):
        first, same, other = (take(estimator, *case.build(device), seed) for seed in (0, 0, 1))
        model, loss = case.build(device)
        for name, gradient in first.gradients.items():
            model.get_parameter(name).grad = -3 * gradient
        return PromiseEvidence(estimator, case, device, first, same, other, take(estimator, model, loss))


def take(estimator: Estimator, model: nn.Module, loss: Loss, seed: int = 0) -> FreshEstimate:
    """One call of `estimate_grad_`, with all that it leaves."""
    before = _objects(model)
    record, saved = packed(lambda: estimate(estimator, model, loss, seed))
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return FreshEstimate(model, record, gradients(model), buffers, random_state(model), saved, _objects(model) == before)


def estimate(estimator: Estimator, model: nn.Module, loss: Loss, seed: int = 0) -> Estimate:
    torch.manual_seed(SEED)
    return estimate_grad_(loss, model, estimator, generator=Generator().manual_seed(seed), state={})


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def random_state(model: nn.Module) -> list[Tensor]:
    """The states of the generators that a model of this kind may draw from."""
    gpus = sorted({p.get_device() for p in model.parameters() if p.is_cuda})
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in gpus)]


def packed(work: Callable[[], Made]) -> tuple[Made, tuple[int, int] | None]:
    """What the work returns, with the number of tensors and bytes that it saved for a backward pass."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return work(), (len(sizes), sum(sizes))
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        return work(), None  # a loss that uses torch.func


def _objects(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(tensor)) for name, tensor in (*model.named_parameters(), *model.named_buffers())]
