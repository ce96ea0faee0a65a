"""The angle between an estimate of each layer's gradient and backpropagation's, at the same weights and on the same batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Generator, Tensor, nn

from forwardgrad.estimators import Backprop, Estimator
from forwardgrad.gradient import estimate_grad_

LossOfModel = Callable[[nn.Module], Tensor]


def cosines(
    loss: LossOfModel,
    model: nn.Module,
    names: Sequence[str],
    estimator: Estimator,
    generator: Generator,
    memory: Mapping[str, Tensor],
) -> list[float | None]:
    """cos(ĝ_l, g_l) for every layer, over its weight and bias together: ĝ one estimate, g the gradient of the model's own loss.

    None where the layer has no gradient or no estimate, or one of them is zero. Model, memory and the global random state stay as they
    are, and both see the same dropout masks. Raises what `estimate_grad_` raises.
    """
    exact = _gradients(loss, model, names, Backprop(), generator, {})
    found = _gradients(loss, model, names, estimator, generator, memory)
    return [_cosine(one, other) for one, other in zip(found, exact, strict=True)]


def _gradients(
    loss: LossOfModel,
    model: nn.Module,
    names: Sequence[str],
    estimator: Estimator,
    generator: Generator,
    memory: Mapping[str, Tensor],
) -> list[Tensor | None]:
    """The gradient of each layer as one vector, taken on a copy of the model with a copy of the memory."""
    twin = copy.deepcopy(model)
    twin.zero_grad(set_to_none=True)
    cuda = sorted({p.get_device() for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(cuda):
        estimate_grad_(loss, twin, estimator, generator=generator, state={name: kept.clone() for name, kept in memory.items()})
    modules = dict(twin.named_modules())
    found: list[Tensor | None] = []
    for name in names:
        parts = [p.grad for p in modules[name].parameters(recurse=False)]
        found.append(None if any(part is None for part in parts) else torch.cat([part.double().flatten() for part in parts]))
    return found


def _cosine(one: Tensor | None, other: Tensor | None) -> float | None:
    if one is None or other is None or not (one.any() and other.any()):
        return None
    return float((one @ other / (one.norm() * other.norm())).clamp(-1, 1))


def learn(batches: Sequence[LossOfModel], steps: int, model: nn.Module, estimator: Estimator, generator: Generator) -> dict[str, Tensor]:
    """What an estimator with a memory learns in so many steps over the batches in turn, while the weights stand still."""
    memory: dict[str, Tensor] = {}
    if estimator.stateful:
        still = copy.deepcopy(model)
        for step in range(steps):
            estimate_grad_(batches[step % len(batches)], still, estimator, generator=generator, state=memory)
            still.zero_grad(set_to_none=True)
    return memory
