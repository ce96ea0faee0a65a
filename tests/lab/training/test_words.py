"""Networks that predict tokens: losses and accuracies against sums by hand, perplexity, and what each estimator makes of such a loss."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from tests.support.words import SIZE, by_hand, small_words

import forwardgrad as fg
from forwardgrad.lab import models
from forwardgrad.lab.data import datasets
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store import Store, describe
from forwardgrad.lab.studies import Optimizer, Run
from forwardgrad.lab.training import builders, evaluation, loop, state
from forwardgrad.lab.training.training import Training

CPU = torch.device("cpu")
REPEATS = 60
RUN = Run("drug-words", "gpt-1x64", {"name": "backprop"}, Optimizer("adam", 3e-3), batch_size=4, steps=30)


@pytest.fixture(autouse=True)
def _words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "read_words", small_words)


def test_the_network_has_the_vocabulary_and_the_places_of_its_data() -> None:
    dataset = builders.dataset(RUN, CPU)
    model = builders.initialised_model(RUN, dataset, CPU)
    assert model(dataset.test.inputs[:2]).shape == (2, 64, SIZE)
    body = 4 * (64 * 64 + 64) + 2 * 4 * 64 * 64 + 5 * 64 + 2 * 2 * 64
    assert sum(p.numel() for p in model.parameters()) == (SIZE + 64) * 64 + body + 2 * 64  # its read-out is tied
    for name in ("bert-1x64", "minilm"):
        with pytest.raises(UserError, match=f"the model {name} sorts whole texts, and these data ask for the token behind every place"):
            models.build(name, dataset.shape, dataset.classes, next_token=True)


@pytest.mark.parametrize("places", [64, 10_000])
def test_loss_and_accuracy_are_means_over_tokens_and_leave_padding_out(places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "PLACES", places)
    training = Training.begin(RUN, builders.dataset(RUN, CPU), CPU)
    training.advance(3)
    test = training.dataset.test
    assert bool((test.labels == -100).any())
    with torch.no_grad():
        loss, right = by_hand(training.state.model(test.inputs), test.labels)
    found = evaluation.losses_on(training, test)
    assert evaluation.summary(found) == pytest.approx((loss, right), rel=1e-6)
    assert len(found[0]) == int((test.labels != -100).sum())
    assert math.isnan(evaluation.balanced_accuracy(found[1], test.labels))


def test_a_step_descends_on_the_mean_over_tokens() -> None:
    dataset = builders.dataset(RUN, CPU)
    model = builders.initialised_model(RUN, dataset, CPU)
    last = dataset.test.inputs[-2:], dataset.test.labels[-2:]  # the last window has padding
    assert bool((last[1] == -100).any())
    loss = builders.batch_loss(RUN)(model, *last)
    assert float(loss.detach()) == pytest.approx(by_hand(model(last[0]).detach(), last[1])[0], rel=1e-6)
    smooth = builders.batch_loss(dataclasses.replace(RUN, label_smoothing=0.1))(model, *last)
    logs = torch.log_softmax(model(last[0]).detach().double(), 2)[last[1] != -100]
    assert float(smooth.detach()) == pytest.approx(0.9 * float(loss.detach()) - 0.1 * float(logs.mean()), rel=1e-6)


def test_a_run_learns_and_tells_its_perplexity(tmp_path: Path) -> None:
    folder = Store(tmp_path).folder(RUN.identity)
    result = loop.train(dataclasses.replace(RUN, steps=60, evaluate_every=20), folder, keep_weights=True)
    assert result["test"]["perplexity"] == pytest.approx(math.exp(result["test"]["loss"]), rel=1e-12)
    assert result["validation_perplexity"] == pytest.approx(math.exp(result["validation_loss"]), rel=1e-12)
    assert result["test"]["perplexity"] < 10 < SIZE  # a guess has 30; one of two letters follows, mostly the second
    assert result["test"]["balanced_accuracy"] is None
    assert f"perplexity {result['test']['perplexity']:.4g}, accuracy" in describe(result)
    assert "last16" not in result["test"]
    dataset = builders.dataset(RUN, CPU)
    model = builders.initialised_model(RUN, dataset, CPU)
    state.read_weights(folder, model)
    assert by_hand(model(dataset.test.inputs).detach(), dataset.test.labels)[0] == pytest.approx(result["test"]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    "estimator",
    [
        {"name": "forward", "law": "rademacher", "perturb": "low-rank"},
        {"name": "forward", "law": "rademacher", "perturb": "activity", "exact_output": True},
    ],
    ids=lambda estimator: f"{estimator['name']}-{estimator['perturb']}",
)
def test_estimates_of_the_loss_of_every_token_are_unbiased_along_the_gradient(estimator: dict[str, object]) -> None:
    """g·ĝ/‖g‖² has the mean 1, g being backpropagation's in the same places; z < 4.5, wrong about 7 times in a million seeds."""
    run = dataclasses.replace(RUN, estimator=estimator)
    dataset = builders.dataset(run, CPU)
    model, method = builders.initialised_model(run, dataset, CPU), builders.estimator(run)
    batch = dataset.test.inputs[:3, :6], dataset.test.labels[:3, :6].clone()
    batch[1][0, 2:] = -100  # as the last window has
    loss = builders.batch_loss(run)
    exact = torch.autograd.grad(loss(model, *batch), list(model.parameters()))
    size, generator = sum(float(g.square().sum()) for g in exact), builders.generator(run, CPU)
    found = []
    for _ in range(REPEATS):
        model.zero_grad()
        fg.estimate_grad_(lambda m: loss(m, *batch), model, method, generator=generator)
        found.append(sum(float((g * p.grad).sum()) for g, p in zip(exact, model.parameters(), strict=True)) / size)  # type: ignore[operator]
    mean = torch.tensor(found).double()
    assert abs(float(mean.mean()) - 1) < 4.5 * float(mean.std()) / math.sqrt(len(found))
    assert float(mean.std()) / math.sqrt(len(found)) < 0.3  # or nothing could be seen
