"""Plans the runs of a study: the trial of each point of a space, and the final runs of a winner.

Carrying a study out and counting its cost plan with the same object. It trains nothing. Loads without torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from forwardgrad.lab.store import Store, records
from forwardgrad.lab.studies import Arm, Pace, Point, Run, Study, check, paced_alike, unpaced

Trial = tuple[Point, Run]


class Planner:
    """Makes the runs of one study, each of the length that the study gives it.

    A length in seconds or forward passes needs the pace of a run. `measure` takes it, once for all runs whose steps cost the same. What was
    measured before in this store is not measured again.

    Raises UserError for a study with a mistake in it.
    """

    def __init__(self, study: Study, store: Store, measure: Callable[[Run], Pace] = unpaced) -> None:
        check(study)
        self.study, self._measure = study, measure
        self.paces = records.paces(store, study.name)  # as a study's record keeps them

    def pace(self, run: Run) -> Pace:
        """What a step of a run costs."""
        key = paced_alike(run)
        if key not in self.paces:
            self.paces[key] = dataclasses.asdict(self._measure(run))
        return Pace(**self.paces[key])

    def trials(self, arm: Arm, points: Sequence[Point]) -> list[Trial]:
        """The runs that try points of an arm's space."""
        return [(point, self.study.trial(arm, point, self.pace)) for point in points]

    def finals(self, arm: Arm, winner: Point) -> list[Run]:
        """The runs of an arm's winner on fresh seeds."""
        return [self.study.final(arm, winner, seed, self.pace) for seed in range(self.study.seeds)]
