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
from forwardgrad.forward_mode import Alike, Unwritten
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

    def combine(self, name: str, weights: Tensor) -> Tensor:
        """Σₖ weights[k]·v[k] of one parameter, the parts drawn again one after the other."""
        total = self.part(0, name)
        total.mul_(weights[0].to(total.dtype))
        for tangent in range(1, len(weights)):
            part = self.part(tangent, name)
            total.add_(part.mul_(weights[tangent].to(part.dtype)))
        return total


def seeds_of_weights(generator: Generator, tangents: int, parameters: int) -> list[list[int]]:
    """A seed for every part of every direction, from the generator's state: it lies in host memory, so nothing waits for a device."""
    state = hashlib.blake2b(bytes(generator.get_state().tolist()), digest_size=8).digest()
    torch.empty(1, device=generator.device).uniform_(generator=generator)  # the next step starts from another state
    host = Generator().manual_seed(int.from_bytes(state))
    return torch.randint(2**62, (tangents, parameters), generator=host).tolist()
