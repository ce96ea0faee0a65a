"""What the compiled and the captured engine share: make a graph of a step, compare it with the eager step, and fall back to that."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import ClassVar

import torch
from torch import Tensor

from forwardgrad.directions import Plan, planned
from forwardgrad.engines.batch import Batch, Opaque
from forwardgrad.engines.eager import EagerStep
from forwardgrad.engines.limit import Late
from forwardgrad.engines.reads import Untraceable
from forwardgrad.engines.snapshot import Snapshot
from forwardgrad.engines.step_survey import ModelSurvey, StepSurvey
from forwardgrad.estimators import Estimate

MOST_GRAPHS = 8  # graphs that a step may have: one for every shape of batch and setting of the model
TRIES = 3  # steps in which a graph is compared with the eager step before it is given up: d may be near zero by chance
NOISE = 30  # times its precision, a gradient is nothing else beside those of the other parameters
GRAPH_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}

Run = Callable[[StepSurvey], Estimate]


class Engine(ABC):
    """Takes the first step with a new kind of batch eagerly, makes a graph of it, and lets the graph take the following ones.

    The graph is compared with the eager step on the same numbers before it is used: the loss, the derivatives, all of the gradient or of
    the parameters' moves, the buffers and the state, each by its norm, have to agree to GRAPH_TOLERANCE of the least precise type that is
    computed in.
    Where there is no graph to be had, one warning says why, and steps are eager.

    `preparing` is how many seconds went into graphs so far, and not into steps: a step in which a graph is made counts as long as the graph
    takes for it, since all that is loaded and seen for the first time in it says nothing of the others. `fallback` says why some steps are
    eager that should be graphs, and is empty where none are.
    """

    name: ClassVar[str]

    def __init__(self, step: EagerStep, limit: float | None = None) -> None:
        self.step, self.limit = step, limit
        self._runs: dict[Hashable, Run] = {}
        self._tries: dict[Hashable, int] = {}
        self._model: ModelSurvey | None = None
        self._again: tuple[Hashable, Run] | None = None
        self._late = set[Hashable]()
        self._given_up, self.fallback, self.preparing = False, "", 0.0
        self._firsts: list[float] = []  # seconds that count of the steps in which a graph was made

    @abstractmethod
    def _build(self, survey: StepSurvey, batch: Batch, plan: Plan, moves: bool) -> tuple[Run, torch.dtype]:
        """The graph of a step, with the optimizer's move if `moves`, and the least precise type in it."""

    @abstractmethod
    def _moves(self) -> bool:
        """Whether the optimizer's move can be in the graph."""

    def take(self, batch: Batch) -> Estimate:
        """A whole step."""
        return self._timed(self._taken, batch)

    def gradient(self, batch: Batch) -> Estimate:
        """The estimate of a step alone, in `.grad`: the optimizer is left to the caller."""
        return self._timed(self._estimated, batch)

    def _timed(self, call: Callable[[Batch], Estimate], batch: Batch) -> Estimate:
        began, firsts = perf_counter(), len(self._firsts)
        record = call(batch)
        if len(self._firsts) > firsts:
            self.preparing += perf_counter() - began - self._firsts[-1]
        return record

    def _estimated(self, batch: Batch) -> Estimate:
        return self.step.gradient(batch) if self._given_up else self._part(batch, self.step.gradient, moves=False)

    def _taken(self, batch: Batch) -> Estimate:
        if self._given_up:
            return self.step.eagerly(batch)
        if self._moves():  # asked anew at every step: an optimizer's settings may change
            return self._part(batch, self.step.eagerly, moves=True)
        return self.step.eagerly(batch, lambda batch: self._part(batch, self.step.gradient, moves=False))

    def _part(self, batch: Batch, eager: Callable[[Batch], Estimate], *, moves: bool) -> Estimate:
        try:
            survey = StepSurvey(self.step, batch, self._model)
        except Opaque as reason:
            self._give_up(str(reason))
            return eager(batch)
        self._model = survey.model
        key = moves, survey.key, self._pinned(survey, moves)
        if survey.hooked:
            self._give_up("a module has hooks, which a graph would not call")
        elif (run := self._found(key)) is not None:
            with _without_recording():
                return run(survey)
        elif key in self._late:
            pass
        elif len(self._runs) >= MOST_GRAPHS:
            self._warn(f"there are {MOST_GRAPHS} graphs already, and this batch or setting of the model is another kind")
        else:
            return self._first(key, survey, batch, eager, moves)
        return eager(batch)

    def _found(self, key: tuple[Hashable, ...]) -> Run | None:
        """The graph for a key: nearly always that of the step before, of which the parts are the same objects and need no hash."""
        if self._again is None or self._again[0] != key:
            run = self._runs.get(key)
            self._again = None if run is None else (key, run)
        return None if self._again is None else self._again[1]

    def _pinned(self, survey: StepSurvey, moves: bool) -> Hashable:
        """What a graph depends on besides the key of a survey."""
        return None

    def _first(self, key: Hashable, survey: StepSurvey, batch: Batch, eager: Callable[[Batch], Estimate], moves: bool) -> Estimate:
        """Take the step eagerly, make a graph of it, and take it once more with the graph; where that fails the eager step counts."""
        # The step is taken twice from the same start, so all that it changes is kept, put back between the two, and put back to what the
        # eager step left where the graph is not used: otherwise a step that was compared would count twice.
        before, started = Snapshot(survey), perf_counter()
        with planned() as plan:
            record = eager(batch)
        self._firsts.append(perf_counter() - started)
        before.keep_state()
        later = StepSurvey(self.step, batch)
        after, kept = Snapshot(later), False
        try:
            now = moves, later.key, self._pinned(later, moves)
            if now != key:  # a state was filled, or a buffer took another form: the next step will do
                raise Different("the state of the estimator or the model has another form after every step")
            before.restore()
            with warnings.catch_warnings(), _without_recording():
                warnings.simplefilter("ignore")
                run, lowest = self._build(survey, batch, plan, moves)
                before.restore()
                started = perf_counter()
                found = run(survey)
                graph_seconds = perf_counter() - started
            self._compare(record, found, before, after, moves, lowest)
            self._runs[key], self._firsts[-1], kept = run, graph_seconds, True
        except Different as reason:
            self._try(key, reason)
        except Untraceable as reason:
            self._give_up(str(reason))
        except Late:
            self._late.add(key)
            self._warn(f"the compiler had not finished after compile_limit={self.limit:g} s, for steps of this kind")
        except Exception as reason:  # a compiler's errors are of many kinds
            self._give_up(f"{type(reason).__name__}: {[*str(reason).strip().splitlines(), 'no reason given'][0]}")
        finally:
            if not kept:
                after.restore()
        return found if kept else record

    def _compare(self, record: Estimate, found: Estimate, before: Snapshot, after: Snapshot, moves: bool, lowest: torch.dtype) -> None:
        """Raise Different where what the graph just did is not what the eager step did."""
        now, tolerance = Snapshot(StepSurvey(self.step, Batch())), GRAPH_TOLERANCE.get(lowest, 1e-4)
        precision = torch.finfo(record.loss.dtype).eps
        # a difference of losses over a small step has their rounding in it, many times over
        blown = precision * float(record.loss.abs()) / getattr(self.step.estimator, "epsilon", math.inf)
        _close("the losses", [found.loss], [record.loss], tolerance, tolerance)
        _close("the derivatives", [found.derivatives], [record.derivatives], tolerance, 8 * blown)
        scale = float(torch.linalg.vector_norm(record.derivatives.double())) if record.derivatives.numel() else 0.0
        relative = tolerance + (8 * blown / scale if scale else 0.0)
        end, noise = len(now.tensors), _noise(self.step.optimizer, min(tolerance, NOISE * torch.finfo(lowest).eps)) if moves else set()
        if not moves:
            one, other = ([g for _, g in shot.gradients if g is not None] for shot in (now, after))
            _close("the gradients", one, other, relative)
        for index, (start, value, got) in enumerate(zip(before.values[:end], after.values[:end], now.values, strict=True)):
            if not value.is_floating_point():
                if not torch.equal(value, got):
                    raise Different("a counter of the model or the state differs from the eager step's")
                continue
            if id(now.tensors[index]) in noise:
                continue
            wide = torch.promote_types(value.dtype, torch.float32)
            rounding = 2 * torch.finfo(value.dtype).eps * _norm([value])
            what = "the parameters" if isinstance(now.tensors[index], torch.nn.Parameter) else "the buffers or the state"
            _close(what, [got.to(wide) - start.to(wide)], [value.to(wide) - start.to(wide)], relative, rounding)
        if self.step.generator is not None and not torch.equal(after.generator, now.generator):  # type: ignore[arg-type]
            raise Different("the generator is in another state than after the eager step")

    def _try(self, key: Hashable, reason: Exception) -> None:
        self._tries[key] = self._tries.get(key, 0) + 1
        if self._tries[key] >= TRIES:
            self._give_up(str(reason))

    def _give_up(self, reason: str) -> None:
        self._given_up = True
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        if not self.fallback:
            self.fallback = reason
            warnings.warn(f"engine={self.name!r} falls back to eager steps: {reason}", stacklevel=5)


