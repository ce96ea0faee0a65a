"""When a run is looked at: after which steps it is evaluated, measured and checked for divergence.

All of it follows from counts of steps, never from a clock. So a slow machine comes to the same results as a fast one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from forwardgrad.lab.studies import Run

CHECK_EVERY = 100  # steps between two checks for divergence
EARLY, LATE = 1000, 500  # up to the first, every step that is looked at is measured; after that one in so many
FIRST_EVALUATIONS = (50, 100, 200, 400)  # steps; then every epoch ...
MOST_EVALUATIONS = 100  # ... or every so many, where a small data set has more epochs than that


@dataclass(frozen=True)
class Schedule:
    """The steps of one run: how many an epoch has, how many there are in all, and which of them are looked at.

    `every` is how many steps lie between two evaluations, where a run says so.
    """

    per_epoch: int
    total: int
    every: int | None = None

    @classmethod
    def of(cls, run: Run, examples: int) -> Schedule:
        """The schedule of a run that trains on so many examples."""
        per_epoch = math.ceil(examples / run.batch_size)
        return cls(per_epoch, run.steps or run.epochs * per_epoch, run.evaluate_every)

    @cached_property
    def evaluations(self) -> frozenset[int]:
        """The steps after which a run is evaluated: a few early ones, then every epoch, or every so many where there are more than 100.

        Where the run says how often, after every so many steps and at the end.
        """
        if self.every:
            return frozenset({*range(self.every, self.total, self.every), self.total})
        every = self.per_epoch * math.ceil(self.total / self.per_epoch / MOST_EVALUATIONS)
        early = {step for step in FIRST_EVALUATIONS if step < min(self.per_epoch, self.total)}
        return frozenset(early | set(range(every, self.total + 1, every)) | {self.total})

    def is_measured(self, step: int) -> bool:
        """Whether the length of this step, and how far the parameters' norm has grown by then, are noted."""
        return step in self.evaluations or step <= EARLY or step % LATE == 0

    def is_checked(self, step: int) -> bool:
        """Whether divergence is looked for after this step."""
        return step % CHECK_EVERY == 0 or step == self.total

    def next_look(self, step: int) -> int:
        """The first step after this one that is looked at in any way."""
        return min(look for look in (*self.evaluations, step - step % CHECK_EVERY + CHECK_EVERY, self.total) if look > step)

    def epoch(self, step: int) -> int:
        """The epoch that is under way after this step, counted from 0."""
        return step // self.per_epoch

    def end_of_epoch(self, step: int) -> int:
        """The step that ends the epoch under way."""
        return step - step % self.per_epoch + self.per_epoch
