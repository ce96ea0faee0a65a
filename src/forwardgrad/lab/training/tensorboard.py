"""Writes a run's curves for TensorBoard, where that is asked for: OUT/tensorboard/<identity>.

They are a copy for people. The laboratory reads nothing from them. A run that goes on from its checkpoint takes back what was written of
later steps, so that no step is there twice.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import Run
from forwardgrad.lab.training.builders import lr_factor
from forwardgrad.lab.training.training import Training

NOTED_SECONDS = 1.0  # between two points of the training loss
# from the fourth column of an evaluation
EVALUATED = ("validation/loss", "validation/accuracy", "walk/norm_growth", "walk/relative_step", "validation/balanced_accuracy")
WALKED = ("walk/norm_growth", "walk/relative_step")
FINAL = ("validation_loss", "validation_accuracy", "seconds", "steps", "forward_passes", "peak_bytes")


def installed() -> Any:
    """torch.utils.tensorboard; UserError where the package behind it is missing."""
    try:
        from torch.utils import tensorboard
    except ImportError as error:
        raise UserError(f"--tensorboard needs what is not installed ({error}): pip install 'forwardgrad[tensorboard]'") from error
    return tensorboard


class Board:
    """The events of one run. Without a folder it writes nothing."""

    def __init__(self, folder: Path | None, training: Training) -> None:
        self.run, self.state = training.run, training.state
        state = training.state
        self._writer = None
        if folder:
            _wait_for_a_later_name(folder)
            self._writer = installed().SummaryWriter(str(folder), purge_step=state.step + 1)
        self._evaluations, self._walk, self._step, self._noted = len(state.evaluations), len(state.walk), state.step, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer:
            self._writer.close()

    def note(self) -> None:
        """Write what is new: a training loss about once a second and at evaluations, and every row of the evaluations and the walk."""
        if self._writer is None:
            return
        state, evaluations = self.state, self.state.evaluations[self._evaluations :]
        seen = {row[0] for row in evaluations}
        for row in state.walk[self._walk :]:
            if row[0] not in seen:
                self._write(WALKED, row[1:], int(row[0]))
        for row in evaluations:
            self._write(EVALUATED, row[3:], int(row[0]))
        self._evaluations, self._walk = len(state.evaluations), len(state.walk)
        if state.step > self._step and (evaluations or time.monotonic() - self._noted >= NOTED_SECONDS):
            self._write(("train/loss",), [float(state.losses[self._step : state.step].mean())], state.step)
            rate = self.run.optimizer.lr * lr_factor(self.run.optimizer, len(state.losses))(state.step - 1)  # of the step just taken
            self._write(("train/learning_rate",), [rate], state.step)
            self._step, self._noted = state.step, time.monotonic()
            self._writer.flush()

    def flush(self) -> None:
        """Write to disk before a checkpoint what a run that goes on from it will not write again."""
        if self._writer:
            self._writer.flush()

    def end(self, result: dict[str, Any]) -> None:
        """Write the hyperparameters beside what came out, for TensorBoard's table of runs."""
        if self._writer is None:
            return
        test = result["test"] or {}
        found = {**{name: result.get(name) for name in FINAL}, **{f"test_{name}": test.get(name) for name in ("loss", "accuracy")}}
        final = {f"final/{name}": float(value) for name, value in found.items() if value is not None}
        for summary in installed().summary.hparams(hyperparameters(self.run), final):
            self._writer.file_writer.add_summary(summary, result["steps"])
        self._write(tuple(final), list(final.values()), result["steps"])

    def _write(self, names: tuple[str, ...], values: list[float], step: int) -> None:
        for name, value in zip(names, values, strict=True):
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)  # type: ignore[union-attr]


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait until a new file's name comes after those that are there.

    TensorBoard reads a run's files in the order of their names. A name tells first the second that the file was begun in and then the
    process: of two files of one second the later one may come first.
    """
    begun = [int(stamp) for path in folder.glob("events.out.tfevents.*") if (stamp := path.name.split(".")[3]).isdecimal()]
    time.sleep(min(1.0, max(0.0, max(begun, default=0) + 1 - time.time())))


def hyperparameters(run: Run) -> dict[str, bool | int | float | str]:
    """A run's description, flat: `optimizer.lr`, `estimator.name`."""
    flat: dict[str, bool | int | float | str] = {}
    for name, value in dataclasses.asdict(run).items():
        inner = {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        flat |= {key: part if isinstance(part, (bool, int, float, str)) else str(part) for key, part in inner.items()}
    return flat
