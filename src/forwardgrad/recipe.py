"""An estimate as seeds and numbers: what it takes to make it again, one parameter at a time, where holding it would take as much memory as
the model does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from forwardgrad.directions import LAWS, Directions, HeldDirections, Law
from forwardgrad.factored import Gradient
from forwardgrad.perturbations import DenseUse, Entered, LowRankUse, SplitLayer, SplitUse, WholeUse, low_rank_factors, low_rank_sum


@dataclass(frozen=True)
class FromSeeds(ABC):
    """Something that moved along random directions: a seed of each, and what each is multiplied by in the estimate."""

    seeds: tuple[int, ...]
    weights: Tensor

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Those of the parameters."""

    @abstractmethod
    def gradient(self, name: str, like: Tensor, law: Law, home: torch.device) -> Gradient:
        """Its part of the estimate for one parameter, which `like` is."""

    def parts(self, parameters: Mapping[str, Tensor], law: Law, home: torch.device) -> Iterator[tuple[str, Gradient]]:
        """Its parts of the estimate for all of its parameters."""
        return ((name, self.gradient(name, parameters[name], law, home)) for name in self.names)


@dataclass(frozen=True)
class SeededTensor(FromSeeds):
    """A parameter whose directions follow from seeds of their own."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def gradient(self, name: str, like: Tensor, law: Law, home: torch.device) -> Gradient:
        return self.masked(like, law, home, None)

    def masked(self, like: Tensor, law: Law, home: torch.device, masked_: Callable[[Tensor, Tensor], Tensor] | None) -> Tensor:
        """The gradient; `masked_` sets to zero what stands still, given the part of a direction and the parameter."""
        generator, total = Generator(home), None
        for seed, weight in zip(self.seeds, self.weights, strict=True):
            part = law.part(like, generator, lambda seed=seed: seed, None)  # type: ignore[misc]
            if masked_ is not None:
                part = masked_(part, like)
            part.mul_(weight.to(part.dtype))
            total = part if total is None else total.add_(part)
        assert total is not None
        return total


@dataclass(frozen=True)
class SownTensor(FromSeeds):
    """A parameter that moved as a whole at one place of the directions of a pass. `held`: of directions for several evaluations."""

    number: int
    name: str
    held: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def gradient(self, name: str, like: Tensor, law: Law, home: torch.device) -> Gradient:
        directions = _directions(self, law, home)
        return DenseUse(name, directions.draw(tuple(like.shape), like)).gradient(self.weights.unsqueeze(1))[name]


@dataclass(frozen=True)
class SownMatrix(FromSeeds):
    """A use of a layer that moved along directions of low rank: the number of its place, and what has to be known of its shape."""

    number: int
    weight: str
    bias: str
    fan_out: int
    fan_in: int
    rank: int
    held: bool = False
    turned: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name)

    def gradient(self, name: str, like: Tensor, law: Law, home: torch.device) -> Gradient:
        return self.both(like, law, home)[name]

    def parts(self, parameters: Mapping[str, Tensor], law: Law, home: torch.device) -> Iterator[tuple[str, Gradient]]:
        yield from self.both(parameters[self.names[0]], law, home).items()

    def both(self, like: Tensor, law: Law, home: torch.device) -> dict[str, Gradient]:
        """Those of the weight and its bias, drawn together; `like` is either, and the weight has another shape if it is the bias."""
        directions, shifts = _directions(self, law, home), bool(self.bias)
        numbers = directions.draw((self.fan_out * (self.rank + shifts) + self.fan_in * self.rank,), like)
        left, right = low_rank_factors(numbers, self.fan_out, self.rank, shifts)
        found = low_rank_sum(left, right, self.weights, like.shape, self.turned)
        return {{"weight": self.weight, "bias": self.bias}[role]: part for role, part in found.items()}


def _directions(one: SownTensor | SownMatrix, law: Law, home: torch.device) -> Directions:
    directions = (HeldDirections if one.held else Directions)(law, list(one.seeds), home)
    directions.next_place = one.number
    return directions


_KINDS: dict[str, type[FromSeeds]] = {kind.__name__: kind for kind in (SeededTensor, SownTensor, SownMatrix)}


@dataclass(frozen=True)
class Recipe:
    """One estimate as what moved in it. It holds whole numbers and one number for each direction, and no tensor of the model's size."""

    law: Law
    home: torch.device
    moved: tuple[FromSeeds, ...]

    @cached_property
    def names(self) -> frozenset[str]:
        """Those of the parameters that the estimate has a gradient for."""
        return frozenset(name for one in self.moved for name in one.names)

    def gradients(self, name: str, like: Tensor) -> Iterator[Gradient]:
        """The gradient of one parameter, made again, in parts that add up to it: the bits that the estimate had."""
        return (one.gradient(name, like, self.law, self.home) for one in self.moved if name in one.names)

    def parts(self, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Gradient]]:
        """The gradients of all parameters, in the parts and the order that the estimate had."""
        for one in self.moved:
            yield from one.parts(parameters, self.law, self.home)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and small tensors, as `torch.load(weights_only=True)` reads them. ValueError where the law is a user's own."""
        if type(self.law) not in LAWS:
            raise ValueError(f"a law of your own cannot be read back from a checkpoint: {self.law!r} is none of the library's")
        listed = [{"kind": type(one).__name__, **{field.name: getattr(one, field.name) for field in fields(one)}} for one in self.moved]
        return {"law": self.law.name, "home": str(self.home), "moved": listed}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Recipe:
        """The recipe that `state_dict` gave."""
        law = next(kind() for kind in LAWS if kind.name == state["law"])
        moved = [_KINDS[one["kind"]](**{key: value for key, value in one.items() if key != "kind"}) for one in state["moved"]]
        return cls(law, torch.device(state["home"]), tuple(moved))


