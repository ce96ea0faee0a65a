"""What a store holds, as a report needs it: studies, their arms, and the runs of each that have finished. Loads without torch."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.run import SCHEMA
from forwardgrad.lab.store import Store, read_json, read_table


@dataclass(frozen=True)
class Done:
    """A run with a result."""

    folder: Path
    result: dict[str, Any]
    environment: dict[str, Any]

    @property
    def diverged(self) -> bool:
        return bool(self.result["status"] == "diverged")

    @property
    def test_loss(self) -> float:
        return finite((self.result.get("test") or {}).get("loss"))

    @property
    def accuracy(self) -> float:
        value = (self.result.get("test") or {}).get("accuracy")
        return math.nan if value is None else float(value)

    @property
    def validation_loss(self) -> float:
        return finite(self.result.get("validation_loss"))

    @property
    def seconds_per_step(self) -> float:
        return float(self.result["seconds"]) / max(1, int(self.result["steps"]))

    @functools.cached_property
    def evaluations(self) -> dict[str, list[float]]:
        return read_table(self.folder / "evaluations.csv")

    def losses(self) -> list[float]:
        """The training loss of every step; not kept, because a study's worth of them is large."""
        return read_table(self.folder / "losses.csv.gz").get("loss", [])


@dataclass(frozen=True)
class ArmResult:
    """An arm of a stored study. `run` is the description of its runs, empty where none was begun."""

    study: str
    record: dict[str, Any]
    run: dict[str, Any]
    done: tuple[Done, ...]
    trials: tuple[dict[str, Any] | None, ...]  # results of the grid points, None for one without

    @property
    def name(self) -> str:
        return str(self.record["name"])

    @property
    def kind(self) -> str:
        return str(self.record["kind"])

    @property
    def label(self) -> str:
        return str(self.record["label"])

    @property
    def planned(self) -> int:
        return len(self.record["runs"])

    @property
    def complete(self) -> bool:
        return 0 < len(self.done) == self.planned

    @property
    def progress(self) -> str:
        return f"unfinished ({len(self.done)} of {self.planned} runs)"

    @property
    def shortened(self) -> str | None:
        """A label for runs of fewer epochs than the paper's, None for the rest."""
        published, epochs = self.record.get("published"), self.run.get("epochs")
        if not published or epochs is None or epochs >= published["epochs"]:
            return None
        return f"shortened: {epochs} of {published['epochs']} epochs"

    @property
    def data(self) -> str | None:
        return self.run.get("data")


@dataclass(frozen=True)
class StudyResult:
    """A stored study."""

    name: str
    title: str
    arms: tuple[ArmResult, ...]

    @property
    def groups(self) -> dict[str, list[ArmResult]]:
        """Arms that are compared with one another, in the order in which they were stored."""
        found: dict[str, list[ArmResult]] = {}
        for arm in self.arms:
            found.setdefault(str(arm.record["group"]), []).append(arm)
        return found


def finite(value: float | None) -> float:
    """A stored loss as a number: null means that it was not finite."""
    return math.inf if value is None or not math.isfinite(value) else float(value)


def studies(store: Store) -> list[StudyResult]:
    return [_study(record, store) for record in store.studies()]


def _study(record: dict[str, Any], store: Store) -> StudyResult:
    name = record.get("name")
    if record.get("schema") != SCHEMA:
        raise UserError(f"the study {name!r} in {store.root} was written by another version of forwardgrad: report it with that version")
    try:
        return StudyResult(str(name), str(record["title"]), tuple(_arm(str(name), arm, store) for arm in record["arms"]))
    except (KeyError, TypeError) as error:
        path = store.root / "studies" / f"{name}.json"
        raise UserError(f"{path} or a run that it names is damaged ({error!r}): run the study again") from error


def _arm(study: str, record: dict[str, Any], store: Store) -> ArmResult:
    _require(record, "name", "group", "kind", "label", "command", "runs")
    folders = [store.folder(identity) for identity in record["runs"]]
    description = next((found for folder in folders if (found := read_json(folder / "run.json"))), {})
    done = tuple(
        Done(folder, result, read_json(folder / "environment.json") or {})
        for folder in folders
        if (result := read_json(folder / "result.json")) is not None
    )
    for run in done:
        _require(run.result, "status", "steps", "seconds", "epochs")
    trials = tuple(store.result(trial["run"]) for trial in record.get("trials") or [])
    return ArmResult(study, record, description, done, trials)


def _require(stored: dict[str, Any], *keys: str) -> None:
    """Asked for at once, so that a damaged file is one sentence instead of a traceback later."""
    missing = [key for key in keys if key not in stored]
    if missing:
        raise KeyError(*missing)
