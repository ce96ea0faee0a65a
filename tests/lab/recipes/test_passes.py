"""The study at equal forward passes: what its arms hold equal, that passes are counted as they are made, its rows and budgets."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import forwardgrad as fg
from forwardgrad.estimators import from_config
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.recipes.passes import FULL, POINTS, QUESTIONS, SMALL, WALKERS, passes
from forwardgrad.lab.studies import Pace


@pytest.mark.parametrize("name", WALKERS)
def test_a_step_takes_the_passes_that_it_counts(name: str) -> None:
    walker = WALKERS[name]
    net, inputs, labels = nn.Linear(4, 3), torch.randn(5, 4), torch.randint(3, (5,))
    estimator = from_config(walker.estimator)
    loss = lambda model: nn.functional.cross_entropy(model(inputs), labels)  # noqa: E731
    made = fg.estimate_grad_(loss, net, estimator, generator=torch.Generator().manual_seed(0))
    assert made.forward_passes == walker.passes


@pytest.mark.parametrize("small", [False, True])
def test_arms_are_given_as_many_passes_trials_seeds_and_looks(small: bool) -> None:
    study, given = passes(small=small), SMALL if small else FULL
    assert study.tuning == study.training
    assert study.training is not None
    assert (study.training.forward_passes, study.seeds, study.chosen_by) == (given.passes, given.seeds, "loss")
    assert {len(study.points(arm)) for arm in study.arms} == {5}
    assert len({(arm.group, arm.run.data, arm.run.model, arm.run.batch_size, arm.run.engine) for arm in study.arms}) == 1
    for arm, walker in zip(study.arms, WALKERS.values(), strict=True):
        run = study.final(arm, {}, 0, lambda _, each=walker.passes: Pace(1.0, each))  # type: ignore[misc]
        assert run.steps is not None
        assert given.passes - walker.passes < run.steps * walker.passes <= given.passes
        assert run.optimizer.name == "sgd"
        assert not run.optimizer.anneal
        assert run.evaluate_every is not None
        assert POINTS <= run.steps / run.evaluate_every < 1.5 * POINTS
        assert all(1.35 < b / a < 1.45 for a, b in pairwise(arm.space["lr"]))  # type: ignore[arg-type]


def test_a_claim_brings_the_arms_that_it_needs() -> None:
    assert [arm.name for arm in passes().arms] == [f"mlp-{name}" for name in WALKERS]
    for row, names in QUESTIONS.items():
        assert {arm.name for arm in passes([row]).arms} == {f"mlp-{name}" for name in names}
    assert passes(["fzoo"], seeds=9).seeds == 9
    with pytest.raises(UserError, match="no row 'mezo' at equal passes: choose from fzoo, rank, forward, directions"):
        passes(["fzoo", "mezo"])


def test_arms_that_are_compared_differ_in_one_thing() -> None:
    mezo, several = WALKERS["mezo"].estimator, WALKERS["mezo-8"].estimator
    assert several == mezo | {"tangents": 8}
    assert WALKERS["forward-8"].estimator == WALKERS["forward"].estimator | {"tangents": 8}
    assert WALKERS["rank-one"].estimator == several | {"perturb": "low-rank", "chunk_size": None}
    assert WALKERS["rank-one"].rates == WALKERS["mezo-8"].rates == WALKERS["forward-8"].rates
    assert WALKERS["mezo"].rates == WALKERS["forward"].rates
