"""`ZerothOrder`: the loss at two points on a random line, and no derivative."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode

from forwardgrad.directions import Gaussian, Law, drawn
from forwardgrad.estimators.base import Estimate, Estimator, check_count, check_number, needed
from forwardgrad.forward_mode import RandomState, Redo, levels
from forwardgrad.objective import Objective


@dataclass(frozen=True)
class ZerothOrder(Estimator):
    """The zeroth-order estimate (SPSA, MeZO): central differences of the loss along random directions, times the directions.

    Formula: ĝ = (1/K) Σₖ dₖ vₖ with dₖ = (f(θ + εvₖ) − f(θ − εvₖ)) / 2ε, an antithetic pair, in which all even orders cancel.

    Bias: of order ε². dₖ = ∇f·v + (ε²/6) Σ ∂ᵢⱼₗf vᵢvⱼvₗ + O(ε⁴), so E[ĝ]ᵢ − ∂ᵢf = (ε²/2) Σⱼ ∂ᵢⱼⱼf with Gaussian directions, for which
    E[ĝ] is the gradient of the smoothed loss E[f(θ + εv)] exactly, and (ε²/2) Σⱼ ∂ᵢⱼⱼf − (ε²/3) ∂ᵢᵢᵢf with Rademacher ones: none for a
    quadratic loss. Rounding adds about u|f|/ε to each dₖ, u the relative precision of the loss, so ε near u^⅓ does best; in float16 and
    bfloat16 θ + εv is itself rounded, and ε must lie well above the spacing of the parameters' values (|θ|/256 in bfloat16).
    Variance: that of the forward gradient up to O(ε²): E‖ĝ‖² = (1 + (m − 1)/K)‖∇f‖², m = n + 2 (Gaussian) or n (Rademacher).
    Cost: 2K forward passes, and three draws of each direction. A direction is replayed from its seed wherever a parameter is used, so
    at most the perturbed parameters of one operation are held beside the live ones, which are never written to: they keep their bits
    whatever happens. The draws are made on the generator's device: give one on the model's, or the copies take most of the time.

    The loss may be anything that can be evaluated: no derivative rule is needed, and what was detached counts like the rest. It has to
    give the same value for the same parameters and global random state, though: noise σ in it becomes noise σ/ε in dₖ. The loss
    reported is the mean of the two, f + (ε²/2) vᵀHv; buffers become the mean of what the last pair of evaluations leaves (whole
    numbers: the second's), O(ε²) from one ordinary pass. A parameter that the loss never uses is given no gradient.

    Args:
        epsilon: ε > 0, the step in units of the parameters.
        tangents: K ≥ 1, the number of directions averaged.
        law: where directions are drawn from: one that draws every weight by itself, Gaussian() or Rademacher().

    Raises ValueError where an argument is outside its limits, `estimate_grad_` was given no generator, or a part of the model is
    scripted; RuntimeError where the loss uses no trainable parameter.

    Source: Spall, "Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient Approximation" (1992), eq. 2.2;
    the replayed directions: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes" (2023), algorithm 1.

    >>> ZerothOrder(epsilon=0.01)
    ZerothOrder(epsilon=0.01, tangents=1, law=Gaussian())
    """

    name: ClassVar[str] = "zeroth-order"

    epsilon: float = 1e-3
    tangents: int = 1
    law: Law = Gaussian()

    def __post_init__(self) -> None:
        check_number("epsilon", self.epsilon, 0)
        check_count("tangents", self.tangents)
        if not isinstance(self.law, Law) or not self.law.independent:
            raise ValueError(f"law must draw every weight by itself, as Gaussian() and Rademacher() do, not {self.law!r}")

    @property
    def unbiased(self) -> bool:
        return False

    def estimate(
        self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]
    ) -> tuple[Estimate, dict[str, Tensor | None]]:
        if isinstance(objective.at, nn.Module) and any(isinstance(m, torch.jit.ScriptModule) for m in objective.at.modules()):
            raise ValueError(
                "the parameters of a scripted module cannot be exchanged from outside: estimate at the module it was made from"
            )
        directions = _Directions(objective, self.law, self.tangents, needed(generator))
        losses, derivatives, used = [], [], set[str]()
        for tangent in range(self.tangents):
            with _same_random_state(objective):
                up, buffers = directions.evaluate(tangent, self.epsilon, used)
            with nullcontext() if tangent == self.tangents - 1 else _same_random_state(objective):
                down, others = directions.evaluate(tangent, -self.epsilon, used)
            losses.append(up / 2 + down / 2)
            derivatives.append((up - down) / (2 * self.epsilon))
        if not used:
            raise RuntimeError("the loss does not depend on any trainable parameter: there is nothing to estimate")
        objective.commit({name: _middle(buffers[name], others[name]) for name in buffers})
        record = Estimate(torch.stack(losses).mean(), torch.stack(derivatives), 2 * self.tangents)
        weights = record.derivatives / self.tangents
        return record, {name: directions.combine(name, weights) if name in used else None for name in objective.parameters}


class _Directions:
    """The directions of one step: nothing but a seed for every part of each."""

    def __init__(self, objective: Objective, law: Law, count: int, generator: Generator) -> None:
        self.objective, self.law = objective, law
        self.live = {name: p.detach() for name, p in objective.parameters.items()}
        self.generator = Generator(generator.device)
        self.seeds = drawn(lambda: _seeds(generator, count, len(self.live)))
        self.places = {name: index for index, name in enumerate(self.live)}

    def part(self, tangent: int, name: str) -> Tensor:
        """What a direction has for one parameter: the same bits at every call."""
        return drawn(lambda: self._part(tangent, name), once=(tangent, name))

    def _part(self, tangent: int, name: str) -> Tensor:
        p = self.live[name]
        v = torch.empty(p.shape, dtype=p.dtype, device=self.generator.device)
        self.law.fill_([v], self.generator.manual_seed(self.seeds[tangent][self.places[name]]))
        return v.to(p.device)

    def evaluate(self, tangent: int, step: float, used: set[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at θ + step·v and the buffers it leaves; the names of the parameters that it used are added to `used`."""

        def moved(name: str) -> Tensor:
            p, v = self.live[name], self.part(tangent, name)
            return torch.add(p, v, alpha=step, out=v if p.is_contiguous() else None)

        random = RandomState(self.objective)
        with torch.no_grad():
            try:
                with _Moved(self.objective, moved) as mode:
                    loss, buffers = self.objective.with_(self.objective.parameters)
                used |= mode.used
            except _Transformed:
                random.restore()
                loss, buffers = self.objective.with_({name: self._still(name, moved(name)) for name in self.live})
                used.update(self.live)
        return loss.detach(), buffers

    def _still(self, name: str, moved: Tensor) -> Tensor:
        """A moved parameter with the padding row of an embedding where it was."""
        for module in self.objective.at.modules() if isinstance(self.objective.at, nn.Module) else ():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None and module.weight is self.objective.parameters[name]:
                moved[module.padding_idx] = self.live[name][module.padding_idx]
        return moved

    def combine(self, name: str, weights: Tensor) -> Tensor:
        """Σₖ weights[k]·v[k] of one parameter, the parts drawn again one after the other."""
        total = self.part(0, name)
        total.mul_(weights[0].to(total.dtype))
        for tangent in range(1, len(weights)):
            part = self.part(tangent, name)
            total.add_(part.mul_(weights[tangent].to(part.dtype)))
        return total


_VALUES = {"data", "T", "mT", "H", "mH", "real", "imag"}  # properties of a tensor that hold its values; the others only describe it
_DESCRIBING = {
    *(torch.numel, torch.is_floating_point, torch.is_complex, torch.is_same_size, torch.get_device),
    *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like),
    *(
        getattr(Tensor, name)
        for name in (
            *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "element_size", "__len__"),
            *("get_device", "is_floating_point", "is_complex", "is_signed", "is_same_size", "is_shared", "is_pinned", "data_ptr"),
            *("new_empty", "new_zeros", "new_ones", "new_full", "requires_grad_", "register_hook"),
        )
    ),
}


