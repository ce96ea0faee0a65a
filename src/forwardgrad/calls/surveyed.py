"""What is remembered of a model under one loss. A new path of calls is surveyed when the model first takes it."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.weak import WeakIdKeyDictionary

from forwardgrad.calls.ahead import Ahead
from forwardgrad.calls.kept import kept
from forwardgrad.calls.retakes import BELOW
from forwardgrad.calls.sums import Scaled
from forwardgrad.calls.survey import Survey
from forwardgrad.calls.watch import ModelWatch
from forwardgrad.forward_mode import notes, runs_below
from forwardgrad.objective import Objective, code_of
from forwardgrad.perturbations import MOST_PATHS, WHOLE, Memory, Perturbation, Reading, Told

ATTEMPTS = 64  # evaluations of one step that may have to be made again while a model is still being learned
_TURNS = 3  # in one step, of a model whose calls are partly unseen
UNSTEADY = "the model takes other calls at every evaluation, although it is given the same random numbers: it cannot be followed"
_SCRIPTED = (
    "the calls of the scripted module {!r} are others at every evaluation, so what moves inside the model cannot be followed through it: "
    "put in the module that it was made from, or move whole layers, with perturb=LowRank() or Dense()"
)

_memories: Any = WeakIdKeyDictionary()


class Unsurveyed(RuntimeError):
    """A path of calls is new in a place where nothing can be tried."""


def unsteady(objective: Objective) -> RuntimeError:
    """The error of a model that was never seen to take the same calls twice."""
    modules = objective.at.named_modules() if isinstance(objective.at, torch.nn.Module) else ()
    for name, module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            return RuntimeError(_SCRIPTED.format(name or type(module).__name__))
    return RuntimeError(UNSTEADY)


class Surveyed:
    """What is remembered of a model under one loss and perturbation, and how it is found out."""

    def __init__(
        self, memory: Memory, key: Hashable, objective: Objective, perturbation: Perturbation, exact_output: bool, who: str
    ) -> None:
        self.memory, self.key, self.who = memory, key, who
        self._objective, self._perturbation, self._exact, self._turns = objective, perturbation, exact_output, 0

    @classmethod
    def of(cls, objective: Objective, perturbation: Perturbation, *, exact_output: bool, who: str) -> Surveyed:
        code = code_of(objective.loss)
        key = code, repr(perturbation), exact_output
        at = objective.at if isinstance(objective.at, torch.nn.Module) else next(iter(objective.parameters.values()))
        memories = _memories.get(at)
        if memories is None:
            memories = _memories[at] = {}
        memory = memories.setdefault(key, Memory())
        if runs_below(objective, code):
            memory.at_once |= {BELOW}
        return cls(memory, key, objective, perturbation, exact_output, who)

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
        self._turns += 1
        if self._turns > _TURNS and (BELOW in self.memory.at_once):
            raise unsteady(self._objective)
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

    def ahead(self, ends: Hashable) -> Ahead | None:
        """What is known of the loss of the path that the next evaluation will probably take, where blocks end by this rule."""
        last, given = self.memory.last, self._objective.given
        if last is None or self.memory.unsteady or not given:
            return None
        known: Ahead | None = self.memory.ahead.get(self._setting(last.path, ends))
        return known if known is not None and known.fits(given) else None

    def _setting(self, path: Hashable, ends: Hashable) -> Hashable:
        """A path, and what makes a model leave it that is known before: what is trained, and in which mode its modules are."""
        at = self._objective.at
        modes = tuple([module.training for module in at.modules()]) if isinstance(at, torch.nn.Module) else ()
        return path, ends, tuple(self._objective.parameters), modes

    def strayed(self) -> None:
        """Another path was taken than that by which blocks had learned: those behind them saw blocks that had moved."""
        self._unsteady("the model took another path through its calls than in the step before")

    def came(
        self, stands: ModelWatch, parts: Sequence[Scaled], count: int, ends: Hashable, ahead: Ahead | None, told: Sequence[Told]
    ) -> None:
        """The loss of an evaluation came: remember it, or say where it is not what blocks had learned by."""
        given = self._objective.given
        if ahead is not None:
            if not ahead.holds(parts, given):
                self._unsteady("the loss has another factor, label or option than in the step before")
        elif not self.memory.unsteady:
            found = Ahead.of(parts, given, count, stands.entered, stands.prefixes, stands.read_bare, told)
            if found is not None:
                self.memory.ahead[self._setting(stands.path_taken, ends)] = found

    def _unsteady(self, what: str) -> None:
        """Say, once, that blocks learned by what did not hold, and let none do so again."""
        self.memory.ahead.clear()
        if not self.memory.unsteady:
            self.memory.unsteady = True
            warnings.warn(
                f"{what}, by which blocks of this step had learned: it is not quite the step that was meant. From now on blocks learn when "
                "the loss is there, and activations are kept until then",
                stacklevel=6,
            )

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
