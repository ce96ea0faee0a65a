"""How `support.py` checks an entry: directional derivatives and estimates against backpropagation in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import forwardgrad as fg

Loss = Callable[[nn.Module], Tensor]
EXACT, NEAR = 1e-9, 1e-6  # how far a derivative may lie from g·v, relative to ‖g‖: by rules, and by differences


@dataclass(frozen=True)
class Row:
    """What was found of one entry: `ok`, the largest error, and by which way, or the sentence of an error."""

    ok: bool
    error: float | None
    way: str
    said: str = ""


def gradient(model: nn.Module, loss: Loss) -> dict[str, Tensor]:
    """That of backpropagation."""
    torch.manual_seed(7)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss(model), list(trained.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(trained.items(), found, strict=True)}


def derivative_error(build: Callable[[], nn.Module], loss: Loss, count: int) -> float:
    """The largest |d − g·v| / ‖g‖ over some Gaussian directions v."""
    exact, model = gradient(build(), loss), build()
    objective = fg.Objective(loss, model)
    tangents = fg.Gaussian().draw(objective.parameters, count, torch.Generator().manual_seed(1))
    torch.manual_seed(7)
    _, along = fg.directional_derivatives(objective, tangents)
    products = sum((g * v).reshape(count, -1).sum(1) for g, v in zip(exact.values(), tangents.values(), strict=True))
    length = sum(g.square().sum() for g in exact.values()) ** 0.5
    return float((along - products).abs().max() / length.clamp(min=1e-12))


def way_of(build: Callable[[], nn.Module], loss: Loss) -> str:
    found = fg.explain(loss, build())
    return "differences" if any(row.way == "differences" for row in found.calls) else found.way


def derived(build: Callable[[], nn.Module], loss: Loss) -> Row:
    """One direction and three at once, by the library's choice of way and by torch's own."""

    def error() -> float:
        with fg.plainly():
            plain = max(derivative_error(build, loss, count) for count in (1, 3))
        return max(plain, *(derivative_error(build, loss, count) for count in (1, 3)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found, way = error(), way_of(build, loss)
        except NotImplementedError as refused:
            said = str(refused)
            if "has no rule for forward mode" not in said:
                return Row(False, None, "", said)
            with fg.differences():
                found, way = error(), way_of(build, loss)
    return Row(found <= (NEAR if way == "differences" else EXACT), found, way)


BY_EXAMPLE = {"Activity": fg.ForwardGradient(4, perturb=fg.Activity()), "PerExample": fg.ForwardGradient(4, perturb=fg.PerExample())}
LEARNED = {"LearnedFeedback": fg.LearnedFeedback(), "LocalLosses": fg.LocalLosses(feedback=True)}
ESTIMATORS = ("ForwardGradient()", "LowRank", "Activity", "PerExample", "LearnedFeedback", "LocalLosses", "ZerothOrder")
REPEATS, Z = 12, 4.5  # a right estimator has a larger z in a few of a thousand cells, with so few repeats


@dataclass(frozen=True)
class Limits:
    """How far a model may be off: much of transformers computes in float32, whatever the weights are."""

    exact: float
    epsilon: float
    zeroth: float


FULL, SINGLE = Limits(EXACT, 1e-7, 1e-4), Limits(1e-4, 1e-3, 1e-1)


class _Types(TorchDispatchMode):
    """Whether anything is computed in float32."""

    single = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.single = self.single or any(
            isinstance(leaf, Tensor) and leaf.dtype == torch.float32 and leaf.numel() > 1 for leaf in tree_leaves(out)
        )
        return out


def computes_in_single(model: nn.Module, loss: Loss) -> bool:
    with torch.no_grad(), _Types() as types:
        loss(model)
    return types.single


def estimated(
    model: nn.Module, loss: Loss, estimator: fg.Estimator, seed: int, state: dict[str, Tensor]
) -> tuple[fg.Estimate, dict[str, Tensor]]:
    """One estimate, with the dropout masks of `gradient`; what has none is zero."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.grad = None
    torch.manual_seed(7)
    record = fg.estimate_grad_(loss, model, estimator, generator=torch.Generator().manual_seed(seed), state=state)
    return record, {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}


def product(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float(sum((g * other[name]).sum() for name, g in one.items()))


def cell(name: str, model: nn.Module, loss: Loss, exact: dict[str, Tensor], limits: Limits) -> Row:
    """One estimator on one model."""
    square = product(exact, exact)
    state: dict[str, Tensor] = {}
    if name in ("ForwardGradient()", "ZerothOrder", "LowRank"):
        rank_one = fg.ForwardGradient(perturb=fg.LowRank())
        if name == "LowRank" and _shares(model, loss, rank_one):  # every use of a weight has a direction of its own: no one v
            return _of_the_mean(fg.ForwardGradient(4, perturb=fg.LowRank()), model, loss, exact)
        dense = fg.ForwardGradient() if name == "ForwardGradient()" else fg.ZerothOrder(epsilon=limits.epsilon)
        found = 0.0
        for seed in range(3):  # ĝ = d v with d = g·v, so g·ĝ = d²
            record, estimate = estimated(model, loss, rank_one if name == "LowRank" else dense, seed, state)
            d = float(record.derivatives[0])
            found = max(found, abs(product(exact, estimate) - d * d) / max(abs(d) * square**0.5, 1e-300))
        return Row(found <= (limits.zeroth if name == "ZerothOrder" else limits.exact), found, "")
    if name in BY_EXAMPLE:
        return _of_the_mean(BY_EXAMPLE[name], model, loss, exact)
    for seed in range(3):
        _, estimate = estimated(model, loss, LEARNED[name], seed, state)
    finite = all(bool(g.isfinite().all()) for g in estimate.values())
    moving = sum(bool(g.any()) for g in estimate.values())
    same = sum(bool((g - exact[key]).norm() <= limits.exact * exact[key].norm()) for key, g in estimate.items() if exact[key].any())
    return Row(
        finite and moving > 0, None, f"{moving} of {len(estimate)} move, {same} exact", "" if finite and moving else "no step is taken"
    )


def _of_the_mean(estimator: fg.Estimator, model: nn.Module, loss: Loss, exact: dict[str, Tensor]) -> Row:
    """E g·ĝ = ‖g‖²."""
    square = product(exact, exact)
    lengths = torch.tensor([product(exact, estimated(model, loss, estimator, seed, {})[1]) / square for seed in range(REPEATS)])
    spread = float(lengths.std() / REPEATS**0.5)
    z = (float(lengths.mean()) - 1) / spread
    return Row(abs(z) < Z, z, f"{float(lengths.mean()):.2f} ± {spread:.2f}")


def _shares(model: nn.Module, loss: Loss, estimator: fg.Estimator) -> bool:
    torch.manual_seed(7)
    names = [name for row in fg.explain(loss, model, estimator).layers for name in row.layer.split(", ")]
    return len(set(names)) < len(names)
