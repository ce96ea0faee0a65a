"""`Guess`: the part of the gradient along a guessed direction, on request with a forward gradient for the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from forwardgrad.calls import check_uses
from forwardgrad.directions import Gaussian, Law
from forwardgrad.estimators.base import Estimate, Estimator, check_count, check_number, needed
from forwardgrad.forward_mode import directional_derivatives
from forwardgrad.objective import Objective, Point


@dataclass(frozen=True)
class Guess(Estimator):
    """The gradient along a guessed direction, found by its true directional derivative; with a complement, unbiased.

    Formula: ĝ = (∇f·ŵ) ŵ with ŵ = w/‖w‖ for a guess w; with `complement` also + (∇f·v⊥) v⊥, where v⊥ = v − (v·ŵ)ŵ and v is a random
    direction. `per_parameter` does so for every parameter tensor by itself: as many ŵ as tensors, each zero elsewhere, and v⊥ = v minus
    its part along all of them. Only the direction of w matters, not its length.

    Bias: without the complement, everything at right angles to the guess is missing: E[ĝ] = ŵŵᵀ∇f, whose length is |cos| of the angle
    between guess and gradient times ‖∇f‖. With it there is none, for every w that does not depend on v: E[v⊥v⊥ᵀ] = (I − ŵŵᵀ) E[v vᵀ]
    (I − ŵŵᵀ) = I − ŵŵᵀ, and the two terms add up to ∇f.
    Variance: none without the complement. With it and Gaussian v, E‖ĝ − ∇f‖² = (n − P + 1) ‖∇f⊥‖² over n weights and P guesses, ∇f⊥ the
    part at right angles to them: the noise of a forward gradient of n − P weights that sees only what was not guessed.
    Cost: P + 1 tangent passes with the complement and P without (P = 1, or the number of parameter tensors with `per_parameter`), and a
    primal pass for every chunk; one draw of v.

    A guess that is missing or zero is replaced by a random direction; with the complement it is left out instead, and what remains is the
    forward gradient. `source="previous"` guesses the estimates of the steps before, w ← momentum·w + ĝ, and needs the complement: without
    it no step would ever leave the line of the first. `source="given"` takes what `Guess.give` put into the state, again at every step
    until another is given; under the names `guess.<parameter name>` it can be read and written there by hand too.

    Args:
        source: where the guess w comes from: "previous" (the estimates of earlier steps) or "given" (by `Guess.give`).
        complement: whether to add the forward gradient at right angles to the guess.
        per_parameter: whether every parameter tensor has a derivative of its own.
        momentum: how much of the previous guess stays in w, in [0, 1); only for "previous".
        law: where the random direction v is drawn from.
        chunk_size: tangents evaluated at once: None for all (as many copies of the parameters are held), 1 for a loop.

    Raises ValueError where an argument is outside its limits, `estimate_grad_` was given no generator or state, or a guess in the state
    has another shape than its parameter.

    Source: Fournier et al., "Can Forward Gradient Match Backpropagation?" (2023), section 3; the previous update as direction: Silver
    et al., "Learning by Directional Gradient Descent" (2022).

    >>> Guess(momentum=0.9).unbiased, Guess("given", complement=False).unbiased
    (True, False)
    """

    name: ClassVar[str] = "guess"

    source: Literal["previous", "given"] = "previous"
    complement: bool = True
    per_parameter: bool = False
    momentum: float = 0.0
    law: Law = Gaussian()
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.source not in ("previous", "given"):
            raise ValueError(f"source must be 'previous' or 'given', not {self.source!r}")
        for what, flag in (("complement", self.complement), ("per_parameter", self.per_parameter)):
            if not isinstance(flag, bool):
                raise ValueError(f"{what} must be True or False, not {flag!r}")
        if self.source == "previous" and not self.complement:
            raise ValueError("the previous estimate alone never leaves the line of the first: it needs complement=True")
        check_number("momentum", self.momentum, 0, 1, closed=True)
        if self.source == "given" and self.momentum:
            raise ValueError("momentum belongs to source='previous': a given guess is taken as it is")
        if not isinstance(self.law, Law):
            raise ValueError(f"law must be a law of directions such as Gaussian(), not {self.law!r}")
        check_count("chunk_size", 1 if self.chunk_size is None else self.chunk_size)

    @property
    def unbiased(self) -> bool:
        return self.complement

    @property
    def stateful(self) -> bool:
        return True

    @property
    def told_by_numbers(self) -> bool:
        return True

    def check_divided(self, parts: int) -> None:
        if parts > 1:
            raise ValueError("the directions of Guess() follow from one another, so ranks cannot divide them: take directions=1")

    @staticmethod
    def give(state: dict[str, Tensor], at: Point, direction: Mapping[str, Tensor | None] | Sequence[Tensor] | Tensor) -> None:
        """Put a copy of a guess into the state, in place of the one before.

        Args:
            state: the dictionary that is passed to `estimate_grad_`.
            at: what is trained, as for `estimate_grad_`.
            direction: for a module, tensors by the names of `named_parameters()`, such as gradients of another model or the buffers of
                an optimizer (names left out and None count as zero); for tensors, as many, in the same order.

        Raises ValueError for a name that no parameter has, or a tensor of another shape than its parameter.

        >>> state, model = {}, torch.nn.Linear(2, 1)
        >>> Guess.give(state, model, {"weight": torch.tensor([[1.0, 0.0]])})
        >>> state
        {'guess.weight': tensor([[1., 0.]])}
        """
        trained = {_name_in_model(name): p for name, p in Objective(_nothing, at).parameters.items()}
        if not isinstance(direction, Mapping):
            tensors = [direction] if isinstance(direction, Tensor) else list(direction)
            if len(tensors) != len(trained):
                raise ValueError(f"the guess has {len(tensors)} tensors and {len(trained)} are trained")
            direction = dict(zip(trained, tensors, strict=True))
        known = {name for name, _ in at.named_parameters(remove_duplicate=False)} if isinstance(at, nn.Module) else trained.keys()
        if unknown := [name for name in direction if name not in known]:
            raise ValueError(f"the guess names {unknown[0]!r}, and there is no such parameter: there are {', '.join(sorted(known))}")
        given = {name: w for name in trained if (w := direction.get(name)) is not None}
        for name, w in given.items():
            _check_shape(name, w, trained[name])
        for name, p in trained.items():
            state.pop(f"guess.{name}", None)
            if name in given:
                state[f"guess.{name}"] = given[name].detach().to(p.device, p.dtype, copy=True)

    def estimate(
        self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]
    ) -> tuple[Estimate, dict[str, Tensor | None]]:
        self.check_divided(objective.ranks.directions)
        check_uses(objective, below=False)
        directions = self._directions(objective, needed(generator), state)
        gradients = {name: torch.zeros_like(p) for name, p in objective.parameters.items()}
        size = self.chunk_size or len(directions)
        derivatives = []
        for start in range(0, len(directions), size):
            chunk = directions[start : start + size]
            tangents = {name: torch.stack([v.get(name, torch.zeros_like(p)) for v in chunk]) for name, p in objective.parameters.items()}
            found = directional_derivatives(objective, tangents, commit=start + size >= len(directions))
            loss, derivative = objective.ranks.together(*found)
            derivatives.append(derivative)
            for d, direction in zip(derivative, chunk, strict=True):
                for name, part in direction.items():
                    gradients[name].add_(part * d.to(part.dtype))
        if self.source == "previous":
            for name, gradient in gradients.items():
                before = state.get(f"guess.{_name_in_model(name)}") if self.momentum else None
                w = gradient.clone() if before is None else before.to(gradient).mul_(self.momentum).add_(gradient)
                state[f"guess.{_name_in_model(name)}"] = w
        return Estimate(loss, torch.cat(derivatives), len(directions) + math.ceil(len(directions) / size)), dict(gradients)

    def _directions(self, objective: Objective, generator: Generator, state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The unit vectors ŵ, each with the parameters in which it is not zero, and v⊥ where it is wanted."""
        parameters = objective.parameters
        v = {name: drawn[0] for name, drawn in self.law.draw(parameters, 1, generator).items()}
        w = {}
        for name, p in parameters.items():
            guess = state.get(f"guess.{_name_in_model(name)}", torch.zeros_like(p))
            _check_shape(_name_in_model(name), guess, p)
            w[name] = guess.to(p.device, p.dtype)
        groups = [[name] for name in parameters] if self.per_parameter else [list(parameters)]
        directions = [_unit({name: w[name] for name in group}, None if self.complement else v) for group in groups]
        if self.complement:
            rest = dict(v)
            for unit in directions:
                along = _dot(v, unit)
                rest.update({name: (v[name] - along.to(part) * part.to(_wide(part))).to(part) for name, part in unit.items()})
            directions.append(rest)
        return directions


