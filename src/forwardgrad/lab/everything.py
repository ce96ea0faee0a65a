"""The paper as one campaign of studies, at full length or within a quarter of an hour; loads without torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from forwardgrad.lab import recipes
from forwardgrad.lab.length import Length
from forwardgrad.lab.study import Sampler, Study

Budget = Literal["small", "paper"]
SEEDS: dict[Budget, int] = {"small": 3, "paper": 5}


def everything(budget: Budget, seeds: int | None = None) -> tuple[Study, ...]:
    """Table I tuned anew with equal budgets, Table I as published, and Baydin's comparison.

    `paper` trains as long as the paper did and searches its grids. `small` keeps the networks, the data, the grids' values and the fresh
    seeds, and shortens the rest: six points of every grid chosen quasi-randomly (four for the CNN, whose steps cost fifteen times as
    much), trials and runs of some hundred steps. What is shortened is marked as such, and a claim that needs longer runs is not decided.
    """
    count = seeds or SEEDS[budget]
    if budget == "paper":
        return (recipes.table1(seeds=count, retune=True), recipes.table1(seeds=count), recipes.baydin(seeds=count))
    return (
        _shortened(recipes.table1(["nn"], seeds=count, retune=True), trials=6, tuning=200, training=800),
        _shortened(recipes.table1(["cnn-sgd"], seeds=count, retune=True), trials=4, tuning=50, training=200),
        _shortened(recipes.table1(["cifar-cnn"], seeds=1), trials=None, tuning=1, training=40),
        _shortened(recipes.baydin(seeds=count), trials=4, tuning=200, training=400),
    )


def _shortened(study: Study, *, trials: int | None, tuning: int, training: int) -> Study:
    sampler: Sampler = "grid" if trials is None else "halton"
    return replace(study, trials=trials, sampler=sampler, tuning=Length(steps=tuning), training=Length(steps=training))
