"""Many runs as one program on one device: those that differ in seed and in the numbers of one optimizer alone.

Each run has its own initialisation, batches and directions, and leaves the files that it leaves alone. Its losses are those of a run
alone up to rounding. `seconds` and `joules` are the batch's, shared by all in it, and `replicas` says how many those are.

A run that diverges gets its result at the step where it would alone. The program goes on computing it and reads it no more, so the others
keep their bits. One checkpoint holds them all, in OUT/batches/<identity>: a killed batch goes on with the same runs to the same bits.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forwardgrad.ensemble import Ensemble, unbatched
from forwardgrad.gradient import estimate_grads_
from forwardgrad.lab import data, environment
from forwardgrad.lab.energy import EnergyMeter, add_joules, energy_meter
from forwardgrad.lab.store import Store, alone, check, make_folder, read_json, write_checkpoint, write_json
from forwardgrad.lab.studies import SCHEMA, Run, from_json, identity, paths, to_json
from forwardgrad.lab.training import builders
from forwardgrad.lab.training.divergence import find_divergence
from forwardgrad.lab.training.evaluation import evaluate
from forwardgrad.lab.training.loop import train_to_end
from forwardgrad.lab.training.norms import norm, trained
from forwardgrad.lab.training.precision import arranged
from forwardgrad.lab.training.run_folder import finish, write_environment, write_status
from forwardgrad.lab.training.schedule import Schedule
from forwardgrad.lab.training.state import State, as_bytes, buffers, checkpoint
from forwardgrad.lab.training.step_logs import shrink
from forwardgrad.lab.training.tensorboard import Board
from forwardgrad.lab.training.training import Training, order_of_epoch
from forwardgrad.optim import cap_step

LARGEST = 32  # runs in one batch: beyond that a GPU is busy anyway, and a kill or a full memory costs more
STATUS_SECONDS = 0.05  # between two statuses, for every run of a batch: each is a file that is written whole


def plan(runs: Sequence[Run], store: Store) -> list[tuple[Run, ...]]:
    """Divide runs into units of work. A unit is trained as one program.

    A batch that was begun goes on with the same runs. A run goes alone if its estimator has no batched form, if it has a checkpoint of its
    own, or if no other run can go with it.
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
        single = begun or bool(paths(run)) or unbatched(builders.estimator(run)) is not None
        groups.setdefault(key if single else _in_common(run), []).append(run)
    for group in groups.values():
        batches = math.ceil(len(group) / LARGEST)
        units += [tuple(group[first::batches]) for first in range(batches)]
    return units


def _in_common(run: Run) -> str:
    """What runs of one batch have in common."""
    same = (run.data, run.model, run.estimator, run.optimizer.name, run.epochs, run.steps, run.batch_size, run.precision)
    return json.dumps([*same, run.evaluate_every, run.augment, run.label_smoothing], sort_keys=True)


def _begun(store: Store) -> list[tuple[Run, ...]]:
    """The batches that were begun in a store and have not come to their end."""
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
    keep_weights: bool = False,
    alone: bool = False,
) -> dict[str, dict[str, Any]]:
    """Train runs of one plan together, or go on with them, and return their results by identity.

    The options are those of one run's training.

    Raises UserError as training one run does, and Busy where another process holds one of the runs.
    """
    on = environment.device(device)
    folder = _folder(runs, store)
    with torch.random.fork_rng([on.index or 0] if on.type == "cuda" else []), _alone(runs, store), ExitStack() as held:
        if any(store.result(run.identity) is None for run in runs):
            batch = ManyRuns(runs, store, on, data_dir)
            batch.keep_weights = keep_weights
            batch.measure_by(energy_meter(on) if alone else EnergyMeter())
            batch.write_descriptions(folder)
            batch.resume()
            for index in batch.unfinished:
                training = batch.trainings[index]
                batch.boards[index] = held.enter_context(Board(tensorboard and tensorboard / training.run.identity, training))
            train_to_end(batch, checkpoint_seconds)
            for index in list(batch.unfinished):
                batch.finish(index, None)
        shutil.rmtree(folder, ignore_errors=True)
    return {run.identity: result for run in runs if (result := store.result(run.identity)) is not None}


def forget(runs: Sequence[Run], store: Store) -> None:
    """Delete what a batch has come to. Its runs that have no result are then begun again, together with others or alone."""
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


