"""The measurement of `forwardgrad layers`: stored runs with their final weights, layer by layer, stored in OUT/layers.json.

Runs that differ in their seed alone are one arm. Nothing here reads the test split: probes learn from training examples and are judged on
the validation split, which no run has trained on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from forwardgrad.estimators import Estimator, from_config, to_config
from forwardgrad.lab import environment
from forwardgrad.lab.data import Dataset, Split
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.layers.activations import features, layers
from forwardgrad.lab.layers.agreement import LossOfModel, cosines, learn
from forwardgrad.lab.layers.probes import fit_probe
from forwardgrad.lab.statistics import stats
from forwardgrad.lab.store import Store, check, read_json, write_json
from forwardgrad.lab.studies import SCHEMA, Run, find_here, format_estimator, stream, to_json
from forwardgrad.lab.training import builders, check_code, read_weights

AT_A_TIME = 1000  # examples whose activations are computed together


@dataclass(frozen=True)
class LayersSetting:
    """How runs are looked at.

    Args:
        estimator: the configuration of the estimator whose angle with the gradient is measured.
        examples: of the training split, that a probe learns from.
        most: features of a probe.
        l2: weight of a probe's penalty l2/2·‖W‖².
        batches: batches of the training split whose angle is measured, of `batch` examples each.
        learn: steps that an estimator with a memory takes on other batches first, the weights held still. A run that was trained by this
            same estimator brings its memory along instead.
        untrained: whether the networks before their first step are measured too.
    """

    estimator: dict[str, Any]
    examples: int = 5000
    most: int = 2048
    l2: float = 1e-3
    batches: int = 10
    batch: int = 64
    learn: int = 200
    untrained: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.l2 > 0 and self.l2 < float("inf")):
            raise UserError(f"--l2 must be a positive number, not {self.l2}: without it a probe has no single minimum")


class LayerNumber(TypedDict):
    """A number of one layer with its 95 % interval: over `n` of what `over` names. None where there is none."""

    value: float
    low: float | None
    high: float | None
    n: int
    over: str


class LayerRecord(TypedDict):
    """One place of one arm: behind the layer `name`, or in front of the first, where that is empty."""

    name: str
    probe: LayerNumber | None
    cosine: LayerNumber | None


class LayersArm(TypedDict):
    """The runs of one description, layer by layer. `failed` says what kept the estimator from an estimate."""

    label: str
    kind: str
    data: str
    model: str
    runs: list[str]
    trained: bool
    memory: str
    examples: int
    held_out: int
    features: list[int | None]
    converged: bool
    failed: str | None
    layers: list[LayerRecord]


@dataclass
class _Looked:
    """What one network showed: of every place the examples classified rightly, of every layer the cosine in each batch."""

    names: list[str]
    right: list[int | None]
    widths: list[int | None]
    angles: list[list[float]]
    examples: int
    held_out: int
    converged: bool
    memory: str
    failed: str | None


def measure_layers(
    store: Store, runs: Sequence[Run], setting: LayersSetting, *, device: str, data_dir: Path | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure the runs, whose weights were kept, and return what is stored of them; `say` gets a line about each.

    Raises UserError for weights or data that are missing, data without classes, and too few examples.
    """
    on = environment.device(device)
    estimator = _estimator(setting.estimator)
    found: dict[tuple[bool, str], list[tuple[Run, _Looked]]] = {}
    stages = (True, False) if setting.untrained else (True,)
    for index, run in enumerate(runs, 1):
        say(f"[{index}/{len(runs)}] {run.identity}: {run.model} on {run.data}, {run.estimator['name']}")
        check_code(run)
        dataset = builders.dataset(run, on, data_dir)
        for trained in stages:
            members = found.setdefault((trained, _in_common(run, trained)), [])
            if any(other.seed == run.seed for other, _ in members):  # the same network before its first step
                continue
            with torch.random.fork_rng([on.index or 0] if on.type == "cuda" else []):
                looked = _look(store.folder(run.identity), run, dataset, estimator, setting, on, data_dir, trained=trained)
            members.append((run, looked))
    found = dict(sorted(found.items(), key=lambda arm: not arm[0][0]))  # what was trained first
    arms = [_arm(members, trained=trained) for (trained, _), members in found.items()]
    _tell_apart(arms, [members[0][0] for members in found.values()])
    new = {**dataclasses.asdict(setting), "spec": _text(estimator), "command": environment.command(), "arms": arms}
    _keep(store, environment.describe(on), new)
    return new