def _nothing(*_: object) -> Tensor:
    raise AssertionError("an objective that is asked for its parameters alone has no loss")


def _name_in_model(name: str) -> str:
    """The name that a parameter has in its model."""
    return name.removeprefix("model.")


def _check_shape(name: str, w: Tensor, p: Tensor) -> None:
    if w.shape != p.shape:
        raise ValueError(f"the guess for {name} has shape {tuple(w.shape)} and the parameter {tuple(p.shape)}")


def _wide(part: Tensor) -> torch.dtype:
    return torch.promote_types(part.dtype, torch.float32)


def _norm(w: Mapping[str, Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) for part in w.values()]))
    return norm


def _dot(v: Mapping[str, Tensor], w: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([(v[name].to(_wide(part)) * part).sum(dtype=torch.float64) for name, part in w.items()]).sum()


def _unit(w: dict[str, Tensor], instead: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """w/‖w‖; where w is zero, the same of `instead`, or zero if there is none. Nothing here waits for the device."""
    norm = _norm(w)
    zero = norm == 0
    if instead is not None:
        w = {name: torch.where(zero, instead[name], part) for name, part in w.items()}
        norm = _norm(w)
    norm = torch.where(norm == 0, 1.0, norm)
    return {name: (part.to(_wide(part)) / norm.to(_wide(part))).to(part) for name, part in w.items()}
