"""What a store holds, as a report needs it: studies, their arms, and the runs of each that have finished. Loads without torch."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store.files import damaged, parse_json
from forwardgrad.lab.store.packed import LOSSES, SUMMARY, left_out, run_file
from forwardgrad.lab.store.run_files import Stored, beside, table_beside
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies import BACKWARD, Run, from_json, to_json


@dataclass(frozen=True)
class Done:
    """A run with a result; `files` are the digests of what lies beside it."""

    folder: Path
    result: dict[str, Any]
    environment: dict[str, Any]
    files: dict[str, str]
    reverse: bool = False  # whether a backward pass follows every forward one

    @property
    def passes(self) -> float | None:
        """The work of a run in forward passes, a backward pass counting as two. None where it was not counted."""
        made = self.result.get("forward_passes")
        return None if made is None else float(made) + (BACKWARD * int(self.result["steps"]) if self.reverse else 0)

    @property
    def diverged(self) -> bool:
        return bool(self.result["status"] == "diverged")

    @property
    def test_loss(self) -> float:
        return finite((self.result.get("test") or {}).get("loss"))

    @property
    def loss(self) -> float:
        """The test loss; infinite for a run that diverged or failed, whatever it measured at its end."""
        return self.test_loss if self.result["status"] == "finished" else math.inf

    @property
    def accuracy(self) -> float:
        value = (self.result.get("test") or {}).get("accuracy")
        return math.nan if value is None else float(value)

    @property
    def balanced_accuracy(self) -> float:
        """The mean over classes of the share of test examples that was classified rightly; NaN where that was not counted."""
        value = (self.result.get("test") or {}).get("balanced_accuracy")
        return math.nan if value is None else float(value)

    @property
    def validation_loss(self) -> float:
        return finite(self.result.get("validation_loss"))

    @property
    def seconds_per_step(self) -> float:
        return float(self.result["seconds"]) / max(1, int(self.result["steps"]))

    @property
    def replicas(self) -> int:
        """How many runs shared its seconds as one program."""
        return int(self.result.get("replicas", 1))

    @functools.cached_property
    def evaluations(self) -> dict[str, list[float]]:
        return self._columns("evaluations.csv", ("step", "epoch", "seconds", "validation_loss", "validation_accuracy"))

    @property
    def has_losses(self) -> bool:
        """Whether training losses were kept: not of a run that failed before its first, nor of one that was packed without them."""
        if left_out(self.folder, LOSSES):
            return run_file(self.folder, SUMMARY) is not None
        return self.result["status"] != "failed" or LOSSES in self.files

    def loss_summary(self) -> dict[str, Any] | None:
        """What `forwardgrad pack --thin` kept of the training losses; None for a run that has all of them."""
        if not left_out(self.folder, LOSSES) or (content := run_file(self.folder, SUMMARY)) is None:
            return None
        path = self.folder / SUMMARY
        stored = parse_json(path, content)
        if stored.pop("run", None) != self.folder.name:
            raise damaged(path, "it is of another run")
        return stored

    def losses(self) -> list[float]:
        """The training loss of every step, read anew at each call: those of a whole study would fill the memory."""
        return self._columns(LOSSES, ("step", "loss"))["loss"]

    def derivatives(self) -> list[float]:
        """The directional derivative of every step, empty for estimators that have none and for runs that did not keep it."""
        return self._columns(LOSSES, ("step", "loss")).get("derivative", [])

    @functools.cached_property
    def walk(self) -> dict[str, list[float]]:
        """Norm growth and relative step, every 100 steps at first and every 500 later; without columns for runs that did not keep them."""
        return table_beside(self.folder, "walk.csv", self.files)

    def _columns(self, name: str, wanted: tuple[str, ...]) -> dict[str, list[float]]:
        if left_out(self.folder, name):
            raise UserError(
                f"{name} of run {self.folder.name} was left out when {self.folder.parent.parent} was packed: "
                "train it again in another output folder, and put its folder beside the pack"
            )
        table = table_beside(self.folder, name, self.files)
        if not table and self.result["status"] == "failed":  # it ended before it could leave any
            return {column: [] for column in wanted}
        if missing := [column for column in wanted if column not in table]:
            raise damaged(self.folder / name, f"it has no column {missing[0]!r}" if table else "it is missing or empty")
        return table


@dataclass(frozen=True)
class ArmResult:
    """An arm of a stored study. `run` is the description of its runs, empty where none was begun."""

    study: str
    record: dict[str, Any]
    run: dict[str, Any]
    done: tuple[Done, ...]
    trials: tuple[dict[str, Any] | None, ...]  # results of the grid points, None for one without
    seeds: tuple[int, ...]

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
        if reason := self.record.get("no_winner"):
            return f"no winner ({reason})"
        return f"unfinished ({len(self.done)} of {self.planned} runs)"

    @property
    def shared(self) -> str:
        """Says how many runs shared their seconds as one program; empty where none did. Such times say nothing of a run alone."""
        most = max((done.replicas for done in self.done), default=1)
        return f"shared by {most} runs at once" if most > 1 else ""

    @property
    def shortened(self) -> str | None:
        """A label for runs of fewer epochs than the paper's, or than the full study's where nothing is published; None for the rest."""
        full = (self.record.get("published") or {}).get("epochs") or self.record.get("full_epochs")
        epochs, steps = self.run.get("epochs"), self.run.get("steps")
        if full and steps is not None:
            share = [float(run.result["epochs"]) / max(1, run.result["steps"]) * steps for run in self.done]
            return f"shortened: {steps:,} steps, {max(share):.2g} of {full} epochs" if share and max(share) < full else None
        if not full or epochs is None or epochs >= full:
            return None
        return f"shortened: {epochs} of {full} epochs"

    @property
    def terms(self) -> dict[str, Any]:
        """What a fair comparison holds equal between its arms."""
        return {
            "data": self.run.get("data"),
            "model": self.run.get("model"),
            **self._length,
            "batch size": self.run.get("batch_size"),
            "precision": self.run.get("precision", "float32"),
            "seeds": sorted(self.seeds),
            "grid points": len(self.record.get("trials") or []),
            "tuning epochs": self.record.get("tuning_epochs"),
            "tuning length": {unit: value for unit, value in (self.record.get("budget") or {}).items() if unit not in ("trials", "epochs")},
            "loss": self.run.get("loss"),
            "augment": self.run.get("augment"),
            "label smoothing": self.run.get("label_smoothing", 0.0),
        }

    @property
    def _length(self) -> dict[str, Any]:
        """How long every run trains, in the unit that the study holds equal. Where that is seconds or passes, steps follow from them."""
        given = self.record.get("training") or {}
        costs = {"seconds": given.get("seconds"), "forward passes": given.get("forward_passes")}
        steps = None if any(costs.values()) else self.run.get("steps")
        return {"epochs": None if steps or any(costs.values()) else self.run.get("epochs"), "steps": steps, **costs}

    @property
    def by_seed(self) -> dict[int, Done]:
        """The finished runs by their place among the planned ones. Runs of two arms at the same place share their seed."""
        places = {identity: place for place, identity in enumerate(self.record["runs"])}
        return {places[done.folder.name]: done for done in self.done}

    @property
    def data(self) -> str | None:
        return self.run.get("data")


@dataclass(frozen=True)
class StudyResult:
    """A stored study."""

    name: str
    title: str
    arms: tuple[ArmResult, ...]
    of: str = ""

    @property
    def family(self) -> str:
        """The name of the study that this is a further record of (`forwardgrad.lab.store.records`), else its own."""
        return self.of or self.name

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
    arms = tuple(_arm(record["name"], arm, store) for arm in record["arms"])
    return StudyResult(record["name"], record["title"], arms, record.get("of", ""))


def _arm(study: str, record: dict[str, Any], store: Store) -> ArmResult:
    begun = [(store.folder(identity), found) for identity in record["runs"] if (found := store.stored(identity)) is not None]
    runs = [described(folder, found) for folder, found in begun]
    ended = (_done(folder, found, run) for (folder, found), run in zip(begun, runs, strict=True))
    done = tuple(each for each in ended if each is not None)
    trials = tuple(store.result(trial["run"]) for trial in record["trials"])
    return ArmResult(study, record, to_json(runs[0]) if runs else {}, done, trials, tuple(run.seed for run in runs))


def _done(folder: Path, found: Stored, run: Run) -> Done | None:
    """A run with its result, None where it has none yet."""
    if found.result is None:
        return None
    return Done(folder, found.result, environment(folder, found), found.files, run.estimator["name"] == "backprop")


def finished(store: Store, identity: str) -> tuple[Run, Done] | None:
    """A single run and what came of it; None for one that was never begun or has no result yet."""
    if (found := store.stored(identity)) is None:
        return None
    run = described(folder := store.folder(identity), found)
    done = _done(folder, found, run)
    return None if done is None else (run, done)


def arrival(store: Store, identity: str, target: float) -> float:
    """Seconds of training to the first evaluation of a finished run with this validation accuracy; infinite where there is none."""
    found = store.stored(identity)
    table = {} if found is None else table_beside(store.folder(identity), "evaluations.csv", found.files)
    seen = zip(table.get("seconds", []), table.get("validation_accuracy", []), strict=True)
    return next((seconds for seconds, accuracy in seen if accuracy >= target), math.inf)


def described(folder: Path, found: Stored) -> Run:
    """The run that a stored description is of."""
    path = folder / "run.json"
    try:
        return from_json(found.description, str(path))
    except UserError as error:
        raise error if str(path) in str(error) else damaged(path, error) from error


def environment(folder: Path, found: Stored) -> dict[str, Any]:
    """Where a run was finished, empty where it did not say."""
    content = beside(folder, "environment.json", found.files)
    return {} if content is None else parse_json(folder / "environment.json", content)
