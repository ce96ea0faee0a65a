"""What a run takes where the user says nothing: the estimator, the optimizer and the learning rate.

The estimator is the one with the least noise for its time among those whose steps fit into little more than the memory of inference. A
step on MiniLM (22.7 million weights, 16 rows of 64 tokens) holds 50 MB above the parameters with directions of rank one, 52 MB with
zeroth order and 366 MB with backpropagation and Adam. A direction of rank one costs less time than a pair of zeroth order, and its
derivative is exact.

Rates of whole weights and of adapters are the middle of the ranges that Malladi et al., "Fine-Tuning Language Models with Just Forward
Passes" (2023), searched for plain gradient descent along random directions. They are where a search begins.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.finetuning.asked import FineTuning, OptimizerKind
from forwardgrad.lab.studies import parse_estimator


class Custom(NamedTuple):
    """An optimizer, and its learning rates for whole weights and for adapters."""

    optimizer: OptimizerKind
    lr: float
    lora: float


ESTIMATOR = "forward(perturb=low-rank(rank=1))"
SCORED = "zeroth-order(epsilon=0.01)"  # a score of labels moves in steps: nearby points would mostly have the same
RANDOM = Custom("sgd", 1e-6, 5e-5)
RATES = {"forward": RANDOM, "zeroth-order": RANDOM, "guess": RANDOM, "readout": Custom("adam", 1e-3, 1e-3)}
OTHERWISE = Custom("adam", 5e-5, 2e-4)  # estimates without much noise: what is usual for backpropagation


def customary(asked: FineTuning) -> FineTuning:
    """What was asked for, with what was left out filled in."""
    estimator = asked.estimator or parse_estimator(SCORED if asked.score else ESTIMATOR)
    usual = RATES.get(estimator["name"], OTHERWISE)
    lr = asked.lr if asked.lr is not None else usual.lora if asked.lora else usual.lr
    if lr * asked.weight_decay >= 1:
        raise UserError(f"--weight-decay must be below 1/lr, which is {1 / lr:g}, not {asked.weight_decay}")
    return dataclasses.replace(asked, estimator=estimator, optimizer=asked.optimizer or usual.optimizer, lr=lr)
