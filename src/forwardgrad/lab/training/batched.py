"""Many runs as one program on one device: those that differ in seed and in the numbers of one optimizer alone.

Each run leaves the files of a run alone, with its own initialisation, batches and directions; its losses are those of a run alone up to
rounding. `seconds` are the batch's, shared by all in it, and `replicas` says how many those are. A run that diverges gets its result at
the step where it would alone; its place in the program is computed on and read no more, so the others keep their bits. One checkpoint
holds them all, in OUT/batches/<identity>: a killed batch goes on with the same runs to the same bits.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forwardgrad.ensemble import Ensemble, unbatched
from forwardgrad.gradient import estimate_grads_
from forwardgrad.lab import data, environment, interrupts
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store import Store, alone, check, damaged, make_folder, read_checkpoint, read_json, write_checkpoint, write_json
from forwardgrad.lab.studies import SCHEMA, Run, from_json, identity, paths, to_json
from forwardgrad.lab.training import parts as own
from forwardgrad.lab.training.loop import CHECK_EVERY, evaluated_at, next_epoch, next_look, walked_at
from forwardgrad.lab.training.norms import norm
from forwardgrad.lab.training.outcome import diverged, evaluate, finish, say, say_where
from forwardgrad.lab.training.precision import arranged, computing
from forwardgrad.lab.training.state import (
    State,
    as_bytes,
    buffers,
    build_model,
    build_optimizer,
    course,
    directions,
    growth,
    order_of,
    steps_per_epoch,
    total_steps,
)
from forwardgrad.lab.training.tensorboard import Board
from forwardgrad.optim import cap_step

LARGEST = 32  # runs in one batch: beyond that a GPU is busy anyway, and a kill or a full memory costs more
STATUS_SECONDS = 0.05  # between two looks of a display, for every run: each is a file that is written whole


def plan(runs: Sequence[Run], store: Store) -> list[tuple[Run, ...]]:
    """Runs as units of work: batches that were begun and may go on, new ones, and runs that go alone.

    Runs alone are those whose estimator has no batched form, those with a checkpoint of their own, and those without a partner.
    """
    waiting = {run.identity: run for run in runs}
    units = []
    for members in _begun(store):
        unfinished = {run.identity for run in members if store.result(run.identity) is None}
        if unfinished and unfinished <= waiting.keys():
            units.append(members)
            waiting = {key: run for key, run in waiting.items() if key not in unfinished}
    groups: dict[str, list[Run]] = {}
    for key, run in waiting.items():
        begun = (store.folder(key) / "checkpoint.pt").exists()
        single = begun or bool(paths(run)) or unbatched(own.estimator(run)) is not None
        groups.setdefault(key if single else _shared(run), []).append(run)
    for group in groups.values():
        parts = math.ceil(len(group) / LARGEST)
        units += [tuple(group[part::parts]) for part in range(parts)]
    return units


def _shared(run: Run) -> str:
    """What runs of one batch have in common."""
    same = (run.data, run.model, run.estimator, run.optimizer.name, run.epochs, run.steps, run.batch_size, run.precision)
    return json.dumps(same, sort_keys=True)


def _begun(store: Store) -> list[tuple[Run, ...]]:
    found = []
    for path in sorted((store.root / "batches").glob("*/batch.json")):
        stored = check(path, read_json(path), {"schema": int, "runs": list})
        found.append(tuple(from_json(description, str(path)) for description in stored["runs"]))
    return found


def train(
    runs: Sequence[Run],
    store: Store,
    *,
    device: str = "cpu",
    data_dir: Path | None = None,
    checkpoint_seconds: float = 60.0,
    tensorboard: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Train runs of one plan together, or go on with them, and return their results by identity.

    Raises UserError as `train.train` does, and Busy where another process holds one of the runs.
    """
    on = environment.device(device)
    folder = _folder(runs, store)
    with torch.random.fork_rng([on.index or 0] if on.type == "cuda" else []), _alone(runs, store), ExitStack() as held:
        batch = _Batch(runs, store, on, data_dir)
        if batch.going_on:
            batch.write_what_and_where(folder)
            batch.resume(folder / "checkpoint.pt")
            for index in batch.going_on:
                run = batch.runs[index]
                batch.boards[index] = held.enter_context(Board(tensorboard and tensorboard / run.identity, run, batch.states[index]))
            _loop(batch, folder / "checkpoint.pt", checkpoint_seconds)
        shutil.rmtree(folder, ignore_errors=True)
    return {run.identity: result for run in runs if (result := store.result(run.identity)) is not None}


