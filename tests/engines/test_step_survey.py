"""What a step is made of, seen anew at every step: taken over where it holds still, and not kept longer than the step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from weakref import ref

import pytest
import torch
from tests.engines.test_engines import RANK_1, X, Y, loss, made, network, sgd, small
from tests.support.cases import seeded
from torch import nn

import forwardgrad as fg
from forwardgrad.engines import compiled
from forwardgrad.engines.batch import Batch
from forwardgrad.engines.step_survey import StepSurvey

CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "mode": lambda m: m.eval(),
    "option": lambda m: setattr(m[3], "p", 0.5),
    "frozen": lambda m: m[0].weight.requires_grad_(False),
    "parameter": lambda m: setattr(m[4], "weight", nn.Parameter(m[4].weight.detach().clone())),
    "single number": lambda m: setattr(m[5], "bias", nn.Parameter(m[5].bias.detach().clone())),  # another object, but equal
    "data": lambda m: setattr(m[0].weight, "data", m[0].weight.data.t().contiguous().t()),
    "buffer": lambda m: m[1].register_buffer("running_mean", m[1].running_mean.clone()),
    "type": lambda m: m.double(),
    "layer": lambda m: m.__setitem__(2, nn.Tanh()),
    "one more": lambda m: m.append(nn.Identity()),
    "another dictionary": lambda m: setattr(m[2], "_parameters", {"weight": nn.Parameter(torch.ones(1))}),
    "hook": lambda m: m[2].register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_survey_takes_over_what_holds_still_and_nothing_else(change: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(*network(0.3), nn.Linear(3, 1))
    step = fg.TrainingStep(loss, model, sgd(model), RANK_1, generator=seeded())
    first = StepSurvey(step, Batch((X, Y)))
    same = StepSurvey(step, Batch((X[:7], Y[:7])), first.model)
    assert same.model is first.model
    assert same.key == StepSurvey(step, Batch((X[:7], Y[:7]))).key
    assert same.key != first.key
    change(model)
    now, fresh = StepSurvey(step, Batch((X, Y)), first.model), StepSurvey(step, Batch((X, Y)))
    assert now.model is not first.model
    assert (now.key, now.hooked, now.given) == (fresh.key, fresh.hooked, fresh.given)
    assert [id(t) for t in (*now.tensors, *now.trained)] == [id(t) for t in (*fresh.tensors, *fresh.trained)]


@pytest.mark.parametrize("method", [fg.Backprop(), RANK_1], ids=["backprop", "rank 1"])
def test_a_step_keeps_no_batch(method: fg.Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "compiled", lambda traced, inputs: traced.graph)
    model = small()
    step = fg.TrainingStep(loss, model, sgd(model), method, generator=seeded(), engine="compile")
    for _ in range(2):  # that a graph is made of, and that it takes
        images = X.clone()
        seen = ref(images)
        step(images, Y)
        del images
        gc.collect()
        assert seen() is None
    assert len(made(step)) == 1
