"""Whole weights at points beside θ: the loss there, and directions that are replayed from their seeds wherever they are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import vmap

from forwardgrad.calls import Folding, beside, side_by_side
from forwardgrad.directions import Law, drawn
from forwardgrad.estimators.moved import Moved, UsedInside
from forwardgrad.estimators.same_draws import SameDraws
from forwardgrad.factored import Gradient, InBlocks
from forwardgrad.forward_mode import EMBEDDINGS, Alike, Unwritten
from forwardgrad.objective import Objective


class WholeWeights:
    """The directions of one step in which every weight moves on its own: nothing but a seed for every part of each.

    `masked_` sets to zero what stands still, given the part of a direction for a parameter and the parameter.
    """

    def __init__(
        self, objective: Objective, law: Law, count: int, generator: Generator, masked_: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        self.objective, self.law = objective, law
        self.live = {name: p.detach() for name, p in objective.parameters.items()}
        self.generator = Generator(generator.device)
        self.seeds = drawn(lambda: seeds_of_weights(generator, count, len(self.live)))
        self.places = {name: index for index, name in enumerate(self.live)}
        self.draws = SameDraws(objective)
        self.used = set[str]()
        """The names of the parameters that the loss used."""
        self.kept: dict[tuple[int, str], Tensor] | None = {} if torch.compiler.is_compiling() else None
        self._masked_ = masked_
        self._folding = Folding(objective, "whole weights")

    def part(self, tangent: int, name: str) -> Tensor:
        """What a direction has for one parameter: the same bits at every call, in memory of their own.

        An eager step draws them again at every call. A graph makes them once: there the numbers take more time than they take memory.
        """
        if self.kept is None:
            return self._part(tangent, name)
        if (tangent, name) not in self.kept:
            self.kept[tangent, name] = self._part(tangent, name)
        return self.kept[tangent, name].clone()

    def _part(self, tangent: int, name: str) -> Tensor:
        live = self.live[name]
        v = self.law.part(live, self.generator, lambda: self.seeds[tangent][self.places[name]], (tangent, name))
        return v if self._masked_ is None else self._masked_(v, live)

    def at_theta(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss where nothing moved, and the buffers it leaves."""
        with torch.no_grad(), self.draws.begun():
            loss, buffers = self.objective.with_(self.objective.parameters)
        return loss.detach(), buffers

    def along(self, part: range, steps: tuple[float, ...]) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The loss [s, k] at so many steps along these directions, and the buffers that the last of them leaves at each step.

        Several directions are one batch where `vmap` can follow the loss.
        """
        if len(part) > 1 and (found := self._folding.tried(lambda: self._together(part, steps))) is not None:
            return found
        losses, buffers = list[list[Tensor]](), list[dict[str, Tensor]]()
        for tangent in part:
            each = [self._at(tangent, step) for step in steps]
            losses.append([loss for loss, _ in each])
            buffers = [left for _, left in each]
        self._folding.finish()
        return torch.stack([torch.stack(row) for row in losses], 1), buffers

    def _at(self, tangent: int, step: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at θ + step·v and the buffers it leaves."""

        def moved(name: str) -> Tensor:
            p, v = self.live[name], self.part(tangent, name)
            return torch.add(p, v, alpha=step, out=v if p.is_contiguous() else None)

        with torch.no_grad():
            return self._evaluated(moved, partial(self.part, tangent), step, Tensor.clone)

    def _together(self, part: range, steps: tuple[float, ...]) -> tuple[Tensor, list[dict[str, Tensor]]]:
        first, count = next(iter(self.live.values())), len(part)
        index = torch.arange(count, device=first.device).repeat(len(steps))
        step = side_by_side(steps, count, first)

        def one(index: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            def direction(name: str) -> Tensor:
                stack = torch.stack([self.part(tangent, name) for tangent in part])
                return stack.index_select(0, index.reshape(1)).squeeze(0)

            def moved(name: str) -> Tensor:
                return self.live[name] + (direction(name) * step).to(self.live[name].dtype)

            with Alike():
                return self._evaluated(moved, direction, step, partial(beside, member=step))

        with torch.no_grad():
            losses, buffers = vmap(one, randomness="same")(index, step)
        last = [{name: t[count * (s + 1) - 1] for name, t in buffers.items()} for s in range(len(steps))]
        return losses.unflatten(0, (len(steps), count)), last

    def _evaluated(
        self, moved: Callable[[str], Tensor], direction: Callable[[str], Tensor], step: Any, cloned: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            with self.draws.begun(), Moved(self.objective, moved, direction, step) as mode:
                loss, buffers = self.objective.with_(self.objective.parameters, cloned)
            self.used |= mode.used
        except UsedInside:
            with self.draws.begun():
                everything = {name: self._still(name, moved(name)) for name in self.live}
                with Unwritten(everything):
                    loss, buffers = self.objective.with_(everything, cloned)
            self.used.update(self.live)
        return loss.detach(), buffers

    def _still(self, name: str, moved: Tensor) -> Tensor:
        """A moved parameter with the padding row of an embedding where it was."""
        for module in self.objective.at.modules() if isinstance(self.objective.at, nn.Module) else ():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None and module.weight is self.objective.parameters[name]:
                moved[module.padding_idx] = self.live[name][module.padding_idx]
        return moved

    def combine(self, name: str, weights: Tensor) -> Gradient:
        """Σₖ weights[k]·v[k] of one parameter, the parts drawn again one after the other.

        The sum of several is made in float32 at least: in bfloat16 one of some hundreds no longer takes up what is added to it.
        """
        first = self.part(0, name)
        if len(weights) == 1:
            return first.mul_(weights[0].to(first.dtype))
        wide = torch.promote_types(first.dtype, torch.float32)
        total = first.to(wide).mul_(weights[0].to(wide))
        for tangent in range(1, len(weights)):
            total.add_(self.part(tangent, name).to(wide).mul_(weights[tangent].to(wide)))
        return total.to(first.dtype)


class WeightsInPlace(WholeWeights):
    """As `WholeWeights`, for which the live parameters themselves are moved, and moved back: nothing of their size is ever made.

    They come back up to rounding. Where the loss raises they do, too; where the process is interrupted while they move, some stay a step
    away.
    """

    def __init__(self, objective: Objective, law: Law, count: int, generator: Generator) -> None:
        super().__init__(objective, law, count, generator)
        modules = list(objective.at.modules()) if isinstance(objective.at, nn.Module) else []
        padded = [(m.weight, m.padding_idx) for m in modules if isinstance(m, nn.Embedding) and m.padding_idx is not None]
        names = {id(p): name for name, p in objective.parameters.items()}
        self._held = {(names[id(w)], row): w.detach()[row].clone() for w, row in padded if id(w) in names}

    @torch.no_grad()
    def along(self, part: range, steps: tuple[float, ...]) -> tuple[Tensor, list[dict[str, Tensor]]]:
        losses, buffers = list[Tensor](), list[dict[str, Tensor]]()
        for tangent in part:
            at, each = 0.0, list[tuple[Tensor, dict[str, Tensor]]]()
            try:
                for step in steps:
                    self._go(tangent, step - at)
                    at = step
                    each.append(self._here())
            finally:
                self._go(tangent, -at)
            losses.append(torch.stack([loss for loss, _ in each]))
            buffers = [left for _, left in each]
        return torch.stack(losses, 1), buffers

    def _go(self, tangent: int, by: float) -> None:
        if not by:
            return
        for name, p in self.live.items():
            self.law.add_part_(p, by, self.generator, self.seeds[tangent][self.places[name]])
        for (name, row), kept in self._held.items():
            self.live[name][row] = kept

    def _here(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss where the parameters are, and the buffers it leaves."""
        try:
            with self.draws.begun(), _Noting(self.objective, set(self._held)) as mode:
                loss, buffers = self.objective.with_(self.objective.parameters)
            self.used |= mode.used
        except UsedInside:
            with self.draws.begun(), Unwritten(self.objective.parameters):
                loss, buffers = self.objective.with_(self.objective.parameters)
            self.used.update(self.live)
        return loss.detach(), buffers

    def combine(self, name: str, weights: Tensor) -> Gradient:
        """As `WholeWeights.combine`, a block at a time when it is asked for."""

        def add(weight: Tensor, scale: float) -> None:
            for tangent, number in enumerate(weights.tolist()):
                self.law.add_part_(weight, number * scale, self.generator, self.seeds[tangent][self.places[name]])

        return InBlocks(self.live[name], add)


class _Noting(Moved):
    """Notes which parameters are used, and leaves them as they are."""

    def __init__(self, objective: Objective, held: set[tuple[str, int]]) -> None:
        super().__init__(objective, self._itself, self._itself, 0.0)
        self._held = held

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in EMBEDDINGS and (kwargs or {}).get("max_norm") is not None:
            raise ValueError(f"{func.__name__} with max_norm shortens rows where they stand, which are moved ones here: leave in_place out")
        return super().__torch_function__(func, types, args, kwargs)

    def _itself(self, name: str) -> Tensor:
        return self.live[name]

    def _hold_padding(self, row: int, made: dict[str, Tensor]) -> None:
        for name in made:
            if (name, row % len(self.live[name])) not in self._held:
                raise ValueError(
                    f"in_place=True cannot hold the padding row of {name.removeprefix('model.')} still, as no nn.Embedding names it: "
                    "give the row to nn.Embedding(padding_idx=...), or leave in_place out"
                )


def seeds_of_weights(generator: Generator, tangents: int, parameters: int) -> list[list[int]]:
    """A seed for every part of every direction, from the generator's state: it lies in host memory, so nothing waits for a device."""
    state = hashlib.blake2b(bytes(generator.get_state().tolist()), digest_size=8).digest()
    torch.empty(1, device=generator.device).uniform_(generator=generator)  # the next step starts from another state
    host = Generator().manual_seed(int.from_bytes(state))
    return torch.randint(2**62, (tangents, parameters), generator=host).tolist()