def forget(runs: Sequence[Run], store: Store) -> None:
    """Delete what a batch has come to: its runs that have no result are begun again, together with others or alone."""
    with _alone(runs, store):
        shutil.rmtree(_folder(runs, store), ignore_errors=True)


def _folder(runs: Sequence[Run], store: Store) -> Path:
    return store.root / "batches" / identity({"batch": [run.identity for run in runs]})


@contextmanager
def _alone(runs: Sequence[Run], store: Store) -> Iterator[None]:
    """Hold the folders of all runs that have no result yet."""
    with ExitStack() as held:
        for run in sorted(runs, key=lambda run: run.identity):
            if store.result(run.identity) is None:
                held.enter_context(alone(store.folder(run.identity)))
        yield


class _Batch:
    """Runs under way together: a state for each, and what they share."""

    def __init__(self, runs: Sequence[Run], store: Store, on: torch.device, data_dir: Path | None) -> None:
        self.runs, self.first, self.on = tuple(runs), runs[0], on
        self.folders = [store.folder(run.identity) for run in runs]
        self.going_on = [index for index, run in enumerate(runs) if store.result(run.identity) is None]
        self.boards: dict[int, Board] = {}
        self.step = 0
        if not self.going_on:
            return
        self.datasets = self._load(data_dir)
        self.per_epoch = steps_per_epoch(self.first, self.datasets[0])
        self.total = total_steps(self.first, self.datasets[0])
        models = [build_model(run, dataset, on) for run, dataset in zip(runs, self.datasets, strict=True)]
        starts = [norm(model.parameters()) for model in models]
        self.ensemble, self.estimator = Ensemble(models), own.estimator(self.first)
        self._build_optimizer(models)
        self.generators = [directions(run, on) for run in runs]
        recorded = [buffers(self.total, on) for _ in runs]
        self.losses, self.derivatives = (torch.stack(each) for each in zip(*recorded, strict=True))
        self.states = [
            State(model, self.optimizer, self.schedule, self.estimator, generator, losses, derivatives, start, 0)
            for model, generator, losses, derivatives, start in zip(
                models, self.generators, self.losses, self.derivatives, starts, strict=True
            )
        ]
        self.drawn = -1

    def _load(self, data_dir: Path | None) -> list[data.Dataset]:
        """Each run's data; runs of one seed share theirs. All training splits lie in one tensor, so that a batch is one gather."""
        seeds = list(dict.fromkeys(run.seed for run in self.runs))
        found = [data.load(self.first.data, seed, self.on, data_dir) for seed in seeds]
        self.images, self.labels = (torch.stack([getattr(d.train, name) for d in found]) for name in ("images", "labels"))
        splits = (data.Split(images, labels) for images, labels in zip(self.images, self.labels, strict=True))
        found = [dataclasses.replace(d, train=split) for d, split in zip(found, splits, strict=True)]
        places = [seeds.index(run.seed) for run in self.runs]
        self.places = torch.tensor(places, device=self.on)
        return [found[place] for place in places]

    def _build_optimizer(self, models: list[nn.Module]) -> None:
        """One optimizer of the runs' kind, with a group for each set of hyperparameters, and one schedule with the course of each group."""
        self.options = list(dict.fromkeys(run.optimizer for run in self.runs))
        members = [[model for model, run in zip(models, self.runs, strict=True) if run.optimizer == o] for o in self.options]
        fused = self.first.precision != "float32"
        first, *others = (build_optimizer(o, nn.ModuleList(m), fused=fused) for o, m in zip(self.options, members, strict=True))
        for other in others:
            for group in other.param_groups:
                first.add_param_group(group)
        self.optimizer = first
        self.schedule = torch.optim.lr_scheduler.LambdaLR(first, [course(o, self.total) for o in self.options])

    def write_what_and_where(self, folder: Path) -> None:
        where = {**environment.describe(self.on), "batched": len(self.runs)}
        for index in self.going_on:
            write_json(self.folders[index] / "run.json", to_json(self.runs[index]))
            say_where(self.folders[index], where)
        make_folder(folder)
        write_json(folder / "batch.json", {"schema": SCHEMA, "runs": [to_json(run) for run in self.runs]})

    def dump(self) -> bytes:
        return as_bytes(
            {
                "step": self.step,
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "runs": [{"model": state.model.state_dict(), **state.own()} for state in self.states],
            }
        )

    def resume(self, path: Path) -> None:
        if not path.exists():
            return
        try:
            content = torch.load(io.BytesIO(read_checkpoint(path)), map_location="cpu", weights_only=True)
            if any(content["runs"][index]["step"] != content["step"] for index in self.going_on):
                return  # the result of a run that had diverged was deleted: from the start it comes to the same
            self.step = content["step"]
            self.optimizer.load_state_dict(content["optimizer"])
            self.schedule.load_state_dict(content["schedule"])
            for state, kept in zip(self.states, content["runs"], strict=True):
                state.model.load_state_dict(kept["model"])
                state.take(kept)
        except UserError:
            raise
        except Exception as error:  # torch.load raises many kinds for a damaged file
            raise damaged(path, type(error).__name__) from error

    def finish(self, index: int, reason: str | None) -> None:
        run, dataset, state, folder = self.runs[index], self.datasets[index], self.states[index], self.folders[index]
        self.boards[index].end(finish(run, dataset, state, folder, reason, replicas=len(self.runs)))
        self.going_on.remove(index)

    def order(self) -> Tensor:
        """The order of every seed's training examples in the epoch under way."""
        epoch = self.step // self.per_epoch
        if self.drawn != epoch:
            seeds = dict.fromkeys(run.seed for run in self.runs)
            self._order = torch.stack([order_of(seed, epoch, self.labels.shape[1]) for seed in seeds]).to(self.on)
            self.drawn = epoch
        return self._order


