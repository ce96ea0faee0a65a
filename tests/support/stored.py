"""Stores made up for the tests of reports: runs with results that never were trained, and what a report says of them."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import Any

from forwardgrad.lab.report import document
from forwardgrad.lab.report.figures.drawing import Drawing
from forwardgrad.lab.store.files import write_json, write_table
from forwardgrad.lab.store.run_files import read_result, write_result
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.run import SCHEMA, Run, to_json
from forwardgrad.lab.studies.study import Arm, Study

ENVIRONMENT = {
    "forwardgrad": "0.1.0",
    "commit": "abc123def456",
    "command": "forwardgrad reproduce",
    "python": "3.11.9",
    "torch": "2.11.0",
    "platform": "Linux x86_64",
    "device": "A Processor",
    "threads": 2,
    "cores": 8,
}


def put(store: Store, run: Run, test_loss: float | None, *, steps: int = 400, diverged: str | None = None, accuracy: float = 0.9) -> None:
    """A finished run: losses fall from 2.3 to `test_loss`, the validation loss halves its way every 50 steps, a step takes 2 ms."""
    folder = store.folder(run.identity)
    folder.mkdir(parents=True, exist_ok=True)
    end = 5.0 if test_loss is None else test_loss
    loss = [end + (2.3 - end) * math.exp(-5 * i / steps) * (1 + 0.2 * math.sin(i * i)) for i in range(steps)]
    write_json(folder / "run.json", to_json(run))
    write_json(folder / "environment.json", ENVIRONMENT)
    write_table(folder / "losses.csv.gz", ["step", "loss"], ((i + 1, f"{value:.7g}") for i, value in enumerate(loss)))
    header = ["step", "epoch", "seconds", "validation_loss", "validation_accuracy"]
    at = dict.fromkeys(step for step in (50, 100, 200, 400, steps) if step <= steps)
    write_table(folder / "evaluations.csv", header, [[s, s / 400, s * 0.002, end + (2.3 - end) / 2 ** (s / 50), 0.5] for s in at])
    spread = {"last16": test_loss, "last16_low": test_loss and test_loss / 2, "last16_high": test_loss and test_loss * 2}
    result = {
        "status": "diverged" if diverged else "finished",
        "reason": diverged,
        "diverged_at": steps if diverged else None,
        "steps": steps,
        "epochs": float(run.epochs),
        "parameters": 1000,
        "seconds": steps * 0.002,
        "validation_loss": test_loss,
        "validation_accuracy": accuracy,
        "test": {"loss": test_loss, "accuracy": accuracy, "examples": 10000, **spread} if run.test else None,
    }
    write_result(folder, result)


def timed(store: Store, run: Run, begun: float, told: float) -> None:
    """Set when a run began, and when it last said something or ended."""
    folder = store.folder(run.identity)
    os.utime(folder / "run.json", (begun, begun))
    for name in ("status.json", "result.json"):
        if (folder / name).exists():
            os.utime(folder / name, (told, told))


def under_way(store: Store, run: Run, step: int, steps: int, seconds: float, validation: float | None) -> None:
    """A run that has begun and has no result yet."""
    folder = store.folder(run.identity)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", to_json(run))
    status = {"step": step, "steps": steps, "loss": 1.0, "validation_loss": validation, "seconds": seconds}
    write_json(folder / "status.json", status)


def fail(store: Store, run: Run, reason: str, *, steps: int = 0) -> None:
    """A run that failed before its first evaluation: a result, a description, a traceback, and no tables."""
    folder = store.folder(run.identity)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", to_json(run))
    write_json(folder / "environment.json", ENVIRONMENT)
    (folder / "error.txt").write_text(reason)
    nothing = dict.fromkeys(("diverged_at", "validation_loss", "validation_accuracy", "test"))
    counts = {"steps": steps, "epochs": 0.0, "parameters": 0, "seconds": 0.0}
    write_result(folder, {"status": "failed", "reason": reason, **counts, **nothing})


def undrawn(name: str, *_: object, **__: object) -> Drawing:
    """In place of `figures.curves`: drawing takes the most time of a report, and most tests do not look at it."""
    return Drawing(f'<svg id="{name}"></svg>', lambda: b"%PDF")


def seeds(arm: Arm, n: int) -> list[Run]:
    return [dataclasses.replace(arm.run, seed=seed) for seed in range(n)]


def vouch(store: Store, run: Run) -> None:
    """A result that vouches for the files beside it as they are now."""
    folder = store.folder(run.identity)
    write_result(folder, read_result(folder) or {})


def tried(study: Study, arm: Arm) -> list[tuple[dict[str, Any], Run]]:
    """Every trial of an arm: its point and its run."""
    return [(point, study.trial(arm, point)) for point in study.points(arm)]


def record(store: Store, study: Study, edge: tuple[str, ...] = ()) -> None:
    """The study as it is stored, every tuned arm having chosen the first point of its grid."""
    arms: list[dict[str, Any]] = []
    for arm in study.arms:
        trials = tried(study, arm)
        chosen = {"values": trials[0][0], "validation_loss": 0.25, "at_edge": list(edge)} if trials else {}
        arms.append(
            {
                "name": arm.name,
                "group": arm.group,
                "kind": arm.kind,
                "label": arm.label,
                "command": f"forwardgrad reproduce {study.name}",
                "published": dataclasses.asdict(arm.published) if arm.published else None,
                "space": {name: list(values) for name, values in arm.space.items()},
                "tuning_epochs": study.tuning.epochs if arm.space else 0,
                "trials": [{"values": values, "run": run.identity} for values, run in trials],
                "chosen": chosen or {"values": {}, "validation_loss": None, "at_edge": []},
                "runs": [run.identity for run in seeds(arm, study.seeds)],
            }
        )
    write_json(store.root / "studies" / f"{study.name}.json", {"schema": SCHEMA, "name": study.name, "title": study.title, "arms": arms})


def reported(store: Store) -> str:
    document.write(store)
    return (store.root / "report.md").read_text()


def row(markdown: str, table: str, group: str, arm: str) -> dict[str, str]:
    """The cells of one row of a table in report.md, by column."""
    lines = markdown[markdown.index(f"### {table}") :].splitlines()[2:]
    split = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[: lines.index("") if "" in lines else None]]
    return next(dict(zip(split[0], cells, strict=True)) for cells in split[2:] if cells[0] == group and arm in cells)