class ManyRuns:
    """Several runs under way as one program: the training of each, and what they share."""

    def __init__(self, runs: Sequence[Run], store: Store, on: torch.device, data_dir: Path | None) -> None:
        self.runs, self.first, self.on = tuple(runs), runs[0], on
        self.folders = [store.folder(run.identity) for run in runs]
        self.checkpoint = _folder(runs, store) / "checkpoint.pt"
        self.unfinished = [index for index, run in enumerate(runs) if store.result(run.identity) is None]
        self.boards: dict[int, Board] = {}
        self.keep_weights = False
        self.meter = EnergyMeter()
        self.step, self._told, self._order_epoch = 0, time.monotonic(), -1
        datasets = self._load(data_dir)
        self.schedule = Schedule.of(self.first, len(datasets[0].train))
        models = [builders.initialised_model(run, dataset, on, data_dir) for run, dataset in zip(runs, datasets, strict=True)]
        starts = [norm(trained(model)) for model in models]
        self.ensemble, self.estimator, self.loss = Ensemble(models), builders.estimator(self.first), builders.batch_loss(self.first)
        self._build_optimizer(models)
        self.generators = [builders.generator(run, on) for run in runs]
        recorded = [buffers(self.schedule.total, on) for _ in runs]
        self.losses, self.derivatives = (torch.stack(each) for each in zip(*recorded, strict=True))
        shared = self.optimizer, self.lr_schedule, self.estimator
        of_each = zip(models, self.generators, self.losses, self.derivatives, starts, strict=True)
        states = [State(model, *shared, generator, losses, ds, start, 0) for model, generator, losses, ds, start in of_each]
        self.trainings = [Training(*each) for each in zip(runs, datasets, states, strict=True)]

    def measure_by(self, meter: EnergyMeter) -> None:
        """Count the joules by this meter, which all runs share."""
        self.meter = meter
        for training in self.trainings:
            training.meter = meter

    def _load(self, data_dir: Path | None) -> list[data.Dataset]:
        """Each run's data; runs of one seed share theirs. All training splits lie in one tensor, so that a batch is one gather."""
        seeds = list(dict.fromkeys(run.seed for run in self.runs))
        found = [data.load(self.first.data, seed, self.on, data_dir) for seed in seeds]
        self.inputs, self.labels = (torch.stack([getattr(d.train, name) for d in found]) for name in ("inputs", "labels"))
        splits = (data.Split(inputs, labels) for inputs, labels in zip(self.inputs, self.labels, strict=True))
        found = [dataclasses.replace(d, train=split) for d, split in zip(found, splits, strict=True)]
        rows = [seeds.index(run.seed) for run in self.runs]
        self.rows = torch.tensor(rows, device=self.on)  # of each run, where the data of its seed are
        return [found[row] for row in rows]

    def _build_optimizer(self, models: list[nn.Module]) -> None:
        """One optimizer of the runs' kind, with a group for each set of hyperparameters, and one schedule with the rates of each group."""
        self.options = list(dict.fromkeys(run.optimizer for run in self.runs))
        members = [[model for model, run in zip(models, self.runs, strict=True) if run.optimizer == o] for o in self.options]
        fused = self.first.precision != "float32"
        first, *others = (builders.optimizer(o, nn.ModuleList(m), fused=fused) for o, m in zip(self.options, members, strict=True))
        for other in others:
            for group in other.param_groups:
                first.add_param_group(group)
        self.optimizer = first
        factors = [builders.lr_factor(o, self.schedule.total) for o in self.options]
        self.lr_schedule = torch.optim.lr_scheduler.LambdaLR(first, factors)

    def write_descriptions(self, folder: Path) -> None:
        """Write what each run is and where it runs, and which runs the batch has."""
        where = {**environment.describe(self.on), "batched": len(self.runs)}
        for index in self.unfinished:
            write_json(self.folders[index] / "run.json", to_json(self.runs[index]))
            write_environment(self.folders[index], where)
        make_folder(folder)
        write_json(folder / "batch.json", {"schema": SCHEMA, "runs": [to_json(run) for run in self.runs]})

    def tell(self) -> None:
        if time.monotonic() - self._told >= STATUS_SECONDS * len(self.unfinished):
            for index in self.unfinished:
                write_status(self.trainings[index], self.folders[index])
            self._told = time.monotonic()
        for index in self.unfinished:
            self.boards[index].note()

    def save(self) -> None:
        for index in self.unfinished:
            self.boards[index].flush()
        states = [training.state for training in self.trainings]
        content = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.lr_schedule.state_dict(),
            "runs": [{"model": state.model.state_dict(), **state.counts()} for state in states],
        }
        write_checkpoint(self.checkpoint, as_bytes(content))

    def resume(self) -> None:
        """Go on from the batch's checkpoint, if there is one; UserError where it is damaged."""
        if not self.checkpoint.exists():
            return
        with checkpoint(self.checkpoint) as content:
            if any(content["runs"][index]["step"] != content["step"] for index in self.unfinished):
                return  # the result of a run that had diverged was deleted: from the start it comes to the same
            self.step = content["step"]
            self.optimizer.load_state_dict(content["optimizer"])
            self.lr_schedule.load_state_dict(content["schedule"])
            for training, kept in zip(self.trainings, content["runs"], strict=True):
                training.state.model.load_state_dict(kept["model"])
                training.state.set_counts(kept)

    def finish(self, index: int, reason: str | None) -> None:
        """Write the result of one run; the others go on."""
        kept = finish(self.trainings[index], self.folders[index], reason, replicas=len(self.runs), keep_weights=self.keep_weights)
        self.boards[index].end(kept)
        self.unfinished.remove(index)

    def look(self) -> bool:
        step, evaluated = self.step + 1, self.step + 1 in self.schedule.evaluations
        if self.schedule.is_measured(step):
            self._step_measured()
        else:
            self.advance_timed(step)
        for index in list(self.unfinished):
            training = self.trainings[index]
            if self.schedule.is_checked(step) and (reason := find_divergence(training)):
                self.finish(index, reason)
            elif evaluated:
                evaluate(training)
        return bool(self.unfinished)

    def advance_timed(self, stop: int) -> float:
        """Advance to `stop`, counting the time and the joules for every run; returns the steps taken in a second."""
        before = self.meter.read()
        start, began = self.step, time.perf_counter()
        self.advance(stop)
        elapsed = time.perf_counter() - began
        used = self.meter.since(before)
        for index in self.unfinished:
            state = self.trainings[index].state
            state.seconds += elapsed
            state.joules = add_joules(state.joules, used)
        return (stop - start) / elapsed

    def _step_measured(self) -> None:
        """Take one step, and note its relative length for every run."""
        states = [self.trainings[index].state for index in self.unfinished]
        before = [[p.detach().clone() for p in trained(state.model)] for state in states]
        self.advance_timed(self.step + 1)
        for state, held in zip(states, before, strict=True):
            size, now = norm(held), trained(state.model)
            stride = norm(p.detach() - b for p, b in zip(now, held, strict=True)) / size if size else math.inf
            state.strides.append(stride)
            state.walk.append([self.step, state.norm_growth(), stride])

    def advance(self, stop: int) -> None:
        """Take the steps up to `stop` without waiting for the device in between."""
        while self.step < stop:
            self._advance_within_epoch(min(stop, self.schedule.end_of_epoch(self.step)))
        if self.on.type == "cuda":
            torch.cuda.synchronize(self.on)

    def _orders(self) -> Tensor:
        """The order of every seed's training examples in the epoch under way."""
        epoch = self.schedule.epoch(self.step)
        if self._order_epoch != epoch:
            seeds = dict.fromkeys(run.seed for run in self.runs)
            examples = self.labels.shape[1]
            self._order = torch.stack([order_of_epoch(seed, epoch, examples) for seed in seeds]).to(self.on)
            if self.first.augment:
                self._draws = torch.stack([data.draws_of_epoch(seed, epoch, examples) for seed in seeds]).to(self.on)
            self._order_epoch = epoch
        return self._order

    def _advance_within_epoch(self, stop: int) -> None:
        orders, size, rows = self._orders(), self.first.batch_size, self.rows
        for step in range(self.step, stop):
            start = step % self.schedule.per_epoch * size
            picked = orders[:, start : start + size].index_select(0, rows)
            inputs, labels = (split[rows.unsqueeze(1), picked] for split in (self.inputs, self.labels))
            together = inputs.flatten(0, 1)
            if self.first.augment:
                draws = self._draws[:, start : start + size].index_select(0, rows)
                together = data.crop_flip(together, draws.flatten(0, 1))
            ready = arranged(self.trainings[0].dataset.for_model(together), self.first.precision).unflatten(0, picked.shape)
            self._step(step, ready, labels)
            self.lr_schedule.step()
        self.step = stop
        for index in self.unfinished:
            self.trainings[index].state.step = stop

    def _step(self, step: int, inputs: Tensor, labels: Tensor) -> None:
        """One optimizer step of all runs, each on its own batch: that of a run alone, with a gradient for every replica."""

        def losses_and_gradients() -> Tensor:
            self.optimizer.zero_grad()
            record = estimate_grads_(self.loss, self.ensemble, (inputs, labels), self.estimator, generators=self.generators)
            self.losses[:, step] = record.loss
            if record.derivatives.shape[1]:
                self.derivatives[:, step] = record.derivatives.square().mean(1).sqrt()
            for index in self.unfinished:
                self.trainings[index].state.passes += record.forward_passes
            return record.loss

        for group, options in zip(self.optimizer.param_groups, self.options, strict=True):
            if options.weight_decay:
                shrink(group, options.weight_decay)
        with ExitStack() as held:
            for training in self.trainings:
                if cap := training.run.optimizer.cap:
                    held.enter_context(cap_step(trained(training.state.model), cap))
            self.optimizer.step(losses_and_gradients)  # type: ignore[arg-type]