def _estimator(config: dict[str, Any]) -> Estimator:
    try:
        return from_config(config, find_here)
    except (ValueError, TypeError) as error:
        raise UserError(f"the estimator {format_estimator(config)!r} cannot be used: {error}") from error


def _in_common(run: Run, trained: bool) -> str:
    """What runs of one arm have in common; of a network before its first step only what it is and what it would train on."""
    common = {key: value for key, value in to_json(run).items() if key != "seed"}
    return json.dumps(common if trained else [run.data, run.model, run.precision, run.loss, run.start], sort_keys=True)


def _look(
    folder: Path,
    run: Run,
    dataset: Dataset,
    estimator: Estimator,
    setting: LayersSetting,
    on: torch.device,
    data_dir: Path | None,
    *,
    trained: bool,
) -> _Looked:
    if not dataset.classes or dataset.next_token:
        raise UserError(f"the data {run.data!r} have no classes: a probe has nothing to tell apart")
    model = builders.initialised_model(run, dataset, on, data_dir)
    kept = read_weights(folder, model) if trained else {}
    names = layers(model, _inputs(dataset, dataset.train, 2))
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(stream(setting.seed, "examples of probes")))
    chosen = order[: setting.examples].to(on)
    split = Split(dataset.train.inputs[chosen], dataset.train.labels[chosen])
    shown = [features(model, names, _batched(dataset, one), setting.most) for one in (split, dataset.validation)]
    right: list[int | None] = []
    widths: list[int | None] = []
    converged = True
    for learned, judged in zip(*shown, strict=True):
        if learned is None or judged is None:
            right.append(None)
            widths.append(None)
            continue
        probe = fit_probe(learned, split.labels, dataset.classes, setting.l2)
        right.append(probe.right(judged, dataset.validation.labels))
        widths.append(learned.shape[1])
        converged &= probe.converged
    angles, memory, failed = _angles(run, model, names, dataset, estimator, setting, kept if trained else None)
    return _Looked(names, right, widths, angles, len(split), len(dataset.validation), converged, memory, failed)


def _inputs(dataset: Dataset, split: Split, count: int) -> Tensor:
    return dataset.for_model(split.inputs[:count])


def _batched(dataset: Dataset, split: Split) -> list[Tensor]:
    return [dataset.for_model(inputs) for inputs in split.inputs.split(AT_A_TIME)]


def _angles(
    run: Run,
    model: nn.Module,
    names: Sequence[str],
    dataset: Dataset,
    estimator: Estimator,
    setting: LayersSetting,
    kept: dict[str, Tensor] | None,
) -> tuple[list[list[float]], str, str | None]:
    """The cosines of every layer, where the estimator's memory came from, and why there are none."""
    measured, others = _losses(run, dataset, setting)
    on = next(model.parameters()).device
    generator = torch.Generator(on).manual_seed(stream(setting.seed, "directions of layers"))
    angles: list[list[float]] = [[] for _ in names]
    own = kept is not None and estimator.stateful and builders.estimator(run) == estimator
    memory = "its own" if own else f"{setting.learn} steps" if estimator.stateful else "none"
    try:
        state = kept if own and kept is not None else learn(others, setting.learn, model, estimator, generator)
        for loss in measured:
            for layer, cosine in zip(angles, cosines(loss, model, names, estimator, generator, state), strict=True):
                layer += [] if cosine is None else [cosine]
    except (RuntimeError, ValueError) as error:  # what an estimator cannot do with a model is part of the result
        return [[] for _ in names], memory, str(error).partition("\n")[0]
    return angles, memory, None


def _losses(run: Run, dataset: Dataset, setting: LayersSetting) -> tuple[list[LossOfModel], list[LossOfModel]]:
    """The loss of the batches that are measured, and of those that an estimator learns from: all of the training split, all different."""
    shuffle = torch.Generator().manual_seed(stream(setting.seed, "order of layers"))
    order = torch.randperm(len(dataset.train), generator=shuffle).to(dataset.train.labels.device)
    batches = [batch for batch in order.split(setting.batch) if len(batch) == setting.batch]
    if len(batches) <= setting.batches:
        raise UserError(
            f"{setting.batches} batches of {setting.batch} leave none of the {len(dataset.train):,} training examples of {run.data} to "
            "learn from: take fewer or smaller ones with --batches and --batch-size"
        )
    measure = builders.batch_loss(run)

    def of(batch: Tensor) -> LossOfModel:
        inputs, labels = dataset.for_model(dataset.train.inputs[batch]), dataset.train.labels[batch]
        return lambda model: measure(model, inputs, labels)

    return [of(batch) for batch in batches[: setting.batches]], [of(batch) for batch in batches[setting.batches :]]


