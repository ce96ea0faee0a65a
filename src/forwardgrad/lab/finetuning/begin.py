"""One run of fine-tuning from what was asked for to its result: everything is checked before the first file is written."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from forwardgrad.estimators import Estimator, ZerothOrder, from_config, to_config
from forwardgrad.lab import environment
from forwardgrad.lab.data import need
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.finetuning.asked import EPOCHS, FineTuning
from forwardgrad.lab.finetuning.customary import customary
from forwardgrad.lab.finetuning.fitting import train_to_end
from forwardgrad.lab.finetuning.kept import Fitting
from forwardgrad.lab.finetuning.memory_plan import MemoryPlan, check_weights, planned
from forwardgrad.lab.finetuning.model_folder import EXTRA, ModelFolder, build, check_folder, digest, read_folder, weight_bytes
from forwardgrad.lab.finetuning.outcomes import TextTask
from forwardgrad.lab.finetuning.rows import divided, read_table
from forwardgrad.lab.finetuning.run_folder import RunFolder
from forwardgrad.lab.finetuning.saving import save_model
from forwardgrad.lab.finetuning.scoring import Score, code_of_score
from forwardgrad.lab.finetuning.tokens import Examples, encode, length_of
from forwardgrad.lab.studies import find_here, import_path
from forwardgrad.lab.training import Schedule, order_of_epoch

Say = Callable[[str], None]
WARM_UP = (1, 5, 10.0)  # for a length in seconds: steps that are not timed, the most that are, and the seconds after which no other begins


class Prepared(NamedTuple):
    """What a run works with, all of it read and checked."""

    asked: FineTuning
    source: ModelFolder
    task: TextTask
    estimator: Estimator
    train: Examples
    validation: Examples | None
    description: dict[str, Any]


def finetune(
    asked: FineTuning,
    out: Path,
    *,
    device: str = "cpu",
    log: Literal["csv", "jsonl"] = "csv",
    plan_only: bool = False,
    checkpoint_seconds: float = 60.0,
    say: Say = print,
) -> dict[str, Any]:
    """Fine-tune a model, or go on with it, and return the result. A finished run is only read.

    `say` is told what a reader wants to know while it goes on. With `plan_only` nothing is trained and nothing is written: the result
    holds the plan.

    Raises UserError for whatever is wrong with the files and the options, and where the machine does not have the memory.
    """
    on = environment.device(device)
    need("transformers", EXTRA)
    if asked.lora:
        need("peft", EXTRA)
    with torch.random.fork_rng([on.index or 0] if on.type == "cuda" else []):
        ready = prepared(asked, on, say)
        check_weights(weight_bytes(asked.model, asked), on)
        if plan_only:
            plan, _ = _plan(ready, on, timed=False)
            say(plan.sentence())
            return {"status": "planned", "plan": dataclasses.asdict(plan)}
        folder = RunFolder(out, ready.description, log)
        if (done := folder.result()) is not None:
            say(f"this run is finished: {folder.out} has its result")
            return done
        plan, pace = _plan(ready, on, timed=ready.asked.seconds is not None and folder.steps() is None)
        say(plan.sentence())
        judge = Score(asked.score) if asked.score else None  # the user's own code is imported here and not before
        with folder.held():
            schedule = _schedule(ready, folder.begin(_steps(ready, pace), environment.describe(on), asked))
            model = build(ready.source, ready.asked, on)
            loss = ready.task.negated(judge) if judge else ready.task.loss
            fitting = Fitting.begin(ready.asked, model, ready.estimator, loss, schedule.total, on)
            if folder.checkpoint.exists():
                fitting.load(folder.checkpoint, folder.name)
                say(f"going on from step {fitting.step:,} of {schedule.total:,}")
            reason = train_to_end(fitting, ready.task, ready.train, ready.validation, schedule, folder, judge, say, checkpoint_seconds)
            saved = None if reason else save_model(fitting.model, ready.source, ready.asked, folder.out, folder.scratch)
            result = _result(ready, fitting, plan, reason, schedule)
            folder.finish(fitting, result)
            if saved:
                say(f"the model is in {saved}")
    return folder.result() or result


def prepared(asked: FineTuning, on: torch.device, say: Say) -> Prepared:
    """Read the files and complete what was asked for by what is customary for the task."""
    check_folder(asked.model)
    table = read_table(asked.data, asked, asked.task)
    outside = read_table(asked.validation, asked, table.task) if asked.validation else None
    kept, held = (table, outside) if outside else divided(table, asked.held_out, asked.seed)
    source = read_folder(asked.model, table.task, table.labels() if table.task == "classification" else ())
    asked = customary(asked)
    assert asked.estimator is not None
    estimator = _estimator(asked.estimator)
    asked = dataclasses.replace(asked, estimator=to_config(estimator))  # with every option, whatever the defaults come to be later
    if asked.score and not isinstance(estimator, ZerothOrder):
        raise UserError(f"a score has no derivative: with --score leave --estimator out, or take zeroth-order and not {estimator.name}")
    most = length_of(asked, source)
    train = encode(kept, source, most)
    validation = encode(held, source, most) if held else None
    task = TextTask(asked, source, on, most)
    rows = f"{len(train):,} rows to train on, {len(validation) if validation else 0:,} for validation"
    say(f"{source.task}: {rows}" + (f"; classes: {', '.join(source.classes[:12])}" if source.classes else ""))
    if source.fresh:
        say(f"the classifier's head is new: {asked.model.name} has none for these labels")
    if cut := train.truncated + (validation.truncated if validation else 0):
        say(f"{cut:,} of {len(train) + (len(validation) if validation else 0):,} rows are longer than {most} tokens and were cut")
    return Prepared(asked, source, task, estimator, train, validation, describe(asked, most))


def describe(asked: FineTuning, most: int) -> dict[str, Any]:
    """All that decides what a run comes to, files by their name and digest: two runs of one description come to the same bits."""
    fields = {name: value for name, value in dataclasses.asdict(asked).items() if not isinstance(value, Path)}
    files = {"data": asked.data, "validation": asked.validation}
    named: dict[str, list[str | None]] = {what: [path.name, _digest(path)] for what, path in files.items() if path is not None}
    named["model"] = [asked.model.name, digest(asked.model)]
    if asked.score:
        path, _, function = asked.score.rpartition(":")
        named["score"] = [f"{Path(path).name}:{function}", code_of_score(asked.score)]
    if own := dict(_own(asked.estimator or {}, "estimator")):
        named["code"] = [import_path.digest(own)]
    return {**fields, **named, "max_length": most}


def _own(config: Mapping[str, Any], where: str) -> Iterator[tuple[str, str]]:
    """The import paths of a user's own parts of an estimator, by where they stand."""
    if ":" in str(config.get("name", "")):
        yield where, config["name"]
    for name, part in config.items():
        if isinstance(part, Mapping):
            yield from _own(part, f"{where}.{name}")


