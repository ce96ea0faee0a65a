"""A study: a fair comparison of arms.

Arms have the same budget. They are tuned on validation data, their winners are trained on fresh seeds, and the test set is read once.
A recipe or a user's function returns a `Study`. `forwardgrad.lab.tuning` carries it out and stores it in OUT/studies/<name>.json.
Neither needs torch.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, Literal

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import import_path, space
from forwardgrad.lab.studies.length import Length, Pace, unpaced
from forwardgrad.lab.studies.run import Engine, Optimizer, Precision, Run, check_choice
from forwardgrad.lab.studies.space import Point, Space

TUNING_SEED = 10_000  # trials never share a split, an initialisation or a direction with the final runs, whose seeds count from 0
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")  # of a study: it is a file's name

Sampler = Literal["grid", "halton", "optuna"]
ChosenBy = Literal["loss", "accuracy", "time"]


@dataclasses.dataclass(frozen=True)
class Published:
    """What the paper prints for an arm: the loss of the last 16 shuffled test images after so many epochs."""

    epochs: int
    test_loss: float


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm of a study. Arms of one `group` are compared with one another.

    `space` maps hyperparameters to the values of a grid or to a range (`studies.space`). A name is a field of the optimizer ("lr"),
    of the run ("batch_size"), of the estimator ("estimator.tangents") or an option of a user's optimizer ("optimizer.nesterov").
    `kind` is how the report tells arms apart, by colour and by mark; it sets "forward" and "backprop" beside one another.
    `full_epochs` is what fewer epochs are a shortened run of, where nothing is published.
    """

    name: str
    group: str
    kind: str
    label: str
    run: Run
    space: Space = dataclasses.field(default_factory=dict)
    published: Published | None = None
    full_epochs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "space", {name: tuple(values) if isinstance(values, list) else values for name, values in self.space.items()}
        )
        for name, values in self.space.items():
            if not isinstance(values, (tuple, space.Range)):
                raise UserError(f"the space of {self.name!r} has {values!r} for {name!r}: give a tuple of values, or a range")

    def at(self, point: Point) -> Run:
        """The arm's run with these hyperparameters; UserError for a name or a value that there is not."""
        run = self.run
        for name, value in point.items():
            run = _with(run, name, value)
        return run


