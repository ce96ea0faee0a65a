"""`cap_step`: a limit on the length of an optimizer's step, whatever the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def cap_step(parameters: Iterable[Tensor], ratio: float) -> Iterator[None]:
    """Hold the step that is taken inside the `with` block to a given length, relative to the parameters' own.

    Formula: θ ← θ + min(1, ratio·‖θ‖/‖Δθ‖)·Δθ with Δθ the change inside the block and both norms over all parameters together.

    Why: a forward gradient is nearly all noise, and in many dimensions noise is orthogonal to θ. Steps of relative length
    ρ = ‖Δθ‖/‖θ‖ then make the norm grow as ‖θ_t‖/‖θ_0‖ = exp(½ Σ ln(1 + ρ_s²)) whatever the loss says, until the network no longer
    trains; a cap on ρ bounds that growth.
    Bias: a step that is cut keeps its direction and loses length; what the optimizer remembers (moments, velocity) is not changed.
    Cost: one copy of the parameters and two norms a step, all on their device: no value is read, so nothing waits for it.

    Args:
        parameters: what the optimizer moves, e.g. `model.parameters()`; of any device and dtype.
        ratio: the largest ‖Δθ‖/‖θ‖, above 0. Parameters that are all zero have no length to compare with, and move freely.

    Raises ValueError where ratio is no positive number. A block that raises leaves the parameters as they are.

    Source: the growth of the norm as a random walk is measured in FluxTune's notes on why forward-gradient runs collapse (2026,
    unpublished); the cap is the trust ratio of LARS (You et al., 2017), over all layers at once and as an upper limit only.

    >>> theta = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> optimizer = torch.optim.SGD([theta], lr=1.0)
    >>> theta.grad = torch.tensor([0.0, 10.0])
    >>> with cap_step([theta], 0.1):
    ...     optimizer.step()
    >>> theta.tolist()
    [3.0, 3.5]
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"the ratio of step to parameters must be a positive number, not {ratio!r}")
    held = list(parameters)
    if not held:
        raise ValueError("there are no parameters whose step could be capped")
    before = [p.detach().clone() for p in held]
    yield
    with torch.no_grad():
        size, step = _norm(before), _norm(p - b for p, b in zip(held, before, strict=True))
        kept = torch.where((step > ratio * size) & (size > 0), ratio * size / step, 1.0)
        for p, b in zip(held, before, strict=True):
            wide = torch.promote_types(p.dtype, torch.float32)
            p.copy_(torch.lerp(b.to(wide), p.to(wide), kept.to(p.device, wide)))


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all tensors together, in at least float32, on the device of the first."""
    parts = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    norm: Tensor = torch.linalg.vector_norm(torch.stack([part.to(parts[0].device) for part in parts]))
    return norm