class _Transformed(Redo):
    """A parameter went into a transform of torch.func: it has to be exchanged before that begins."""


class _Moved(TorchFunctionMode):
    """While it is active, torch functions that are handed a live parameter get another tensor in its place, made for that call alone."""

    def __init__(self, objective: Objective, moved: Callable[[str], Tensor]) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in objective.parameters.items()}
        self.live = {name: p.detach() for name, p in objective.parameters.items()}
        self.moved, self.used = moved, set[str]()
        self.level, self.storages = levels.level(), {levels.storage(p) for p in self.live.values()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        describes = func in _DESCRIBING or (getattr(func, "__name__", "") == "__get__" and func.__self__.__name__ not in _VALUES)
        if not describes and levels.level() != self.level:
            if self.storages & levels.storages((args, kwargs)):
                raise _Transformed
        elif not describes:
            made: dict[str, Tensor] = {}  # a parameter handed over twice is still one tensor
            args, kwargs = self._exchange(args, made), self._exchange(kwargs, made)
            self.used |= made.keys()
            if func in (F.embedding, F.embedding_bag) and kwargs.get("padding_idx") is not None:
                self._hold_padding(kwargs["padding_idx"], made)
        return func(*args, **kwargs)

    def _hold_padding(self, row: int, made: dict[str, Tensor]) -> None:
        """The padding row of an embedding stays where it is, as in backpropagation, which gives it no gradient here."""
        for name, moved in made.items():
            moved[row] = self.live[name][row]

    def _exchange(self, value: Any, made: dict[str, Tensor]) -> Any:
        if isinstance(value, Tensor):
            name = self.names.get(id(value))
            if name is None:
                return value
            if name not in made:
                made[name] = self.moved(name)
            return made[name]
        if type(value) in (tuple, list):
            return type(value)(self._exchange(item, made) for item in value)
        if type(value) is dict:
            return {key: self._exchange(item, made) for key, item in value.items()}
        return value


def _seeds(generator: Generator, tangents: int, parameters: int) -> list[list[int]]:
    """A seed for every part of every direction, from the generator's state: it lies in host memory, so nothing waits for a device."""
    state = hashlib.blake2b(bytes(generator.get_state().tolist()), digest_size=8).digest()
    torch.empty(1, device=generator.device).uniform_(generator=generator)  # the next step starts from another state
    host = Generator().manual_seed(int.from_bytes(state))
    return torch.randint(2**62, (tangents, parameters), generator=host).tolist()


def _same_random_state(objective: Objective) -> AbstractContextManager[None]:
    """What is drawn from the global generators inside is drawn again by the next evaluation."""
    return torch.random.fork_rng(sorted({p.get_device() for p in objective.parameters.values() if p.is_cuda}))


def _middle(one: Tensor, other: Tensor) -> Tensor:
    """The mean of two buffers, bit for bit where they agree."""
    if not one.is_floating_point():
        return other
    return torch.where(one == other, one, one / 2 + other / 2)