def _loop(batch: _Batch, checkpoint: Path, checkpoint_seconds: float) -> None:
    """Train all to their end or to divergence."""
    at = evaluated_at(batch.per_epoch, batch.total)
    saved = said = time.monotonic()
    pace = 1
    while batch.step < batch.total and batch.going_on:
        interrupts.check()
        look = next_look(batch.step, at, batch.total)
        if look > batch.step + 1:  # up to the step before the one that is looked at
            pace = max(1, min(CHECK_EVERY, round(_timed(batch, min(batch.step + pace, look - 1)))))
            if batch.step == look - 1:
                continue
        else:
            _look(batch, look, evaluated=look in at)
        now = time.monotonic()
        if now - said >= STATUS_SECONDS * len(batch.going_on):
            _say(batch)
            said = time.monotonic()
        for index in batch.going_on:
            batch.boards[index].note()
        if now - saved >= checkpoint_seconds:
            for index in batch.going_on:
                batch.boards[index].flush()
            write_checkpoint(checkpoint, batch.dump())
            saved = time.monotonic()
    for index in list(batch.going_on):
        batch.finish(index, None)


def _look(batch: _Batch, look: int, *, evaluated: bool) -> None:
    """Take the step that is looked at, as a run alone does, and look at every run."""
    going_on, measured = list(batch.going_on), evaluated or walked_at(look)
    strides = _measured(batch) if measured else [_timed(batch, look)] * len(going_on)
    for index, stride in zip(going_on, strides, strict=True):
        state, dataset = batch.states[index], batch.datasets[index]
        if measured:
            state.strides.append(stride)
            state.walk.append([look, growth(state), stride])
        if (look % CHECK_EVERY == 0 or look == batch.total) and (reason := diverged(batch.runs[index], state, dataset.classes)):
            batch.finish(index, reason)
        elif evaluated:
            evaluate(batch.runs[index], dataset, state, batch.per_epoch)


