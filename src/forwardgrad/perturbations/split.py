"""`SplitWeights`: the directions share out the layers, so that the derivative along each of them speaks for fewer weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from forwardgrad.directions import Directions, Law
from forwardgrad.factored import Gradient
from forwardgrad.perturbations.base import Entered, Perturbation, Pick, Sown
from forwardgrad.perturbations.dense import Dense
from forwardgrad.perturbations.layers import Layer
from forwardgrad.perturbations.sparse import Sparse

_WHOLE = Dense()


@dataclass(frozen=True)
class SplitWeights(Perturbation):
    """The model is cut into M parts, and direction k moves part k mod M alone, in the way of another perturbation.

    Formula: ĝ of part p is (1/c) Σₖ dₖ vₖ over the c directions that move it. The parts are runs of whole layers in the order of the
    model's parameters, cut so that the largest of them has as few weights as it can. A model of fewer layers than parts is cut between
    parameters, and has no more parts than those.
    Why unbiased: a direction that moves part p has dₖ = ∇ₚf·vₖ, so E[dₖ vₖ] = ∇ₚf. With K ≥ M every part is moved by K/M of the
    directions, rounded up or down.
    Variance: E‖ĝₚ − ∇ₚf‖² = ((m − 1)/c)‖∇ₚf‖², with m the second moment of `inner` over the nₚ weights of the part alone, such as nₚ + 2.
    That is less for each direction, and there are fewer of them: where parts are equal and K is shared out evenly, c is K/M and the noise
    of the whole is (n + M)/K, beside (n + 1)/K without a split. So K directions know as much. What falls is the work and memory of each
    (a pass needs no tangent ahead of the part that moves), and what one of M workers draws, sends and adds up (`part`).
    Cost: that of `inner`, of which every layer has K/M. Tangents of all directions of an evaluation lie side by side from the first part
    that moves; with `chunk_size=1` those of a direction begin at its own part.

    Args:
        parts: M ≥ 1, at most as many as there are directions.
        inner: how a part moves: `Dense()`, `LowRank(rank)`, or another perturbation whose directions the examples of a batch share.
        part: the one part that all directions move, from 0 to M − 1, where others are left to other workers: the sum of the workers'
            estimates is unbiased, and parameters of other parts get no gradient. None: the parts take turns.

    Raises ValueError where an argument is outside its limits, or a model has no part of that number.

    Source: Panchal et al., "Thinking Forward: Memory-Efficient Federated Finetuning of Language Models" (SPRY, 2024), section 3.1, where
    each client of a federation moves its own layers.

    >>> SplitWeights(4, part=2).least, SplitWeights(4).least
    (1, 4)
    """

    name: ClassVar[str] = "split"

    parts: int = 1
    inner: Perturbation = _WHOLE
    part: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.parts, bool) or not isinstance(self.parts, int) or self.parts < 1:
            raise ValueError(f"parts must be a whole number of at least 1, not {self.parts!r}")
        known = isinstance(self.inner, Perturbation) and not self.inner.apart and not isinstance(self.inner, (SplitWeights, Sparse))
        if not known or getattr(self.inner, "period", 1) > 1:
            raise ValueError(f"inner must move weights that a batch shares, as Dense() and LowRank() do, not {self.inner!r}")
        if self.part is not None and (type(self.part) is not int or not 0 <= self.part < self.parts):
            raise ValueError(f"part must be None or a whole number from 0 to {self.parts - 1}, not {self.part!r}")

    @property
    def apart(self) -> bool:
        return False

    @property
    def weights(self) -> bool:
        return False

    @property
    def unbiased(self) -> bool:
        return self.inner.unbiased and (self.part is None or self.parts == 1)

    @property
    def least(self) -> int:
        return self.parts if self.part is None else 1

    def check(self, law: Law) -> None:
        super().check(law)
        self.inner.check(law)

    def variance(self, law: Law, gradient: Mapping[str, Tensor], count: int) -> float | None:
        if self.part is not None:
            return None
        owners, noise = self.owners(gradient), 0.0
        for index in range(1 + max(owners.values())):
            own = {name: g for name, g in gradient.items() if owners[name] == index}
            found = self.inner.variance(law, own, len(range(index, count, 1 + max(owners.values()))))
            if found is None:
                return None
            noise += found * sum(float(g.double().square().sum()) for g in own.values())
        return noise / sum(float(g.double().square().sum()) for g in gradient.values())

    def owners(self, parameters: Mapping[str, Tensor]) -> dict[str, int]:
        """The part that each parameter belongs to."""
        layers: dict[str, list[str]] = {}
        for name in parameters:
            layers.setdefault(name.rpartition(".")[0] or name, []).append(name)
        units = list(layers.values()) if len(layers) >= self.parts else [[name] for name in parameters]
        sizes = tuple(sum(parameters[name].numel() for name in unit) for unit in units)
        return {name: part for unit, part in zip(units, _cut(sizes, min(self.parts, len(units))), strict=True) for name in unit}

    def among(self, parameters: Mapping[str, Tensor], first: int, total: int) -> Perturbation:
        owners = self.owners(parameters)
        count = 1 + max(owners.values())
        if self.part is not None and self.part >= count:
            raise ValueError(f"the model has {count} parameters to split, and so no part {self.part}: choose fewer parts")
        return _Turns(self, self.inner.among(parameters, first, total), owners, count, first, max(total, 1))

    def enter(self, layer: Layer, x: Tensor, out: Tensor, directions: Directions) -> Entered | None:
        raise RuntimeError("a split has to know the model's parameters first: `perturbed_pass` tells it, by `among`")


@lru_cache
def _cut(sizes: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """The part of each of some units in a row: as many runs as there are parts, the largest as small as it can be."""
    low, high = max(sizes), sum(sizes)
    while low < high:  # the least that lets every run of units fit
        middle = (low + high) // 2
        low, high = (low, middle) if max(_filled(sizes, parts, middle)) < parts else (middle + 1, high)
    return _filled(sizes, parts, low)


def _filled(sizes: tuple[int, ...], parts: int, most: int) -> tuple[int, ...]:
    """Units in runs of at most this size, none of the parts left without one."""
    owners, part, held = list[int](), 0, 0
    for index, size in enumerate(sizes):
        if index and (held + size > most or len(sizes) - index < parts - part):
            part, held = part + 1, 0
        owners.append(part)
        held += size
    return tuple(owners)


@dataclass(frozen=True)
class _Turns(Perturbation):
    """A split among the parameters of a model: which directions of one evaluation move which of them."""

    name: ClassVar[str] = SplitWeights.name

    split: SplitWeights
    inner: Perturbation
    owners: Mapping[str, int]
    count: int
    first: int
    total: int

    def __repr__(self) -> str:  # what is remembered of a model goes by it
        return f"{self.split!r} from {self.first % self.count}"

    @property
    def apart(self) -> bool:
        return False

    @property
    def parted(self) -> bool:
        return self.inner.parted

    @property
    def weights(self) -> bool:
        return False

    def enter(self, layer: Layer, x: Tensor, out: Tensor, directions: Directions) -> Entered | None:
        shares: dict[int, dict[str, str]] = {}
        for role, name in layer.names.items():
            shares.setdefault(self.owners[name], {})[role] = name
        uses = []
        for part, names in shares.items():  # one, but where a weight and its bias belong to different parts
            own, (which, share) = copy(layer), self._turn(part, len(directions))
            own.names = names
            found = self.inner.enter(own, x, out, directions.only(which))
            if found is None:
                return None
            assert isinstance(found, Sown)
            uses.append(SplitUse(found, which, len(directions), share))
        return uses[0] if len(uses) == 1 else SplitLayer(uses)

    def whole(self, name: str, directions: Directions, make: Callable[[Directions], Sown]) -> Sown:
        which, share = self._turn(self.owners[name], len(directions))
        return SplitUse(make(directions.only(which)), which, len(directions), share)

    def _turn(self, part: int, count: int) -> tuple[range, float]:
        """Which directions of the evaluation move a part, and how many times its estimate has to count in a mean over all."""
        if self.split.part is not None:
            return range(count if part == self.split.part else 0), 1.0
        return range((part - self.first) % self.count, count, self.count), self.total / len(range(part, self.total, self.count) or (0,))


class SplitUse(Sown):
    """One use of weights that some of the directions move; nothing is held of one that none of them moves."""

    def __init__(self, use: Sown, which: range, count: int, share: float) -> None:
        super().__init__()
        self.which, self.count, self.share = which, count, share
        self.moves, self._names = bool(which), use.names
        self.use = use if which else None
        self.kept = use.kept if which else {}
        self.kind = use.kind  # type: ignore[misc]

    def once_more(self, layer: Layer, x: Tensor, out: Tensor) -> SplitUse:
        other = copy(self)
        other.use = self.use and self.use.once_more(layer, x, out)
        return other

    @property
    def mine(self) -> slice:
        """Where the directions that move it stand among all."""
        return slice(self.which.start, None, self.which.step)

    def tangent(self, pick: Pick) -> Tensor:
        assert self.use is not None
        place, moves = torch.zeros(self.count, dtype=torch.int64), torch.zeros(self.count)
        place[self.mine] = torch.arange(len(self.which))
        moves[self.mine] = 1
        found = self.use.tangent(lambda stack: pick(stack.index_select(0, place.to(stack.device))))
        return found * pick(moves.to(found.device, found.dtype))

    def tangents(self, count: int) -> Tensor:
        assert self.use is not None
        found = self.use.tangents(len(self.which))
        if len(found) == count:
            return found
        moved = found.new_zeros((count, *found.shape[1:]))
        moved[self.mine] = found
        return moved

    def add_to_(self, tangents: Tensor) -> None:
        assert self.use is not None
        self.use.add_to_(tangents[self.mine])

    def gradient(self, weights: Tensor) -> Mapping[str, Gradient]:
        return {} if self.use is None else self.use.gradient(weights[self.mine] * self.share)

    @property
    def names(self) -> list[str]:
        return self._names


class SplitLayer(Sown):
    """One use of a layer whose weight and bias belong to different parts."""

    def __init__(self, uses: Sequence[SplitUse]) -> None:
        super().__init__()
        self.uses, self.moves = uses, any(use.moves for use in uses)
        self.kept = next((use.kept for use in uses if use.kept), self.kept)  # a bias alone keeps nothing
        self.kind = uses[0].kind  # type: ignore[misc]

    def once_more(self, layer: Layer, x: Tensor, out: Tensor) -> SplitLayer:
        return SplitLayer([use.once_more(layer, x, out) for use in self.uses])

    @property
    def moving(self) -> list[SplitUse]:
        return [use for use in self.uses if use.moves]

    def tangent(self, pick: Pick) -> Tensor:
        first, *rest = (use.tangent(pick) for use in self.moving)
        return sum(rest, start=first)

    def tangents(self, count: int) -> Tensor:
        first, *rest = self.moving
        found = first.tangents(count)
        for use in rest:
            use.add_to_(found)
        return found

    def add_to_(self, tangents: Tensor) -> None:
        for use in self.moving:
            use.add_to_(tangents)

    def gradient(self, weights: Tensor) -> Mapping[str, Gradient]:
        return {name: part for use in self.moving for name, part in use.gradient(weights).items()}

    @property
    def names(self) -> list[str]:
        return [name for use in self.uses for name in use.names]