def _with(run: Run, name: str, value: Any) -> Run:
    where, _, option = name.rpartition(".")
    if where == "estimator":
        return dataclasses.replace(run, estimator={**run.estimator, option: value})
    if where == "optimizer":
        return dataclasses.replace(
            run, optimizer=dataclasses.replace(run.optimizer, options={**(run.optimizer.options or {}), option: value})
        )
    for part in (run.optimizer, run):
        if not where and name in {field.name for field in dataclasses.fields(part)} - {"name", "seed", "test", "optimizer"}:
            changed = dataclasses.replace(part, **{name: value})
            return changed if isinstance(changed, Run) else dataclasses.replace(run, optimizer=changed)
    known = ", ".join(field.name for field in dataclasses.fields(Optimizer) if field.name not in ("name", "options"))
    raise UserError(f"no hyperparameter is called {name!r}: name one of the optimizer's ({known}), batch_size, or estimator.OPTION")


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms with the same budget of tuning, and the seeds of their final runs.

    Args:
        name: also the name of its file; arms of a study of the same name that were run before are kept.
        title: what the report calls it.
        arms: what is compared.
        seeds: final runs of every arm, on seeds 0, 1, … : split, initialisation, order and directions all differ.
        tuning: how long every trial trains; None for as long as its run says, where the length is what is searched.
        training: how long every final run trains; None for as long as the arm's run says.
        trials: points tried in the space of every tuned arm; None for all points of its grid.
        sampler: where those points lie: all of the grid, quasi-randomly, or where Optuna's TPE asks for them.
        widen: how often a winner on the edge of its space may have the space widened. Each time every arm of its group gets the same
            number of further trials. A winner that still lies on an edge is flagged.
        chosen_by: what of a trial decides, on validation data. At its end the least "loss", or the highest "accuracy" (of equal ones the
            lesser loss); or the "time", in seconds of training, to the first evaluation at `target` plus `margin` (where no trial comes
            there, the accuracy at the end). Take what the study compares.
        target: the validation accuracy that arms race to, where trials are chosen by time.
        margin: how far above it trials have to come, as what just does on one seed does not on every other.
    """

    name: str
    title: str
    arms: tuple[Arm, ...]
    seeds: int = 1
    tuning: Length | None = Length(epochs=10)  # noqa: RUF009 - frozen
    training: Length | None = None
    trials: int | None = None
    sampler: Sampler = "grid"
    widen: int = 0
    chosen_by: ChosenBy = "loss"
    target: float | None = None
    margin: float = 0.0

    def __post_init__(self) -> None:
        check_choice(self.sampler, Sampler, "sampler")
        check_choice(self.chosen_by, ChosenBy, "way to choose a trial")
        if not NAME.fullmatch(self.name):
            raise UserError(f"the name of a study is letters, digits, dots, dashes and underscores, not {self.name!r}")
        for what, value, least in (("seeds", self.seeds, 1), ("trials", self.trials, 1), ("rounds of widening", self.widen, 0)):
            if value is not None and (type(value) is not int or value < least):
                raise UserError(f"the number of {what} must be a whole number and at least {least}, not {value!r}")
        if (self.chosen_by == "time") != (self.target is not None):
            raise UserError("a target goes with trials chosen by time, and trials chosen by time need one: give both, or none")
        if self.target is not None and not 0 < self.target <= self.target + self.margin <= 1:
            raise UserError(f"the target is a share of the validation split, and so is target + margin, not {self.target} + {self.margin}")
        for what, length in (("tuning", self.tuning), ("training", self.training)):
            if length is not None and not isinstance(length, Length):
                raise UserError(f"{what} is a length, such as Length(epochs=2), not {length!r}")
        names = [arm.name for arm in self.arms]
        if not names or len(set(names)) < len(names):
            raise UserError(f"every arm of a study needs a name of its own: {', '.join(names) or 'there is no arm'}")
        if self.sampler == "grid" and self.trials is not None:
            raise UserError("a grid is tried as a whole: leave the number of trials out, or take the sampler halton or optuna")
        if self.sampler != "grid" and self.trials is None:
            raise UserError(f"say how many trials the {self.sampler} sampler may ask for")
        for arm in self.arms:
            for name, values in arm.space.items():
                if isinstance(values, tuple) and not all(isinstance(value, (int, float, str)) for value in values):
                    raise UserError(f"the space of {arm.name!r} has {values} for {name!r}: give numbers, words, or True and False")
        for group in {arm.group for arm in self.arms}:
            budgets = {self.budget(arm) for arm in self.arms if arm.group == group and arm.space}
            if len(budgets) > 1:
                raise UserError(f"unequal tuning budgets in {group!r}: {sorted(budgets)} points; give every tuned arm the same number")

    def budget(self, arm: Arm) -> int:
        """How many points of an arm's space are tried, before any widening."""
        if not arm.space:
            return 0
        if self.trials is None:
            return len(space.grid(arm.space))
        whole = math.inf if self.sampler == "optuna" else space.size(arm.space)
        return int(min(whole, self.trials or 0))

    def points(self, arm: Arm) -> list[Point]:
        """The points of an arm that are known beforehand: none where Optuna asks for them."""
        if not arm.space or self.sampler == "optuna":
            return []
        if self.trials is None:
            return space.grid(arm.space)
        return space.sampled(arm.space, self.trials, f"{self.name}/{arm.name}")

    def trial(self, arm: Arm, point: Point, pace: Callable[[Run], Pace] = unpaced) -> Run:
        """The run that tries a point: of the tuning seed, and without a look at the test split."""
        run = dataclasses.replace(import_path.signed(arm.at(point)), seed=TUNING_SEED, test=False)
        return self.tuning.of(run, pace) if self.tuning else run

    def final(self, arm: Arm, point: Point, seed: int, pace: Callable[[Run], Pace] = unpaced) -> Run:
        """A run of an arm's winner on a fresh seed."""
        run = dataclasses.replace(import_path.signed(arm.at(point)), seed=seed)
        return self.training.of(run, pace) if self.training else run

    def computed(self, precision: Precision = "float32", engine: Engine = "eager") -> Study:
        """The same study with the layers of every run in this precision, and its steps taken by this engine."""
        arms = tuple(dataclasses.replace(arm, run=dataclasses.replace(arm.run, precision=precision, engine=engine)) for arm in self.arms)
        return dataclasses.replace(self, arms=arms)


def check(study: Study) -> None:
    """Find every mistake that can be found before anything runs: hyperparameters, values, and the user's own code."""
    for arm in study.arms:
        import_path.signed(arm.run)
        ends = {name: values if isinstance(values, tuple) else (values.low, values.high) for name, values in arm.space.items()}
        if empty := [name for name, values in ends.items() if not values]:
            raise UserError(f"the arm {arm.name!r} has no value for {empty[0]!r} in its space")
        for name, values in ends.items():
            for value in values:
                arm.at({name: value})
        for point in study.points(arm):
            arm.at(point)


def logspace(low: float, high: float, count: int) -> tuple[float, ...]:
    """`count` values from 10^low to 10^high, evenly spaced in the exponent, to six significant digits."""
    return tuple(float(f"{10 ** (low + (high - low) * i / (count - 1)):.6g}") for i in range(count))
