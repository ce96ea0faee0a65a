"""What is remembered of a model under one loss. A new path of calls is surveyed when the model first takes it."""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.weak import WeakIdKeyDictionary

from forwardgrad.calls.kept import kept
from forwardgrad.calls.survey import Survey
from forwardgrad.forward_mode import notes
from forwardgrad.objective import Objective, code_of
from forwardgrad.perturbations import MOST_PATHS, WHOLE, Memory, Perturbation, Reading

ATTEMPTS = 64  # evaluations of one step that may have to be made again while a model is still being learned
UNSTEADY = "the model takes other calls at every evaluation, although it is given the same random numbers: it cannot be followed"

_memories: Any = WeakIdKeyDictionary()


class Unsurveyed(RuntimeError):
    """A path of calls is new in a place where nothing can be tried."""


class Surveyed:
    """What is remembered of a model under one loss and perturbation, and how it is found out."""

    def __init__(
        self, memory: Memory, key: Hashable, objective: Objective, perturbation: Perturbation, exact_output: bool, who: str
    ) -> None:
        self.memory, self.key, self.who = memory, key, who
        self._objective, self._perturbation, self._exact = objective, perturbation, exact_output

    @classmethod
    def of(
        cls, objective: Objective, perturbation: Perturbation, *, exact_output: bool, who: str, code: Hashable | None = None
    ) -> Surveyed:
        """`code` stands for the loss function, and is found by itself if left out."""
        code = code_of(objective.loss) if code is None else code
        key = code, repr(perturbation), exact_output
        at = objective.at if isinstance(objective.at, torch.nn.Module) else next(iter(objective.parameters.values()))
        memories = _memories.get(at)
        if memories is None:
            memories = _memories[at] = {}
        return cls(memories.setdefault(key, Memory()), key, objective, perturbation, exact_output, who)

    def reading(self) -> Reading:
        """What the next evaluation goes by."""
        if self._perturbation.apart and self.memory.last is None:
            self._look()
        self._say()
        return self.memory.last or WHOLE

    def used_again(self, index: int) -> None:
        """A place cannot be put off."""
        self.memory.at_once |= {index}
        self.memory.forget()

    def went_through(self, names: frozenset[str]) -> None:
        """Parameters went through a transform of torch.func."""
        self.memory.whole |= names
        self.memory.forget()
        listed = ", ".join(sorted(name.removeprefix("model.") for name in names))
        text = f"the loss uses {listed} inside torch.func.grad, vmap or jvp: they move as whole weights, with the noise of Dense()"
        if text not in self.memory.said:
            self.memory.said.add(text)
            warnings.warn(text, stacklevel=4)

    def went(self, path: Hashable) -> None:
        """The model took another path than the reading is for."""
        known = self.memory.readings.get(path)
        if known is not None and known is not self.memory.last:
            self.memory.last = known
        elif path is not None and len(self.memory.readings) < MOST_PATHS:
            self.memory.last = None  # the next reading is found out
        else:
            many = f"the model took more than {MOST_PATHS} different paths through its calls"
            self.memory.last = replace(WHOLE, why="the calls behind its last layer cannot be made again" if path is None else many)
            self.memory.tell(_cost(self.memory.last, 0))

    def took(self, path: Hashable) -> None:
        """The path of an evaluation that was read as a whole: the next may be known."""
        if self.memory.last is not None and self.memory.last.path is None:
            self.memory.last = self.memory.readings.get(path, self.memory.last)

    def _look(self) -> None:
        if get_proxy_mode() is not None:
            raise Unsurveyed("the model takes other calls while it is traced, and where its examples lie cannot be found out then")
        survey = Survey(self._objective, self._perturbation, self.memory, self._exact)
        with notes.unasked(), kept(self._objective.loss, self._objective.at):
            reading = survey.reading()
        self.memory.keep(reading)
        self.memory.tell(_cost(reading, survey.count))

    def _say(self) -> None:
        """Warn of what was learned, unless somebody asks for it anyway."""
        while self.who and self.memory.unsaid and notes.asked.get() is None:
            warnings.warn(f"{self.who}: {self.memory.unsaid.pop(0)}", stacklevel=6)


def _cost(reading: Reading, count: int) -> str:
    """What a reading costs, as a sentence; nothing where every example has its own part of the loss."""
    if reading.way == "whole":
        return (
            f"what moved for each example is scored by the whole loss, since {reading.why}; the estimate is unbiased and noisier, by up to "
            "the number of examples. Let the loss end in F.cross_entropy or another loss function of torch, or return one loss an example"
        )
    met = [place for place in reading.places if place.why]
    if count > 1 and met:
        named = ", ".join(place.layer for place in met[:3]) + (f" and {len(met) - 3} more" if len(met) > 3 else "")
        return (
            f"{met[0].why} behind {named}: what moved there is scored by the whole loss, which is unbiased and noisier, "
            f"by up to the {count} examples"
        )
    if reading.rest:
        return "a part of the loss does not tell examples apart, and its noise is added to the score of each"
    return ""
