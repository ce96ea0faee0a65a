"""The study of fine-tuning: what its arms hold equal, that every estimator can be made, its rows and budgets."""

from __future__ import annotations

from itertools import pairwise

import pytest

from forwardgrad.estimators import from_config
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.recipes.finetune import (
    GPT,
    PRETRAINING,
    SHORT,
    SOME,
    SPENT,
    TEXTS,
    USUAL,
    WAYS,
    WORD_WAYS,
    Size,
    finetune,
    pretraining,
)
from forwardgrad.lab.studies import Length, Pace

STARTS = {PRETRAINING.identity: "a" * 64}


def test_arms_have_equal_seconds_trials_and_batches() -> None:
    known: dict[Size, tuple[int, int, int, int]] = {"small": (2, 10, 30, 1), "medium": (4, 30, 90, 3), "full": (4, 60, 300, 3)}
    assert set(known) == set(SPENT)
    for size, (trials, tuning, training, seeds) in known.items():
        study = finetune(size=size)
        assert {len(study.points(arm)) for arm in study.arms} == {trials}
        assert {(arm.run.batch_size, arm.run.optimizer.anneal) for arm in study.arms} == {(16, True)}
        assert len({(arm.run.data, arm.run.evaluate_every) for arm in study.arms}) == len({arm.run.data for arm in study.arms})
        assert study.training is not None
        assert (study.tuning.seconds, study.training.seconds, study.seeds) == (tuning, training, seeds)


def test_a_step_that_takes_longer_is_taken_less_often() -> None:
    study = finetune(["movies-backprop", "movies-readout"])
    paces = {"minilm": Pace(2.0, 3), "minilm-readout": Pace(0.5, 1)}
    steps = [study.final(arm, {}, 0, lambda run: paces[run.model]).steps for arm in study.arms]
    assert steps == [150, 600]
    assert Length(seconds=300) == study.training


@pytest.mark.parametrize("way", WAYS)
def test_every_way_names_an_estimator_and_four_rates_half_a_decade_apart(way: str) -> None:
    (arm,) = finetune([f"few-{way}"]).arms
    from_config(arm.run.estimator)
    rates = arm.space["lr"]
    assert len(rates) == 4  # type: ignore[arg-type]
    assert all(2.9 < b / a < 3.4 for a, b in pairwise(rates))  # type: ignore[arg-type]
    assert arm.run.model.startswith("minilm")


def test_rows_name_texts_and_arms() -> None:
    assert [arm.name for arm in finetune(size="small").arms] == [f"movies-{way}" for way in WAYS if way in SHORT]
    assert [arm.name for arm in finetune(size="medium").arms] == [f"movies-{way}" for way in WAYS if way in SOME]
    assert len(finetune().arms) == 2 * len(USUAL)
    assert [arm.run.data for arm in finetune(["drugs-mezo", "few-mezo"]).arms] == ["movie-reviews-16", "drug-reviews"]
    assert {arm.group for arm in finetune(list(TEXTS), starts=STARTS).arms} == {text.title for text in TEXTS.values()}
    with pytest.raises(
        UserError, match=r"no row 'mezo' of fine-tuning: choose from movies, few, drugs, words, or name an arm, such as movies-"
    ):
        finetune(["mezo"])


def test_trials_of_the_small_budget_differ_in_their_rate_alone() -> None:
    study = finetune(["movies-mezo"], size="small")
    arm = study.arms[0]
    runs = [study.trial(arm, point, lambda run: Pace(1.0, 2)) for point in study.points(arm)]
    assert len({run.optimizer.lr for run in runs}) == 2
    assert {run.steps for run in runs} == {10}


@pytest.mark.parametrize("way", WORD_WAYS)
def test_arms_that_predict_words_start_from_the_same_weights(way: str) -> None:
    (arm,) = finetune([f"words-{way}"], starts=STARTS).arms
    assert (arm.run.data, arm.run.model, arm.run.start) == ("drug-words", GPT, "a" * 64)
    more = {"classes": 512, "head_rate": 3e-3} if way == "local" else {}  # a class for every word is too many
    assert arm.run.estimator == WAYS[way].estimator | more
    rates = arm.space["lr"]
    assert all(2.9 < b / a < 3.4 for a, b in pairwise(rates))  # type: ignore[arg-type]
    assert len(rates) == 4  # type: ignore[arg-type]


def test_what_rows_start_from_has_to_be_trained_first() -> None:
    assert pretraining(["words-mezo", "movies"]) == [PRETRAINING]
    assert pretraining() == pretraining(["drugs"]) == []
    assert (PRETRAINING.data, PRETRAINING.model, PRETRAINING.start) == ("movie-words", GPT, None)
    with pytest.raises(UserError, match=rf"the arms of words start from the weights of the run {PRETRAINING.identity}"):
        finetune(["words"])
    with pytest.raises(UserError, match="no row 'words-readout' of fine-tuning"):
        pretraining(["words-readout"])
