"""How far training without a backward pass goes on the paper's own networks: every estimator, tuned alike, beside backpropagation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.recipes.paper import BACKPROP, FORWARD
from forwardgrad.lab.studies import Arm, DataName, Length, ModelName, Optimizer, Run, Study

LOCAL: dict[str, Any] = {"name": "local", "head": "pooled", "cells": 4}
SEEDS = 3
TUNING_EPOCHS = 2


@dataclass(frozen=True)
class Method:
    """What supplies the gradient of an arm, and the four learning rates that Adam is tuned over; `model` where it is not the network's."""

    label: str
    estimator: dict[str, Any]
    rates: tuple[float, ...]
    model: ModelName | None = None


CALM = (1e-4, 3e-4, 1e-3, 3e-3)  # half a decade apart, as many for every arm
NOISY = (3e-5, 1e-4, 3e-4, 1e-3)  # where noise outweighs the gradient Adam's steps are a walk of the learning rate's own size
CONVEX = (1e-3, 3e-3, 1e-2, 3e-2)  # one layer learns

METHODS: dict[str, Method] = {
    "backprop": Method("backpropagation", BACKPROP, CALM),
    "feedback": Method("learned feedback", {"name": "feedback", "rule": "lms", "use": "direct"}, CALM),
    "feedback-average": Method("feedback by moving average (FDFA)", {"name": "feedback", "rule": "average", "use": "direct"}, CALM),
    "feedback-cv": Method("learned feedback as control variate", {"name": "feedback", "rule": "lms", "use": "control-variate"}, CALM),
    "local": Method("local losses with learned feedback", LOCAL | {"feedback": True}, CALM),
    "local-scalar": Method("local losses, activities moved", LOCAL, CALM),
    "activity": Method("activities moved", {"name": "forward", "law": "rademacher", "perturb": "activity", "exact_output": True}, CALM),
    "cheapest": Method(
        "weights or activities moved", {"name": "forward", "law": "rademacher", "perturb": "cheapest", "exact_output": True}, CALM
    ),
    "per-example": Method("weights moved per example", {"name": "forward", "law": "rademacher", "perturb": "per-example"}, NOISY),
    "low-rank": Method("weights moved at rank one", {"name": "forward", "law": "rademacher", "perturb": "low-rank"}, NOISY),
    "dense": Method("forward gradient", FORWARD, NOISY),
    "zeroth-order": Method("zeroth order", {"name": "zeroth-order"}, NOISY),
    "fixed-feedback": Method("fixed random feedback (DFA)", {"name": "fixed-feedback"}, CALM),
    "readout": Method("last layer alone", {"name": "readout"}, CONVEX),
    "linear": Method("linear classifier", BACKPROP, CONVEX, model="logistic"),
}
SHORT = ("backprop", "local", "feedback", "activity", "cheapest", "fixed-feedback", "readout", "linear")


@dataclass(frozen=True)
class Network:
    """A network of the paper, the epochs of its full study, and the arms that run unless others are named."""

    title: str
    data: DataName
    epochs: int
    usual: tuple[str, ...] = SHORT
    warm_up: int = 0  # steps in which feedback learns before weights do


NETWORKS: dict[ModelName, Network] = {
    "nn": Network("NN · MNIST", "mnist", 5, tuple(METHODS)),
    "cnn": Network("CNN · MNIST", "mnist", 5),
    "cifar-cnn": Network("CNN · CIFAR-10", "cifar10", 30, warm_up=100),
}


def beyond(rows: list[str] | None = None, epochs: int | None = None, seeds: int | None = None, tuning_epochs: int | None = None) -> Study:
    """The arms of all networks, or those named: a network stands for its usual arms, a full name for itself,
    another start of names for all that begin so.

    Every arm trains with Adam, its learning rate annealed to zero, and has four learning rates to choose from.
    """
    arms = tuple(_arm(model, method, epochs) for model, method in _chosen(rows))
    title = "Beyond the paper: every estimator beside backpropagation"
    tuning = tuning_epochs or min(TUNING_EPOCHS, *(arm.run.epochs for arm in arms))
    return Study("beyond", title, arms, SEEDS if seeds is None else seeds, Length(epochs=tuning))


def _chosen(rows: list[str] | None) -> list[tuple[ModelName, str]]:
    """Networks and methods, in the order in which they are listed here."""
    names = {f"{model}-{method}": (model, method) for model in NETWORKS for method in METHODS}
    usual = {model: [f"{model}-{method}" for method in network.usual] for model, network in NETWORKS.items()}
    wanted: set[str] = set()
    for row in rows or NETWORKS:
        within = any(row.startswith(f"{model}-") for model in NETWORKS)  # half a network's name is a slip, not a wish for all its arms
        exact = [row] if row in names else [name for name in names if within and name.startswith(f"{row}-")]
        found = usual.get(row, exact)  # type: ignore[call-overload]
        if not found:
            raise UserError(
                f"no row {row!r} beyond the paper: choose from {', '.join(NETWORKS)}, or one's arms, such as {', '.join(usual['nn'])}"
            )
        wanted.update(found)
    return [pair for name, pair in names.items() if name in wanted]


def _arm(model: ModelName, name: str, epochs: int | None) -> Arm:
    network, method = NETWORKS[model], METHODS[name]
    return Arm(
        name=f"{model}-{name}",
        group=network.title,
        kind="forward" if name == "dense" else name,
        label=method.label,
        run=Run(
            data=network.data,
            model=method.model or model,
            estimator=method.estimator | ({"warm_up": network.warm_up} if network.warm_up and name.startswith("feedback") else {}),
            optimizer=Optimizer("adam", method.rates[0], anneal=True),
            epochs=epochs or network.epochs,
        ),
        space={"lr": method.rates},
        full_epochs=network.epochs,
    )