def _estimator(config: dict[str, Any]) -> Estimator:
    try:
        found = from_config(config, find_here)
    except (ValueError, TypeError) as error:
        raise UserError(f"the estimator {config['name']!r} cannot be used: {' '.join(str(error).split())}") from error
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


class _Trial:
    """A model to be thrown away: nothing that trial steps do to it is left."""

    def __init__(self, ready: Prepared, on: torch.device) -> None:
        self.ready = ready
        model = build(ready.source, ready.asked, on)
        loss = ready.task.negated(lambda predictions, rows: 0.0) if ready.asked.score else ready.task.loss
        self.fitting = Fitting.begin(ready.asked, model, ready.estimator, loss, 1, on)
        self.model, self.optimizer, self.memory = model, self.fitting.optimizer, self.fitting.memory

    def step(self, rows: int) -> None:
        self.step_on(self.ready.train.longest[:rows])

    def step_on(self, which: list[int]) -> None:
        self.fitting.step = 0
        self.fitting.advance(self.ready.task.batch(self.ready.train, which))


def _plan(ready: Prepared, on: torch.device, *, timed: bool) -> tuple[MemoryPlan, float]:
    """The plan of a run, and the seconds that a step takes where they are asked for."""
    rows = min(ready.asked.batch_size, len(ready.train))
    made: list[_Trial] = []

    def begin() -> _Trial:
        made.append(_Trial(ready, on))
        return made[0]

    tokens = ready.task.batch(ready.train, ready.train.longest[:1]).inputs["input_ids"].shape[1]
    plan, _ = planned(begin, rows, tokens, on)
    return plan, _pace(made[0], ready, on) if timed else math.nan


def _pace(trial: _Trial, ready: Prepared, on: torch.device) -> float:
    """The seconds of a step, from some steps on batches of the first epoch."""
    untimed, most, patience = WARM_UP
    order = order_of_epoch(ready.asked.seed, 0, len(ready.train)).tolist()
    size, taken = ready.asked.batch_size, list[float]()
    began = time.perf_counter()
    for step in range(untimed + most):
        start = step * size % len(order)
        before = time.perf_counter()
        trial.step_on(order[start : start + size])
        if on.type == "cuda":
            torch.cuda.synchronize(on)
        now = time.perf_counter()
        taken += [now - before] if step >= untimed else []
        if taken and now - began > patience:
            break
    return sorted(taken)[len(taken) // 2]


def _steps(ready: Prepared, pace: float) -> int:
    asked, per_epoch = ready.asked, math.ceil(len(ready.train) / ready.asked.batch_size)
    if asked.seconds is not None:
        return max(1, int(asked.seconds / pace)) if pace == pace else 1
    return asked.steps or (asked.epochs or EPOCHS) * per_epoch


def _schedule(ready: Prepared, total: int) -> Schedule:
    return Schedule(math.ceil(len(ready.train) / ready.asked.batch_size), total, ready.asked.evaluate_every)


def _result(ready: Prepared, fitting: Fitting, plan: MemoryPlan, reason: str | None, schedule: Schedule) -> dict[str, Any]:
    first, last = fitting.evaluations[0], fitting.evaluations[-1]
    trained = sum(p.numel() for p in fitting.model.parameters() if p.requires_grad)
    return {
        "status": "diverged" if reason else "finished",
        "reason": reason,
        "task": ready.source.task,
        "classes": list(ready.source.classes),
        "rows": {"train": len(ready.train), "validation": len(ready.validation) if ready.validation else 0},
        "truncated": ready.train.truncated + (ready.validation.truncated if ready.validation else 0),
        "steps": fitting.step,
        "epochs": fitting.step / schedule.per_epoch,
        "seconds": fitting.seconds,
        "forward_passes": fitting.passes,
        "peak_bytes": fitting.peak or plan.total,
        "plan": dataclasses.asdict(plan),
        "trained": trained,
        "before": {name: value for name, value in first.items() if name.startswith("validation")},
        "after": {name: value for name, value in last.items() if name.startswith("validation")},
        "loss": last["loss"],
    }
