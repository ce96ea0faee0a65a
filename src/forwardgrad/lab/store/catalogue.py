"""The stored runs as rows of one table: what was asked, what came of it, and which study wanted it. Loads without torch."""

from __future__ import annotations

import csv
import dataclasses
import fnmatch
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forwardgrad.lab.store.files import write_whole
from forwardgrad.lab.store.results import described, environment
from forwardgrad.lab.store.run_files import Stored
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies import format_estimator

RunRow = dict[str, Any]

# What a table shows: its heading, and the column of the rows that it is. What a narrow terminal can do without goes in this order:
SPARED = ("data", "optimizer", "steps", "seed", "model", "study", "seconds", "estimator")
SHOWN = {
    "identity": "identity",
    "study": "study",
    "arm": "arm",
    "data": "data",
    "model": "model",
    "estimator": "estimator",
    "optimizer": "optimizer.name",
    "lr": "optimizer.lr",
    "seed": "seed",
    "status": "status",
    "validation loss": "validation_loss",
    "test accuracy": "test_accuracy",
    "steps": "steps",
    "seconds": "seconds",
}
RENAMED = {"steps": "planned_steps", "test": "reads_test", "loss": "loss_function"}  # fields of a description that a result has too
RESULT = (
    "reason",
    "diverged_at",
    "steps",
    "epochs_run",
    "parameters",
    "seconds",
    "forward_passes",
    "peak_bytes",
    "initial_norm",
    "replicas",
    "compile_seconds",
    "fallback",
    "validation_loss",
    "validation_accuracy",
    "validation_balanced_accuracy",
    "validation_perplexity",
)
TEST = ("loss", "accuracy", "balanced_accuracy", "perplexity", "examples", "last16", "last16_low", "last16_high")
WHERE = ("commit", "torch", "device")
STATUSES = ("finished", "diverged", "failed", "unfinished")


@dataclass(frozen=True)
class Wanted:
    """Which rows are asked for; names may have the wildcards of a shell, and an empty tuple asks for all."""

    study: tuple[str, ...] = ()
    arm: tuple[str, ...] = ()
    status: str | None = None

    def __call__(self, row: RunRow) -> bool:
        named = any(_any(study, self.study) and _any(arm, self.arm) for study, arm in row["places"])
        return (named or not (self.study or self.arm)) and self.status in (None, row["status"])


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def rows(store: Store, wanted: Callable[[RunRow], bool] = lambda row: True, *, where: bool = False) -> list[RunRow]:
    """A row for every run that was begun, in the order of their studies; with `where` also the machine that it ran on.

    Raises UserError for a run or a study that is damaged.
    """
    places = _places(store)
    ordered = dict.fromkeys([*places, *(there := store.runs())])
    known = set(there)
    found = []
    for identity in ordered:
        if identity in known and (stored := store.stored(identity)) is not None:
            row = _row(store.folder(identity), stored, places.get(identity, []))
            if wanted(row):
                found.append({**row, **(_where(store.folder(identity), stored) if where else {})})
    return found


def _places(store: Store) -> dict[str, list[tuple[str, str, str]]]:
    """Of every run, the studies, arms and parts in them that it belongs to."""
    places: dict[str, list[tuple[str, str, str]]] = {}
    for study in store.studies():
        for arm in study["arms"]:
            for part, names in (("trial", [trial["run"] for trial in arm["trials"]]), ("final", arm["runs"])):
                for name in names:
                    places.setdefault(name, []).append((study["name"], arm["name"], part))
    return places


def _row(folder: Path, stored: Stored, places: Sequence[tuple[str, str, str]]) -> RunRow:
    asked, result = dataclasses.asdict(described(folder, stored)), stored.result or {}
    study, arm, part = ("; ".join(dict.fromkeys(place[i] for place in places)) for i in range(3))
    test = result.get("test") or {}
    return {
        "identity": folder.name,
        "study": study,
        "arm": arm,
        "part": part,
        "status": result.get("status", "unfinished"),
        "places": [(study, arm) for study, arm, _ in places],
        "estimator": format_estimator(asked["estimator"]),
        **dict(_flat(asked)),
        **{name: result.get("epochs" if name == "epochs_run" else name) for name in RESULT},
        **{f"test_{name}": test.get(name) for name in TEST},
        **{f"joules_{name}": used for name, used in result.get("joules", {}).items()},  # no column where no machine told
    }


def _flat(asked: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """A description's fields, those of its parts by their paths: optimizer.lr."""
    for name, value in asked.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield (prefix + name if prefix else RENAMED.get(name, name)), value


def _where(folder: Path, stored: Stored) -> RunRow:
    here = environment(folder, stored)
    return {name: here.get(name) for name in WHERE}


def ordered(found: Sequence[RunRow], by: str, *, reverse: bool) -> list[RunRow]:
    """The rows by one column of the table; those that have nothing there come last in either order."""
    have = [row for row in found if row.get(SHOWN[by]) is not None]
    return [*sorted(have, key=lambda row: row[SHOWN[by]], reverse=reverse), *(row for row in found if row.get(SHOWN[by]) is None)]


def write_csv(path: Path, found: Sequence[RunRow]) -> None:
    """Write one row a run, and a column for everything that is known.

    A field is empty where a run has no such value, or where its loss was not finite.
    """
    columns = [name for name in dict.fromkeys(name for row in found for name in row) if name != "places"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns or ["identity"])
    writer.writerows([_field(row.get(name)) for name in columns] for row in found)
    write_whole(path, text.getvalue().encode(errors="backslashreplace"))


def _field(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else "" if value is None else value


def fitting(found: Sequence[RunRow], width: int) -> list[int]:
    """The places of the columns that fit into a width, with two spaces between them. Columns that cannot be spared stay."""
    names, texts = list(SHOWN), [cells(row) for row in found]
    heads = [max(map(len, name.split())) for name in names]
    widths = [max([head, *(len(text[place]) for text in texts)]) for place, head in enumerate(heads)]
    kept = list(range(len(names)))
    for name in SPARED:
        if sum(widths[place] + 2 for place in kept) > width:
            kept.remove(names.index(name))
    return kept


def cells(row: RunRow) -> list[str]:
    """What a table shows of a row, on one line and without anything that a terminal would obey."""
    return ["".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in _shown(row.get(name))) for name in SHOWN.values()]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "not finite"
    return "" if value is None else str(value)