def _say(batch: _Batch) -> None:
    for index in batch.going_on:
        say(batch.states[index], batch.total, batch.folders[index])


def _timed(batch: _Batch, stop: int) -> float:
    """Advance to `stop`, counting the time for every run; returns the steps taken in a second."""
    start, began = batch.step, time.perf_counter()
    _advance(batch, stop)
    elapsed = time.perf_counter() - began
    for index in batch.going_on:
        batch.states[index].seconds += elapsed
    return (stop - start) / elapsed


def _measured(batch: _Batch) -> list[float]:
    """Take one step; the relative length of every run's that goes on."""
    before = [[p.detach().clone() for p in batch.states[index].model.parameters()] for index in batch.going_on]
    _timed(batch, batch.step + 1)
    strides = []
    for index, held in zip(batch.going_on, before, strict=True):
        size, now = norm(held), batch.states[index].model.parameters()
        strides.append(norm(p.detach() - b for p, b in zip(now, held, strict=True)) / size if size else math.inf)
    return strides


def _advance(batch: _Batch, stop: int) -> None:
    """Take the steps up to `stop` without waiting for the device in between."""
    while batch.step < stop:
        _within_epoch(batch, min(stop, next_epoch(batch.step, batch.per_epoch)))
    if batch.on.type == "cuda":
        torch.cuda.synchronize(batch.on)


def _within_epoch(batch: _Batch, stop: int) -> None:
    order, size, places = batch.order(), batch.first.batch_size, batch.places
    for step in range(batch.step, stop):
        start = step % batch.per_epoch * size
        picked = order[:, start : start + size].index_select(0, places)
        images, labels = (split[places.unsqueeze(1), picked] for split in (batch.images, batch.labels))
        pixels = arranged(batch.datasets[0].pixels(images.flatten(0, 1)), batch.first.precision).unflatten(0, picked.shape)
        _step(batch, step, pixels, labels)
        batch.schedule.step()
    batch.step = stop
    for index in batch.going_on:
        batch.states[index].step = stop


def _step(batch: _Batch, step: int, images: Tensor, labels: Tensor) -> None:
    """One optimizer step of all runs, each on its own batch: `train._step` with a gradient for every replica."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with computing(batch.first.precision, images.device):
            return F.cross_entropy(model(images), labels)

    def losses_and_gradients() -> Tensor:
        batch.optimizer.zero_grad()
        record = estimate_grads_(loss, batch.ensemble, (images, labels), batch.estimator, generators=batch.generators)
        batch.losses[:, step] = record.loss
        if record.derivatives.shape[1]:
            batch.derivatives[:, step] = record.derivatives.square().mean(1).sqrt()
        for index in batch.going_on:
            batch.states[index].passes += record.forward_passes
        return record.loss

    with torch.no_grad():
        for group, options in zip(batch.optimizer.param_groups, batch.options, strict=True):
            for p in group["params"] if options.weight_decay else ():
                p.mul_(1 - group["lr"] * options.weight_decay)
    with ExitStack() as held:
        for run, state in zip(batch.runs, batch.states, strict=True):
            if run.optimizer.cap:
                held.enter_context(cap_step(state.model.parameters(), run.optimizer.cap))
        batch.optimizer.step(losses_and_gradients)  # type: ignore[arg-type]