Spare = dict[Hashable, Gradient]
"""Gradients of biases that came with those of their weights, until somebody asks for them."""


def combined(
    recipes: Sequence[Recipe], factors: Sequence[float], name: str, like: Tensor, spare: Spare
) -> Iterator[tuple[float, Gradient]]:
    """Parts of the sum of some recipes' gradients of one parameter, each times its factor: the part, and what it is still to be times.

    The same use of a layer in many recipes is one sum of thin matrices. `spare` is one dictionary for all parameters of a step.
    """
    alike: dict[tuple[Any, ...], list[tuple[SownMatrix, float]]] = {}
    for recipe, factor in zip(recipes, factors, strict=True):
        for one in recipe.moved:
            if name not in one.names:
                continue
            if isinstance(one, SownMatrix):
                key = (
                    one.number,
                    one.names,
                    one.fan_out,
                    one.fan_in,
                    one.rank,
                    one.held,
                    one.turned,
                    len(one.seeds),
                    recipe.law,
                    recipe.home,
                )
                alike.setdefault(key, []).append((one, factor))
            else:
                yield factor, one.gradient(name, like, recipe.law, recipe.home)
    for key, uses in alike.items():
        first, law, home = uses[0][0], key[-2], key[-1]
        most = max(
            1, first.fan_out * first.fan_in // (first.fan_out + first.fan_in) // len(first.seeds)
        )  # what takes the memory of a weight
        for start in range(0, len(uses), most):
            some = uses[start : start + most]
            place = key, start, tuple(factors)
            if (ready := spare.pop((place, name), None)) is not None:
                yield 1.0, ready
                continue
            seeds = tuple(seed for one, _ in some for seed in one.seeds)
            weights = torch.cat([one.weights * factor for one, factor in some])
            for other, part in replace(first, seeds=seeds, weights=weights).both(like, law, home).items():
                if other == name:
                    yield 1.0, part
                elif isinstance(part, Tensor):
                    spare[place, other] = part


