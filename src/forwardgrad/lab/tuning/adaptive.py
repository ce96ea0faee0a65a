"""Searches a space with Optuna's TPE sampler.

The laboratory's store stays the one truth. A command that goes on asks for every point again, from the same seed and after the same
results, so it gets the same points. Optuna's journal beside the study's record is written anew each time, for
`optuna-dashboard OUT/studies/NAME.journal`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import Arm, Point, Range, short, stream


class AdaptiveSearch:
    """The search of one arm. A trial that diverged or failed is told as failed: TPE has no place for an infinite loss."""

    def __init__(self, study: str, arm: Arm, journal: Path) -> None:
        self.optuna = _optuna()
        self.arm, self.name, self.asked, self.open = arm, f"{study}/{arm.name}", 0, []  # type: ignore[var-annotated]
        self.distributions = {name: self._distribution(values) for name, values in arm.space.items()}
        storage = self.optuna.storages
        backend = storage.journal.JournalFileBackend(str(journal))
        self.storage = storage.JournalStorage(backend)
        if self.name in [known.study_name for known in self.storage.get_all_studies()]:
            self.optuna.delete_study(study_name=self.name, storage=self.storage)
        self.study = self.optuna.create_study(study_name=self.name, storage=self.storage, direction="minimize")

    def _distribution(self, values: Any) -> Any:
        kinds = self.optuna.distributions
        if not isinstance(values, Range):
            return kinds.CategoricalDistribution(values)
        if values.integer:
            return kinds.IntDistribution(int(values.low), int(values.high), log=values.log)
        return kinds.FloatDistribution(values.low, values.high, log=values.log)

    def ask(self, count: int) -> list[Point]:
        """The next points, from a sampler whose seed follows from how many were asked for before."""
        self.study.sampler = self.optuna.samplers.TPESampler(
            seed=stream(0, f"{self.name} after {self.asked}") % 2**32, constant_liar=True, n_startup_trials=8
        )
        self.open = [self.study.ask(self.distributions) for _ in range(count)]
        self.asked += count
        return [{key: short(value) if isinstance(value, float) else value for key, value in trial.params.items()} for trial in self.open]

    def tell(self, ends: Sequence[float | None]) -> None:
        """What came of the points that were asked for last, in their order: the less the better; infinite or None is told as failed."""
        for trial, end in zip(self.open, ends, strict=True):
            if end is None or not math.isfinite(end):
                self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
            else:
                self.study.tell(trial, end)


def _optuna() -> Any:
    try:
        optuna = importlib.import_module("optuna")
    except ImportError as error:
        raise UserError(f"adaptive sampling needs Optuna, which cannot be imported ({error}): pip install 'forwardgrad[optuna]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