def _arm(members: Sequence[tuple[Run, _Looked]], *, trained: bool) -> LayersArm:
    """The record of one arm: with one run intervals are over examples and batches, with several over their seeds."""
    run, first = members[0]
    seen = [looked for _, looked in members]
    failed = next((looked.failed for looked in seen if looked.failed), None)
    layers: list[LayerRecord] = []
    for place, name in enumerate(["", *first.names]):
        probes = [(looked.right[place], looked.held_out) for looked in seen]
        angles = [looked.angles[place - 1] for looked in seen] if place and not failed else []
        layers.append({"name": name, "probe": _probed(probes), "cosine": _turned(angles)})
    return {
        "label": "untrained" if not trained else _text(builders.estimator(run)),
        "kind": "untrained" if not trained else str(run.estimator["name"]),
        "data": run.data,
        "model": run.model,
        "runs": [member.identity for member, _ in members],
        "trained": trained,
        "memory": first.memory,
        "examples": first.examples,
        "held_out": first.held_out,
        "features": first.widths,
        "converged": all(looked.converged for looked in seen),
        "failed": failed,
        "layers": layers,
    }


def _probed(seen: Sequence[tuple[int | None, int]]) -> LayerNumber | None:
    shares = [right / count for right, count in seen if right is not None]
    if not shares:
        return None
    if len(shares) == 1:
        right, count = seen[0]
        assert right is not None
        found = stats.proportion(right, count)
        return {"value": found.mean, "low": found.low, "high": found.high, "n": count, "over": "examples"}
    return _number(shares, "seeds", 0, 1)


def _turned(angles: Sequence[Sequence[float]]) -> LayerNumber | None:
    means = [sum(layer) / len(layer) for layer in angles if layer]
    if not means:
        return None
    return _number(angles[0], "batches", -1, 1) if len(angles) == 1 else _number(means, "seeds", -1, 1)


def _number(values: Sequence[float], over: str, least: float, most: float) -> LayerNumber:
    found = stats.estimate(values, least, most)
    return {"value": found.mean, "low": found.low, "high": found.high, "n": found.n, "over": over}


def _text(estimator: Estimator) -> str:
    """The estimator as the command line takes it. Options that have their defaults are left out."""
    config = to_config(estimator)
    try:
        usual = to_config(type(estimator)())
    except TypeError:  # a user's own may have options without a default
        usual = {}
    return format_estimator({key: value for key, value in config.items() if key == "name" or key not in usual or value != usual[key]})


def _tell_apart(arms: list[LayersArm], runs: Sequence[Run]) -> None:
    """Give arms of one label what else they differ in: network and data, or else the rate, or else the first run's name."""
    details: tuple[Callable[[Run], str], ...] = (
        lambda run: f"{run.model}, {run.data}",
        lambda run: f"{run.optimizer.name}, lr {run.optimizer.lr:g}",
        lambda run: run.identity,
    )
    for detail in details:
        labels = [arm["label"] for arm in arms]
        shared: dict[str, set[str]] = {}
        for arm, run in zip(arms, runs, strict=True):
            shared.setdefault(arm["label"], set()).add(detail(run))
        for arm, run, label in zip(arms, runs, labels, strict=True):
            if labels.count(label) > 1 and len(shared[label]) > 1:
                arm["label"] = f"{label} · {detail(run)}"


def _keep(store: Store, where: dict[str, Any], new: dict[str, Any]) -> None:
    """Store a measurement beside those that were made on the same machine. It replaces an earlier one of the same runs and setting."""
    path = store.root / "layers.json"
    with store.changing():
        stored, kept = read_json(path), []
        if stored is not None and stored.get("schema") == SCHEMA:
            check(path, stored, {"environment": dict, "measurements": list})
            if all(stored["environment"].get(key) == where.get(key) for key in environment.SAME_MACHINE):
                kept = [other for other in stored["measurements"] if _what(other) != _what(new)]
        write_json(path, {"schema": SCHEMA, "environment": where, "measurements": [*kept, new]}, depth=5)


def _what(measurement: dict[str, Any]) -> Any:
    fields = {key: value for key, value in measurement.items() if key not in ("command", "arms")}
    return fields, [arm["runs"] for arm in measurement["arms"]]
