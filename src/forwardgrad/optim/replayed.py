"""`ReplayedSGD` and `ReplayedAdam`: momentum and Adam that remember seeds and numbers in place of tensors of the model's size."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from forwardgrad.factored import Factored, Gradient
from forwardgrad.recipe import Recipe, Spare, combined


class Replayed(Optimizer):
    """An optimizer whose memory is the recipes of the last W estimates: `follow` makes a parameter's estimates again and moves it by them.

    One parameter after another: what is held beside the model is a few tensors of the size of its largest parameter. A `TrainingStep`
    calls `follow` where other optimizers get a gradient. No `.grad` is filled.
    """

    def __init__(self, params: Any, defaults: dict[str, Any], window: int) -> None:
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be a whole number of at least 1, not {window!r}: it counts the steps that are made again")
        self.window = window
        self.history: deque[Recipe] = deque(maxlen=window)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        for name, low, high in (("lr", 0.0, float("inf")), ("weight_decay", 0.0, float("inf")), *self._limits):
            value = param_group.get(name, self.defaults[name])
            for number in value if isinstance(value, tuple) else (value,):
                if not low <= number < high:
                    raise ValueError(f"{name} must lie in [{low:g}, {high:g}), not {value!r}")
        super().add_param_group(param_group)

    _limits: tuple[tuple[str, float, float], ...] = ()

    @torch.no_grad()
    def follow(self, parameters: Mapping[str, Tensor], recipe: Recipe) -> None:
        """Take a step by the estimate that `recipe` stands for and by those before it. `parameters` are the trained ones, by name."""
        self.history.append(recipe)
        names, spare = {id(p): name for name, p in parameters.items()}, Spare()
        for group in self.param_groups:
            for p in group["params"]:
                if (name := names.get(id(p))) in recipe.names:
                    self._move(p, group, [known for known in self.history if name in known.names], str(name), spare)
        self._opt_called = True  # schedulers warn where they see no step of the optimizer before theirs

    def step(self, closure: Any = None) -> NoReturn:
        raise RuntimeError(
            f"{type(self).__name__} takes steps by seeds and numbers, not by .grad: put it in a forwardgrad.TrainingStep and call that"
        )

    @abstractmethod
    def _move(self, p: Tensor, group: dict[str, Any], recipes: Sequence[Recipe], name: str, spare: Spare) -> None:
        """Move one parameter by these recipes, oldest first; each has a gradient for it. `spare` is one dictionary for the whole step."""

    def state_dict(self) -> dict[str, Any]:
        """That of any optimizer, and the recipes: some numbers for each step of the window."""
        return {**super().state_dict(), "history": [recipe.state_dict() for recipe in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "history"})
        self.history = deque((Recipe.of_state(state) for state in state_dict["history"]), self.window)


class ReplayedSGD(Replayed):
    """Stochastic gradient descent with momentum, the velocity made again at every step from the last W seeds and derivatives.

    Formula: θ ← θ(1 − γλ) − γ m, m = Σₛ μᵗ⁻ˢ ĝₛ over the last W estimates ĝₛ, each made again from its seeds. `torch.optim.SGD(momentum=μ)`
    is the same with W = ∞ and no weight decay λ, which there goes into the velocity and here does not (as in AdamW).
    Bias: m lacks the tail μᵂ m₍ₜ₋W₎ of torch's velocity, exactly: at μ = 0.9 that is 10 % of it with W = 22 and 1 % with W = 44. Up to the
    step W they are equal, to rounding.
    Cost: W draws of every direction a step, in place of one. Directions of low rank are added up as thin matrices, in one product a layer.
    Memory: about three tensors of the size of the largest parameter (one of them in float32 where it is not), and W seeds and numbers.

    Args:
        params: parameters or groups of them, as for any `torch.optim` optimizer.
        lr: learning rate γ ≥ 0; a scheduler may change it.
        momentum: μ in [0, 1).
        weight_decay: λ ≥ 0.
        window: W ≥ 1.

    Raises ValueError for values outside these limits, and RuntimeError where `step` is called outside a `TrainingStep`.

    >>> from forwardgrad import TrainingStep, ZerothOrder
    >>> model, generator = torch.nn.Linear(2, 1), torch.Generator().manual_seed(0)
    >>> optimizer = ReplayedSGD(model.parameters(), lr=0.01, momentum=0.9, window=30)
    >>> step = TrainingStep(lambda m, x: m(x).square().mean(), model, optimizer, ZerothOrder(), generator=generator)
    >>> step(torch.ones(3, 2)).forward_passes, len(optimizer.history), model.weight.grad
    (2, 1, None)
    """

    _limits = (("momentum", 0.0, 1.0),)

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, window: int = 30) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, window)

    def _move(self, p: Tensor, group: dict[str, Any], recipes: Sequence[Recipe], name: str, spare: Spare) -> None:
        momentum, rate = group["momentum"], group["lr"]
        if momentum == 0:
            recipes = recipes[-1:]
        if group["weight_decay"] != 0:
            p.mul_(1 - rate * group["weight_decay"])
        factors = [momentum**age for age in reversed(range(len(recipes)))]
        thin, whole = list[Factored](), None
        for factor, part in combined(recipes, factors, name, p, spare):
            if isinstance(part, Factored):
                thin.append(part)
            else:
                whole = _added(whole, part, factor)
        for part in thin:
            part.add_to_(p, -rate)
        if whole is not None:
            p.add_(whole, alpha=-rate)  # of half-precision parameters rounded once


class ReplayedAdam(Replayed):
    """Adam and AdamW, both moments made again at every step from the last W seeds and derivatives.

    Formula: θ ← θ(1 − γλ) − γ m̂/(√v̂ + ϵ) with m̂ = Σₛ β₁ᵗ⁻ˢ ĝₛ / Σₛ β₁ᵗ⁻ˢ and v̂ = Σₛ β₂ᵗ⁻ˢ ĝₛ² / Σₛ β₂ᵗ⁻ˢ over the last W estimates. With
    W = ∞ that is `torch.optim.AdamW`, whose corrections 1 − βᵗ are the same sums.
    Bias: up to step W none, to rounding. Later both are means over W steps in place of all: each differs from torch's by at most βᵂ times
    the spread of its estimates. With β₂ = 0.999 a window of some tens is a plain mean over the window; β₂ = 0.95 and W = 60 leave 5 % out.
    Cost: W draws of every direction a step, and every estimate whole, since squares are taken number by number.
    Memory: four tensors of the size of the largest parameter, and W seeds and numbers.

    Args:
        params: parameters or groups of them, as for any `torch.optim` optimizer.
        lr: learning rate γ ≥ 0; a scheduler may change it.
        betas: β₁ and β₂ in [0, 1).
        eps: ϵ ≥ 0.
        weight_decay: λ ≥ 0, apart from the moments as in AdamW.
        window: W ≥ 1.

    Raises ValueError for values outside these limits, and RuntimeError where `step` is called outside a `TrainingStep`.
    """

    _limits = (("betas", 0.0, 1.0), ("eps", 0.0, float("inf")))

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        window: int = 60,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}, window)

    def _move(self, p: Tensor, group: dict[str, Any], recipes: Sequence[Recipe], name: str, spare: Spare) -> None:
        beta1, beta2 = group["betas"]
        mean = square = None
        for recipe in recipes:
            estimate = None
            for part in recipe.gradients(name, p):
                estimate = _added(estimate, part, 1.0)
            assert estimate is not None
            if mean is None or square is None:
                mean, square = estimate * (1 - beta1), estimate.square_().mul_(1 - beta2)
            else:
                mean.lerp_(estimate, 1 - beta1)
                square.mul_(beta2).addcmul_(estimate, estimate, value=1 - beta2)
        assert mean is not None
        assert square is not None
        if group["weight_decay"] != 0:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        root = square.div_(1 - beta2 ** len(recipes)).sqrt_().add_(group["eps"])
        p.sub_(mean.div_(root).mul_(group["lr"] / (1 - beta1 ** len(recipes))))


def _added(total: Tensor | None, part: Gradient, factor: float) -> Tensor:
    """A sum in at least float32, with `factor` times another part of it; a part that is a tensor may be overwritten."""
    if total is None:
        whole = part if isinstance(part, Tensor) else part.dense()
        return whole.to(torch.promote_types(whole.dtype, torch.float32)).mul_(factor)
    if isinstance(part, Tensor):
        return total.add_(part, alpha=factor)
    part.to(total.dtype).add_to_(total, factor) if isinstance(part, Factored) else part.add_to_(total, factor)
    return total
