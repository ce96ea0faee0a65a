"""The output folder of one run: what is in it, whose it is, and what is written there while it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from forwardgrad.lab import store
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.finetuning.asked import FineTuning
from forwardgrad.lab.finetuning.kept import Fitting
from forwardgrad.lab.studies import identity

SCHEMA = 1
HEAD = ("step", "epoch", "seconds", "forward_passes", "loss")
OURS = ("run.json", "result.json", "log.csv", "log.jsonl", "losses.csv.gz")


class RunFolder:
    """OUT: run.json says whose it is, the log and the result lie beside it, `model` holds what was trained.

    `training` is there while the run is not finished: it holds the checkpoint, and belongs to one process at a time.

    Raises UserError where the folder holds something else, or another run. Nothing is written before `held`.
    """

    def __init__(self, out: Path, description: dict[str, Any], log: Literal["csv", "jsonl"]) -> None:
        self.out, self.description, self.log = out.absolute(), json.loads(json.dumps(description)), log
        self.name = identity(self.description)
        self.scratch = self.out / "training"
        self.checkpoint = self.scratch / "checkpoint.pt"
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"{out} is no folder: choose another one with --out")
        self._stored = store.read_json(self.out / "run.json") if self.out.is_dir() else None
        if self._stored is None:
            if self.out.is_dir() and {path.name for path in self.out.iterdir()} - {"training", "training.lock"}:
                raise UserError(f"{out} holds other files, and no run of fine-tuning: choose another folder with --out")
        elif self._stored.get("asked") != self.description:
            raise UserError(f"{out} holds another run{self._difference()}: choose another folder with --out, or delete that one")

    def _difference(self) -> str:
        """What differs first, in words."""
        theirs = (self._stored or {}).get("asked") or {}
        for name in self.description:
            if theirs.get(name) != self.description[name]:
                return f" (its {name.replace('_', ' ')} is {json.dumps(theirs.get(name))}, not {json.dumps(self.description[name])})"
        return ""

    def steps(self) -> int | None:
        """How many steps the run in the folder has, None where none was begun."""
        return None if self._stored is None else int(self._stored["steps"])

    def result(self) -> dict[str, Any] | None:
        """The result of the run, None where it has none."""
        return store.read_json(self.out / "result.json") if self.out.is_dir() else None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder: no other process trains here meanwhile."""
        with store.alone(self.scratch):
            for name in OURS:
                for half in self.out.glob(f".{name}.*"):  # left by a run that was killed while it wrote
                    half.unlink(missing_ok=True)
            yield

    def begin(self, steps: int, here: dict[str, Any], asked: FineTuning) -> int:
        """Write what the run is, unless it stands there already, and return the number of its steps."""
        paths = [asked.model, asked.data, asked.validation, self.out, *([Path(asked.score.rpartition(":")[0])] if asked.score else [])]
        for path in paths:
            if path is not None and path.is_absolute():
                here["command"] = here["command"].replace(str(path), path.name)  # where files lie on a machine is nobody's business
        self.here = here
        stored = store.read_json(self.out / "run.json")
        if stored is None:
            stored = {"schema": SCHEMA, "asked": self.description, "steps": steps}
            store.write_json(self.out / "run.json", stored)
        return int(stored["steps"])

    def write_log(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write the log whole: a row for every evaluation."""
        if self.log == "jsonl":
            store.write_whole(self.out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
            return
        columns = list(dict.fromkeys([*HEAD, *(name for row in rows for name in row)]))
        store.write_table(self.out / "log.csv", columns, ([row.get(name) for name in columns] for row in rows))

    def finish(self, fitting: Fitting, result: dict[str, Any]) -> None:
        """Write the losses of all steps and last of all the result; what only an unfinished run needs is deleted."""
        losses = ([i + 1, f"{value:.9g}"] for i, value in enumerate(fitting.losses[: fitting.step].tolist()))
        store.write_table(self.out / "losses.csv.gz", ("step", "loss"), losses)
        store.write_json(self.out / "result.json", {**result, "environment": self.here})
        shutil.rmtree(self.scratch, ignore_errors=True)
