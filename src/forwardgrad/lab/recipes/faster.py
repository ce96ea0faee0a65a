"""Whether local losses with learned feedback come to backpropagation's accuracy in less time: two arms a network, against the clock.

Both arms train with annealed Adam and compiled steps. Each chooses its learning rate, the size of its batches and how long it trains from
the same grid, by what the race is about: the seconds to an accuracy. A rate that is annealed over more epochs than are needed is at the
accuracy late, so a length that were given would decide the race. Runs are evaluated so often that times are
known to a few per cent, and those of the largest batches to an eighth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.recipes import beyond
from forwardgrad.lab.recipes.paper import BACKPROP
from forwardgrad.lab.studies import Arm, Engine, ModelName, Optimizer, Run, Study

# The challenger. Of three rates of its classifiers, 1e-3, 3e-3 and 1e-2, the last was best on the NN's validation data, seed 0.
LOCAL: dict[str, Any] = {"name": "local", "feedback": True, "head": "pooled", "cells": 4, "head_rate": 1e-2}
ARMS = {"backprop": ("backpropagation", BACKPROP), "local": ("local losses with learned feedback", LOCAL)}
ENGINE: Engine = "compile"
MARGIN = 0.001  # of accuracy, by which a trial has to pass the target: what just does with one seed does not with every other


@dataclass(frozen=True)
class TimedNetwork:
    """The validation accuracy that a network races to, what is searched, the seeds of its arms, and the steps between evaluations."""

    target: float
    rates: tuple[float, ...]
    epochs: tuple[int, ...]
    batches: tuple[int, ...]
    seeds: int
    every: int


TIMED: dict[ModelName, TimedNetwork] = {
    "nn": TimedNetwork(0.98, (1e-3, 2e-3, 4e-3, 8e-3), (2, 3, 4), (64, 128, 256), seeds=6, every=50),
    "cnn": TimedNetwork(0.99, (1e-3, 3e-3, 6e-3), (2,), (64,), seeds=6, every=100),
    "cifar-cnn": TimedNetwork(0.70, (3e-4, 1e-3), (4, 6, 8), (64,), seeds=4, every=100),
}
SMALL: dict[ModelName, TimedNetwork] = {"nn": TimedNetwork(0.97, (1e-3, 2e-3), (1,), (64,), seeds=6, every=25)}


def faster(rows: list[str] | None = None, epochs: int | None = None, seeds: int | None = None, *, small: bool = False) -> tuple[Study, ...]:
    """A study of two arms for each network, or for those named; all are kept in one record. `small` is the NN alone, to a lower target.

    With `epochs` every run trains as long, and lengths are not searched; less than the shortest length is marked as shortened.
    """
    known = SMALL if small else TIMED
    for row in rows or ():
        if row not in known:
            also = " (--budget small has no other)" if small and row in TIMED else ""
            raise UserError(f"no row {row!r} against the clock{also}: choose from {', '.join(known)}")
    return tuple(
        _study(model, replace(timed, epochs=(epochs,) if epochs else timed.epochs, seeds=seeds or timed.seeds))
        for model, timed in known.items()
        if not rows or model in rows
    )


def _study(model: ModelName, timed: TimedNetwork) -> Study:
    arms = tuple(_arm(model, kind, timed) for kind in ARMS)
    title = "Time to backpropagation's accuracy"
    return Study("faster", title, arms, timed.seeds, tuning=None, chosen_by="time", target=timed.target, margin=MARGIN)


def _arm(model: ModelName, kind: str, timed: TimedNetwork) -> Arm:
    (label, estimator), network = ARMS[kind], beyond.NETWORKS[model]
    run = Run(
        data=network.data,
        model=model,
        estimator=estimator,
        optimizer=Optimizer("adam", timed.rates[0], anneal=True),
        epochs=timed.epochs[-1],
        batch_size=timed.batches[0],
        engine=ENGINE,
        evaluate_every=timed.every,
    )
    space = {"lr": timed.rates, "epochs": timed.epochs, "batch_size": timed.batches}
    searched = {name: values for name, values in space.items() if len(values) > 1}
    return Arm(f"{model}-{kind}", network.title, kind, label, run, searched, full_epochs=min(TIMED[model].epochs))