class MovedPlace(NamedTuple):
    """What moved in a pass, and which of the pass's directions moved it: a `FromSeeds` without its seeds and numbers.

    Its directions are every `step`-th from `start` on, and their numbers count `share` times.
    """

    kind: str
    what: dict[str, Any]
    start: int = 0
    step: int = 1
    share: float = 1.0

    def sown(self, seeds: Sequence[int], weights: Tensor) -> FromSeeds:
        """With the seeds of a pass and the numbers that its directions are multiplied by."""
        mine = slice(self.start, None, self.step)
        own = weights[mine] if self.share == 1 else weights[mine] * self.share
        return _KINDS[self.kind](tuple(seeds[mine]), own, **self.what)


@dataclass(frozen=True)
class Measured:
    """What the passes of a step found out, as far as its move needs it.

    `passes`: how many directions each had, and what moved; nothing is said of what moved where all parameters move as a whole and one after
    the other. `weights` [K]: what each direction is multiplied by.
    """

    passes: tuple[tuple[int, tuple[MovedPlace, ...]], ...]
    weights: Tensor

    def outline(self) -> dict[str, Any]:
        """All but the weights, as plain JSON values."""
        known: dict[tuple[Any, ...], int] = {}
        for _, places in self.passes:
            known.setdefault(_flat(places), len(known))
        return {"places": [list(places) for places in known], "passes": [[count, known[_flat(places)]] for count, places in self.passes]}

    @classmethod
    def of_outline(cls, outline: Mapping[str, Any], weights: Tensor) -> Measured:
        """The inverse of `outline`."""
        known = [tuple(MovedPlace(kind, dict(what), *rest) for kind, what, *rest in places) for places in outline["places"]]
        return cls(tuple((count, known[index]) for count, index in outline["passes"]), weights)

    def sown(self, law: Law, home: torch.device, seeds: Sequence[Sequence[int]]) -> Recipe:
        """The estimate as a recipe, with the seeds of each pass.

        Raises ValueError where the numbers of a place cannot be drawn apart from others.
        """
        if home.type != "cpu":
            raise ValueError("places of a generator on a GPU follow from one another: pass a generator of the CPU where steps are rebuilt")
        each = self.weights.split([count for count, _ in self.passes])
        ready = zip(self.passes, seeds, each, strict=True)
        return Recipe(law, home, tuple(place.sown(own, some) for (_, places), own, some in ready for place in places))


def _flat(places: Sequence[MovedPlace]) -> tuple[Any, ...]:
    """Places as something that can be looked up."""
    return tuple((place.kind, tuple(place.what.items()), *place[2:]) for place in places)


def places_of(entered: Entered) -> Iterator[MovedPlace]:
    """The places of what entered a pass. Raises ValueError for what cannot be drawn again place by place."""
    if isinstance(entered, SplitLayer):
        for part in entered.moving:
            yield from places_of(part)
    elif isinstance(entered, SplitUse):
        if entered.use is not None:
            for place in places_of(entered.use):
                yield place._replace(start=entered.which.start, step=entered.which.step, share=float(entered.share))
    elif isinstance(entered, (DenseUse, WholeUse)) and entered.directions is not None:
        held = isinstance(entered.directions, HeldDirections)
        yield MovedPlace(SownTensor.__name__, {"number": entered.number, "name": entered.name, "held": held})
    elif type(entered) is LowRankUse:
        names, layer = entered.layer.names, entered.layer
        what: dict[str, Any] = {"number": entered.number, "weight": names.get("weight", ""), "bias": names.get("bias", "")}
        if layer.turned:
            what["turned"] = True
        shape = {"fan_out": layer.fan_out, "fan_in": layer.fan_in, "rank": entered.rank}
        yield MovedPlace(SownMatrix.__name__, {**what, **shape, "held": isinstance(entered.directions, HeldDirections)})
    else:
        raise ValueError(f"{entered.kind} follow from more than seeds: use perturb=LowRank() where steps are rebuilt")