class Different(Exception):
    """How a graph differs from the eager step, as the end of a sentence."""


def _noise(optimizer: torch.optim.Optimizer, relative: float) -> set[int]:
    """Parameters whose gradient is rounding alone, as of a bias in front of batch normalisation: Adam makes moves of any size of it."""
    means = {id(p): _norm([kept["exp_avg"]]) for p, kept in optimizer.state.items() if "exp_avg" in kept}
    return {key for key, size in means.items() if size <= relative * math.hypot(*means.values())}


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(torch.linalg.vector_norm(t.double())) ** 2 for t in tensors))


def _close(what: str, found: Sequence[Tensor], wanted: Sequence[Tensor], relative: float, absolute: float = 0.0) -> None:
    if len(found) != len(wanted):
        raise Different(f"{what} have other parts than the eager step's")
    size, off = _norm(wanted), _norm([one.double() - other.double() for one, other in zip(found, wanted, strict=True)])
    if not off <= relative * size + absolute:
        raise Different(f"{what} differ from the eager step's by {off:.1e} of {size:.1e}, more than {relative:.0e} of it")


@contextmanager
def _without_recording() -> Iterator[None]:
    """Nothing is recorded for a backward pass, and no autocast beyond what is written into a graph."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
        return
    with torch.no_grad():
        yield
