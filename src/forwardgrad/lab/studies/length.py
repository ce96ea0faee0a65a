"""How long a run trains, in the unit that a comparison holds equal. Loads without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies.run import Run, check_positive, identity

BACKWARD = 2  # forward passes that a backward pass counts for


@dataclass(frozen=True)
class Pace:
    """What a run takes: seconds and forward passes of work for a step, and seconds for the evaluation of 1,000 examples."""

    seconds: float
    forward_passes: float
    evaluation: float = 0.0


@dataclass(frozen=True)
class Length:
    """How long a run trains, in exactly one unit: epochs, optimizer steps, seconds of training, or forward passes.

    Seconds and forward passes become a number of steps before the first run, from the pace of each arm in a timed warm-up. So the run
    itself is as repeatable as any, and its learning rate can be annealed over it. The pace is stored with the study, and the same command
    goes on with the same numbers of steps. A backward pass counts as two forward passes.
    """

    epochs: int | None = None
    steps: int | None = None
    seconds: float | None = None
    forward_passes: int | None = None

    def __post_init__(self) -> None:
        if len(self.given) != 1:
            raise UserError(f"a length has one unit: epochs, steps, seconds or forward_passes, not {', '.join(self.given) or 'none'}")
        for name, value in self.given.items():
            check_positive(value, f"the length in {name.replace('_', ' ')}")

    @property
    def given(self) -> dict[str, Any]:
        """The unit and its number, as a study's record keeps them."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @property
    def measured(self) -> bool:
        """Whether a pace is needed."""
        return self.seconds is not None or self.forward_passes is not None

    def of(self, run: Run, pace: Callable[[Run], Pace]) -> Run:
        """The run with this length."""
        if self.epochs is not None:
            return dataclasses.replace(run, epochs=self.epochs, steps=None)
        if self.steps is not None:
            return dataclasses.replace(run, steps=self.steps)
        found = pace(run)
        each, whole = (found.seconds, self.seconds) if self.seconds is not None else (found.forward_passes, self.forward_passes)
        return dataclasses.replace(run, steps=max(1, int((whole or 0) / each)))


def unpaced(run: Run) -> Pace:
    """The pace where none is measured."""
    raise UserError(f"a length in seconds or forward passes needs the pace of {run.model}, and nothing measures one here")


def paced_alike(run: Run) -> str:
    """A name that all runs share whose steps cost the same: seed, length and the optimizer's numbers do not matter."""
    same = (
        run.data,
        run.model,
        run.loss,
        run.estimator,
        run.optimizer.name,
        _kinds(run.optimizer.options),
        run.batch_size,
        run.precision,
        run.engine,
    )
    extra = (run.optimizer.cap is not None, run.optimizer.weight_decay > 0, run.code)
    later = [run.augment] if run.augment else []  # paces that were stored before it keep their name
    return identity({"pace of": [*same, *extra, *later]})


def _kinds(options: dict[str, Any] | None) -> dict[str, Any]:
    """An optimizer's options but for its numbers, which change no step's cost."""
    return {name: None if type(value) in (int, float) else value for name, value in (options or {}).items()}
