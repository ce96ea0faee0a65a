"""The time of one training step of each arm beside a plain forward pass, all measured in one run, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats

from forwardgrad.estimators import Backprop, Estimator, ForwardGradient
from forwardgrad.gradient import estimate_grad_
from forwardgrad.lab import environment, models
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.run import SCHEMA
from forwardgrad.lab.store import Store, check, read_json, write_json

WARM_UP = 3
INPUTS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "logistic": ("mnist", (1, 28, 28)),
    "nn": ("mnist", (1, 28, 28)),
    "cnn": ("mnist", (1, 28, 28)),
    "cifar-cnn": ("cifar10", (3, 32, 32)),
}
ARMS: tuple[tuple[str, str, Estimator | None], ...] = (
    ("plain forward", "plain", None),
    ("backpropagation", "backprop", Backprop()),
    ("forward gradient", "forward", ForwardGradient()),
)


def measured(store: Store, device: str) -> set[str]:
    """The networks whose cost on this kind of device is stored."""
    stored = _stored(store)
    here = environment.describe(environment.device(device))["device"]
    return {network["model"] for network in stored["networks"]} if stored["environment"].get("device") == here else set()


def measure(store: Store, names: list[str], *, batch_size: int, rounds: int, device: str) -> str:
    """Measure the networks, store them in OUT/cost.json beside those measured before on the same machine, and return a text table."""
    if unknown := [name for name in names if name not in INPUTS]:
        raise UserError(f"unknown model {unknown[0]!r}: choose from {', '.join(INPUTS)}")
    on = environment.device(device)
    where = environment.describe(on)
    new = [_network(name, batch_size, rounds, on) for name in names]
    stored = _stored(store)
    kept = stored["networks"] if _same_machine(stored["environment"], where) else []
    networks = [network for network in kept if network["model"] not in names] + new
    write_json(store.root / "cost.json", {"schema": SCHEMA, "environment": where, "networks": networks})
    return "\n".join(_line(network, arm) for network in new for arm in network["arms"])


def _stored(store: Store) -> dict[str, Any]:
    path = store.root / "cost.json"
    if (stored := read_json(path)) is None or stored.get("schema") != SCHEMA:
        return {"environment": {}, "networks": []}
    for network in check(path, stored, {"environment": dict, "networks": list})["networks"]:
        check(path, network, {"model": str, "arms": list})
    return stored


def _same_machine(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in ("device", "threads", "torch", "commit"))


def _line(network: dict[str, Any], arm: dict[str, Any]) -> str:
    milliseconds = f"{1e3 * arm['seconds']:8.2f} ms ({1e3 * arm['low']:.2f} to {1e3 * arm['high']:.2f})"
    return f"{network['model']:10} {arm['name']:17} {milliseconds:32} {arm['ratio']:.2f} plain forward passes"


def _network(name: str, batch_size: int, rounds: int, on: torch.device) -> dict[str, Any]:
    data, shape = INPUTS[name]
    with torch.random.fork_rng([on.index or 0] if on.type == "cuda" else []):
        torch.manual_seed(0)
        model = models.build(name, shape, 10).to(on)
        images, labels = torch.rand(batch_size, *shape, device=on), torch.randint(10, (batch_size,), device=on)
        steps = [_step(model, images, labels, estimator) for _, _, estimator in ARMS]
        seconds = np.array([[_timed(step, on) for step in steps] for _ in range(WARM_UP + rounds)])[WARM_UP:].T
    return {
        "model": name,
        "data": data,
        "batch": batch_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "arms": [_summary(label, kind, seconds[index], seconds[0]) for index, (label, kind, _) in enumerate(ARMS)],
    }


def _step(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, estimator: Estimator | None) -> Callable[[], None]:
    """A whole step: gradient and SGD update; for the plain forward pass the loss alone. The rate is small, so that no arm diverges."""

    def loss(model: torch.nn.Module) -> torch.Tensor:
        return F.cross_entropy(model(images), labels)

    def plain() -> None:
        with torch.no_grad():
            loss(model)

    optimizer = torch.optim.SGD(model.parameters(), 1e-7)
    generator = torch.Generator(images.device).manual_seed(0)

    def train() -> None:
        optimizer.zero_grad()
        estimate_grad_(loss, model, estimator, generator=generator)
        optimizer.step()

    return plain if estimator is None else train


def _timed(step: Callable[[], None], on: torch.device) -> float:
    if on.type == "cuda":
        torch.cuda.synchronize(on)
    began = time.perf_counter()
    step()
    if on.type == "cuda":
        torch.cuda.synchronize(on)
    return time.perf_counter() - began


def _summary(label: str, kind: str, seconds: np.ndarray, plain: np.ndarray) -> dict[str, Any]:
    """Median and ratio of medians with 95 % bootstrap intervals, resampling whole rounds."""
    low, high = _interval((seconds,), lambda a, axis=-1: np.median(a, axis=axis))
    ratio = float(np.median(seconds) / np.median(plain))
    ratio_low, ratio_high = (1.0, 1.0) if kind == "plain" else _interval((seconds, plain), _ratio)
    return {
        "name": label,
        "kind": kind,
        "n": len(seconds),
        "seconds": float(np.median(seconds)),
        "low": low,
        "high": high,
        "ratio": ratio,
        "ratio_low": ratio_low,
        "ratio_high": ratio_high,
    }


def _ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> Any:
    return np.median(a, axis=axis) / np.median(b, axis=axis)


def _interval(samples: tuple[np.ndarray, ...], statistic: Callable[..., Any]) -> tuple[float, float]:
    interval = stats.bootstrap(
        samples, statistic, paired=len(samples) > 1, vectorized=True, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(interval.low), float(interval.high)
