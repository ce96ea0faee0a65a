"""The paper as one campaign of studies, at full length or within a quarter of an hour; loads without torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from forwardgrad.lab.recipes import paper
from forwardgrad.lab.studies import Length, Study

Budget = Literal["small", "paper"]
SEEDS = 6  # two arms need as many shared seeds before a permutation test can tell them apart
CNN_SEEDS = 3  # of `small`, where evaluating the CNN takes longer than training it


def everything(budget: Budget, seeds: int | None = None) -> tuple[Study, ...]:
    """Table I tuned anew with equal budgets, Table I as published, and Baydin's comparison.

    `paper` trains as long as the paper did and searches its grids. `small` keeps MNIST's networks, the data, the grids' values and the
    fresh seeds, and shortens the rest: six points of every grid chosen quasi-randomly (four for the CNN), trials and runs of some hundred
    steps, and nothing of CIFAR-10. What is shortened is marked as such, and a claim that needs longer runs is not decided.
    """
    if budget == "paper":
        count = seeds or SEEDS
        return (paper.table1(seeds=count, retune=True), paper.table1(seeds=count), paper.baydin(seeds=count))
    return (
        _shortened(paper.table1(["nn"], seeds=seeds or SEEDS, retune=True), trials=6, tuning=200, training=600),
        _shortened(paper.table1(["cnn-sgd"], seeds=seeds or CNN_SEEDS, retune=True), trials=4, tuning=50, training=100),
        _shortened(paper.baydin(seeds=seeds or SEEDS), trials=4, tuning=200, training=400),
    )


def _shortened(study: Study, *, trials: int, tuning: int, training: int) -> Study:
    return replace(study, trials=trials, sampler="halton", tuning=Length(steps=tuning), training=Length(steps=training))
