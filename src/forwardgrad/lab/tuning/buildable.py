"""Whether runs can be built: missing data and parts that cannot be made are told before a record names the runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from forwardgrad.lab.data import Dataset
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import Run, paced_alike
from forwardgrad.lab.training import builders


def check_buildable(runs: Sequence[Run], data_dir: Path | None = None, directions: int = 1) -> None:
    """Load the data and build model, loss, estimator and optimizer of every run, on the processor. Nothing is trained or written.

    Runs that differ in numbers alone share one model here. Raises UserError for what a run could not begin with, and for an estimator whose
    directions so many ranks cannot divide.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(paced_alike(run), []).append(run)
    datasets: dict[str, Dataset] = {}
    with torch.random.fork_rng([]):
        for first, *others in alike.values():
            try:
                if first.data not in datasets:
                    datasets[first.data] = builders.dataset(first, torch.device("cpu"), data_dir)
                model = builders.started(first, datasets[first.data], data_dir)
                builders.loss(first)
                for run in (first, *others):
                    builders.check_divided(run, directions)
                    builders.optimizer(run.optimizer, model)
            except (UserError, OSError):
                raise
            except Exception as error:  # a user's own code can raise anything
                why = " ".join(str(error).split()) or "no message"
                said = f"{first.model} on {first.data} with {first.estimator['name']} cannot begin"
                raise UserError(f"{said}, its parts stop with {type(error).__name__}: {why}") from error
