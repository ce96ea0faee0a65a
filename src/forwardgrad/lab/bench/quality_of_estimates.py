"""The measurement of `forwardgrad quality`: estimators against the exact gradient of one batch, stored in OUT/quality.json."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forwardgrad.diagnostics import LEAST, quality
from forwardgrad.estimators import Backprop, Estimator, from_config, to_config
from forwardgrad.gradient import estimate_grad_
from forwardgrad.lab import data, environment, models
from forwardgrad.lab.bench.records import EstimateRecord, SettingRecord
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store import Store, check, read_json, write_json
from forwardgrad.lab.studies import SCHEMA, find_here, format_estimator, stream
from forwardgrad.lab.training import builders

LR = 1e-3  # of the warm-up's Adam


@dataclass(frozen=True)
class QualitySetting:
    """Where estimators are measured: after `warm_up` steps of Adam with backpropagation, on one batch of the training split.

    Those that learn take `learn` steps first, with the weights held still, on other batches than the one of the measurement.
    """

    model: str
    data: str
    batch: int
    repeats: int
    warm_up: int
    learn: int
    seed: int


@dataclass(frozen=True)
class MeasuredEstimator:
    """An estimator with its number of tangents K, and the label that it has whatever its K."""

    label: str
    tangents: int | None
    estimator: Estimator


def estimators_at(configs: Sequence[dict[str, Any]], counts: Sequence[int]) -> list[MeasuredEstimator]:
    """Every estimator with every K. An estimator without tangents is there once.

    Raises UserError for an estimator that does not exist, or that is there twice.
    """
    found = []
    for config in configs:
        label = format_estimator({key: value for key, value in config.items() if key != "tangents"})
        try:
            one = from_config(config, find_here)
            varied = "tangents" in to_config(one)
            found += [MeasuredEstimator(label, k, from_config({**config, "tangents": k}, find_here)) for k in (counts if varied else ())]
            found += [] if varied else [MeasuredEstimator(label, None, one)]
        except (ValueError, TypeError) as error:
            raise UserError(f"the estimator {format_estimator(config)!r} cannot be used: {error}") from error
    if len({(arm.label, arm.tangents) for arm in found}) < len(found):
        raise UserError("the same estimator is there twice: every one is measured with every K of --tangents already")
    return found


def measure_estimates(
    store: Store,
    setting: QualitySetting,
    chosen: Sequence[MeasuredEstimator],
    *,
    device: str,
    data_dir: Path | None,
    say: Callable[[str], None],
) -> SettingRecord:
    """Measure the estimators in one setting, and return what is stored of them.

    They are stored beside the settings that were measured on the same machine. `say` gets a line about each estimator.

    Raises UserError where the number of repeats is odd or too small, or the batch is larger than the training split.
    """
    if setting.repeats < LEAST or setting.repeats % 2:
        raise UserError(f"--repeats must be an even number of at least {LEAST}, not {setting.repeats}")
    on = environment.device(device)
    dataset = data.load(setting.data, setting.seed, on, data_dir)
    if setting.batch > len(dataset.train):
        raise UserError(f"a batch of {setting.batch:,} needs more than the {len(dataset.train):,} examples that {setting.data} trains with")
    where = environment.describe(on)
    with torch.random.fork_rng([on.index or 0] if on.type == "cuda" else []):
        new = _measured(setting, chosen, dataset, on, say)
    path = store.root / "quality.json"
    with store.changing():
        write_json(path, {"schema": SCHEMA, "environment": where, "settings": [*_kept(path, where, setting), new]}, depth=4)
    return new


def _kept(path: Path, where: dict[str, Any], setting: QualitySetting) -> list[dict[str, Any]]:
    """The stored settings that were measured on the same machine and are not measured anew."""
    if (stored := read_json(path)) is None or stored.get("schema") != SCHEMA:
        return []
    check(path, stored, {"environment": dict, "settings": list})
    if any(stored["environment"].get(key) != where.get(key) for key in environment.SAME_MACHINE):
        return []
    place = {key: value for key, value in dataclasses.asdict(setting).items() if key not in ("repeats", "learn")}
    for other in stored["settings"]:
        check(path, other, dict.fromkeys(place, object))
    return [other for other in stored["settings"] if any(other[key] != value for key, value in place.items())]


def _measured(
    setting: QualitySetting, chosen: Sequence[MeasuredEstimator], dataset: data.Dataset, on: torch.device, say: Callable[[str], None]
) -> SettingRecord:
    torch.manual_seed(stream(setting.seed, "initialisation"))
    model = models.build(setting.model, dataset.shape, dataset.classes, next_token=dataset.next_token).to(on)
    batches = _batches(setting, dataset)
    loss = next(batches)
    optimizer = torch.optim.Adam(model.parameters(), LR)
    for _ in range(setting.warm_up):
        optimizer.zero_grad()
        estimate_grad_(next(batches), model, Backprop())
        optimizer.step()
    optimizer.zero_grad()
    exact = _gradient(loss, model)
    found = []
    for index, arm in enumerate(chosen):
        say(f"[{index + 1}/{len(chosen)}] {arm.label}" + (f", K = {arm.tangents}" if arm.tangents else ""))
        found.append(_estimate(setting, arm, model, loss, exact, dataset))
    with torch.no_grad():
        value = float(loss(model))
    return {
        "model": setting.model,
        "data": setting.data,
        "batch": setting.batch,
        "repeats": setting.repeats,
        "warm_up": setting.warm_up,
        "learn": setting.learn,
        "seed": setting.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": value,
        "estimates": found,
    }


def _estimate(
    setting: QualitySetting,
    arm: MeasuredEstimator,
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    exact: dict[str, Tensor | None],
    dataset: data.Dataset,
) -> EstimateRecord:
    """One estimator, measured. Where that fails, the record says why, and the others go on."""
    on = next(model.parameters()).device
    generator = torch.Generator(on).manual_seed(stream(setting.seed, f"directions of {arm.label}, {arm.tangents}"))
    found, failed = None, None
    try:
        state = _learned(setting, arm.estimator, model, dataset, generator)
        found = quality(loss, model, arm.estimator, generator=generator, state=state, repeats=setting.repeats, exact=exact).to_dict()
    except (RuntimeError, ValueError) as error:
        failed = str(error).partition("\n")[0]
    return {"label": arm.label, "tangents": arm.tangents, "estimator": to_config(arm.estimator), "failed": failed, "quality": found}


def _learned(
    setting: QualitySetting, estimator: Estimator, model: nn.Module, dataset: data.Dataset, generator: torch.Generator
) -> dict[str, Tensor]:
    """What an estimator with a memory learned in some steps, on other batches than the measured one. The weights stand still."""
    state: dict[str, Tensor] = {}
    if estimator.stateful:
        still, batches = copy.deepcopy(model), _batches(setting, dataset)
        next(batches)
        for _ in range(setting.learn):
            estimate_grad_(next(batches), still, estimator, generator=generator, state=state)
    return state


def _gradient(loss: Callable[[nn.Module], Tensor], model: nn.Module) -> dict[str, Tensor | None]:
    twin = copy.deepcopy(model)
    estimate_grad_(loss, twin, Backprop())
    return {name: p.grad for name, p in twin.named_parameters()}


def _batches(setting: QualitySetting, dataset: data.Dataset) -> Iterator[Callable[[nn.Module], Tensor]]:
    """Losses of batches of the training split, shuffled anew in every epoch; the first is the one of the measurement."""
    epoch, measure = 0, builders.token_cross_entropy if dataset.next_token else F.cross_entropy
    while True:
        shuffle = torch.Generator().manual_seed(stream(setting.seed, f"order of quality's epoch {epoch}"))
        order = torch.randperm(len(dataset.train), generator=shuffle).to(dataset.train.labels.device)
        for batch in order.split(setting.batch):
            inputs, labels = dataset.for_model(dataset.train.inputs[batch]), dataset.train.labels[batch]
            yield lambda model, inputs=inputs, labels=labels: measure(model(inputs), labels)  # type: ignore[misc]
        epoch += 1
