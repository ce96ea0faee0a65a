"""Wherever the examples of a batch lie, and wherever they meet: no estimate is biased without a word."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import Loss, perceptron, rows, seeded, true_gradient
from tests.support.layout import Layout
from tests.support.layouts import CASES
from tests.support.units import summed_over_units
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.calls.survey import Survey
from forwardgrad.calls.surveyed import Surveyed
from forwardgrad.objective import Objective
from forwardgrad.perturbations.examples import Reading, Rows, codes, halves

MEET = {  # of the cases whose examples meet ahead of the loss; where they meet in it, the loss is told apart at its outputs
    "a_sum_across_examples",
    "a_running_sum_across_examples",
    "attention_over_the_batch",
    "standardised_by_hand",
    "rolled_over_the_batch",
    "mixed_up_inside",
    "graph_network",
    "batch_norm_in_training",
    "hidden_behind_zeros",
    "hidden_behind_a_gate",
    "flattened_tokens_scored_one_by_one",
}


def reading(case: Layout, perturb: fg.Perturbation) -> Reading:
    model, loss = case.build()
    return Surveyed.of(Objective(loss, model), perturb, exact_output=False, who="").reading()


@pytest.mark.parametrize("perturb", [fg.Activity(), fg.Activity(masked=False)], ids=["masked", "all"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout_is_unbiased(case: Layout, perturb: fg.Perturbation, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss = case.build()
    wanted = true_gradient(model, loss)
    torch.manual_seed(7)
    found = summed_over_units(model, loss, perturb, monkeypatch)
    for name, g in wanted.items():
        torch.testing.assert_close(found[name], g, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("x", [rows(4), rows(1, 4), rows(6, 4)], ids=["alone", "a batch of one", "a batch"])
def test_a_penalty_on_weights_is_counted_once_and_fully(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, y = perceptron().double(), torch.tensor(1) if x.dim() == 1 else torch.arange(len(x)) % 3

    def loss(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(x), y) / 3 + sum(p.square().sum() for p in m.parameters())

    wanted = true_gradient(model, loss)
    found = summed_over_units(model, loss, fg.Activity(), monkeypatch)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("perturb", [fg.Activity(), fg.PerExample()], ids=lambda p: p.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_examples_are_told_apart_wherever_they_do_not_meet(case: Layout, perturb: fg.Perturbation) -> None:
    found = reading(case, perturb)
    assert found.way != "whole", found.why
    assert bool([place.layer for place in found.places if place.why]) == (case.name in MEET)
    alone = case.examples_apart is None or found.count is None or case.shared
    assert alone or any(place.rows is not None and place.apart for place in found.places)


STATISTICAL = ("transformer_time_first_of_equal_sizes", "patches_in_front_of_the_batch", "graph_network", "pairwise_logits")


@pytest.mark.some(3)
@pytest.mark.parametrize(
    "method",
    [fg.ForwardGradient(perturb=fg.PerExample(), law=fg.Rademacher()), fg.LearnedFeedback(use="control-variate")],
    ids=lambda method: method.name,
)
@pytest.mark.parametrize("case", [case for case in CASES if case.name in STATISTICAL], ids=str)
def test_directions_of_rank_one_and_feedback_are_unbiased_too(case: Layout, method: fg.Estimator) -> None:
    """Tested along 17 directions of all weights: correct code fails once in 10,000 (Bonferroni), and the seed is fixed."""
    model, loss = case.build()
    found = fg.quality(loss, model, method, generator=seeded(1), state={}, repeats=200)
    assert found.total.p > 1e-4
    assert found.total.length is not None
    assert found.total.length.low < 1 < found.total.length.high or found.total.p > 0.01


# What it costs ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("perturb", [fg.Activity(), fg.PerExample(), fg.Cheapest()], ids=lambda p: p.name)
def test_a_scaled_loss_has_the_noise_of_the_loss(perturb: fg.Perturbation) -> None:
    def estimate(loss: Loss) -> Tensor:
        model, generator = make(), seeded(3)
        fg.estimate_grad_(loss, model, fg.ForwardGradient(perturb=perturb), generator=generator)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return perceptron().double()

    x, y, scale = rows(6, 4), torch.arange(6) % 3, torch.tensor(2.0**16, dtype=torch.float64)
    plain = estimate(lambda m: F.cross_entropy(m(x), y))
    for scaled, factor in (
        (lambda m: F.cross_entropy(m(x), y) / 4, 1 / 4),
        (lambda m: scale * F.cross_entropy(m(x), y), 2.0**16),
        (lambda m: F.cross_entropy(m(x), y) + 0 * m[0].weight.detach().square().sum(), 1),
        (lambda m: -sum([F.cross_entropy(m(x), y, reduction="sum")]) / 6, -1),
    ):
        torch.testing.assert_close(estimate(scaled), plain * factor, rtol=1e-10, atol=1e-13)


def test_it_is_said_once_what_it_costs_where_examples_meet() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    method, x, y = fg.ForwardGradient(perturb=fg.Activity()), rows(6, 4), torch.arange(6) % 3
    said = r"perturb=Activity\(masked=True\): examples meet behind 0\.weight, 0\.bias: what moved there is scored by the whole loss"
    for step in range(3):
        with pytest.warns(UserWarning, match=said) if step == 0 else contextlib.nullcontext() as warned:
            fg.estimate_grad_(lambda m: F.cross_entropy(m(x), y), model, method, generator=seeded(step))
        assert not warned or len(warned) == 1


def test_a_loss_of_many_numbers_by_hand_is_scored_as_a_whole_and_says_so() -> None:
    model, x = perceptron().double(), rows(700, 4)
    with pytest.warns(UserWarning, match=r"scored by the whole loss, since it is one number of 2,100 outputs"):
        fg.estimate_grad_(lambda m: m(x).exp().mean(), model, fg.ForwardGradient(perturb=fg.Activity()), generator=seeded())


@pytest.mark.parametrize("perturb", [fg.Activity(), fg.PerExample()], ids=lambda p: p.name)
def test_later_steps_are_not_surveyed(perturb: fg.Perturbation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are batches of another size, a chunk of tangents, or the model under another name of the same loss."""
    model, passes = perceptron().double(), []
    real = Survey._pass
    monkeypatch.setattr(Survey, "_pass", lambda *args, **kwargs: passes.append(1) or real(*args, **kwargs))

    def step(x: Tensor, **options: int) -> None:
        fg.estimate_grad_(
            lambda m: F.cross_entropy(m(x), torch.arange(len(x)) % 3),
            model,
            fg.ForwardGradient(perturb=perturb, **options),
            generator=seeded(),
        )

    step(rows(6, 4))
    first = len(passes)
    assert 0 < first <= 2 * 3 + 8  # NaN in 2 log₂ 6 sets, and some others
    for x in (rows(6, 4), rows(5, 4), rows(13, 4)):
        step(x)
        step(x, tangents=4, chunk_size=2)
    assert len(passes) == first


def test_another_path_of_calls_is_surveyed_anew() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.meet = nn.Linear(4, 5), nn.Linear(5, 3), False

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).tanh()
            return self.b(h - h.mean(0) if self.meet else h)

    model, x, y, method = Either().double(), rows(6, 4), torch.arange(6) % 3, fg.ForwardGradient(perturb=fg.Activity())

    def step() -> None:
        fg.estimate_grad_(lambda m: F.cross_entropy(m(x), y), model, method, generator=seeded())

    step()
    model.meet = True
    with pytest.warns(UserWarning, match=r"examples meet behind a\.weight"):
        step()
    model.meet = False
    step()


# Rows of examples ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize(("shape", "dim"), [((6, 2), 0), ((2, 6), 1), ((3, 5), 0), ((2, 3, 4), 1)])
def test_what_is_gathered_of_each_example_can_be_scattered_again(shape: tuple[int, ...], dim: int, turns: bool) -> None:
    t, where, count = rows(*shape), Rows(dim, turns), 3
    each = where.gather(t, count)
    assert each.shape == (count, t.numel() // count)
    assert torch.equal(where.scatter(each, shape), t)
    owner = where.of(shape[dim], count)
    for example in range(count):
        mine = t.index_select(dim, (owner == example).nonzero().flatten())
        assert torch.equal(each[example].sort().values, mine.flatten().sort().values)
        weights = torch.zeros(1, count, dtype=t.dtype).index_fill_(1, torch.tensor([example]), 1.0)
        assert torch.equal(
            where.spread(weights, shape)[0] * t, torch.where((owner == example).view([-1 if d == dim else 1 for d in range(t.dim())]), t, 0)
        )


@pytest.mark.parametrize("count", [2, 3, 4, 5, 64, 100])
def test_codes_tell_every_ordered_pair_apart(count: int) -> None:
    sets = torch.stack(codes(count))
    assert math.comb(len(sets) - 1, (len(sets) - 1) // 2) < count  # with a set less there are not enough halves
    apart = (sets.unsqueeze(2) & ~sets.unsqueeze(1)).any(0)
    assert bool((apart | torch.eye(count, dtype=torch.bool)).all())


@pytest.mark.parametrize(("meets", "most"), [(False, 21), (True, 34)])
def test_examples_are_looked_for_in_few_passes(meets: bool, most: int) -> None:
    """Of 64 examples; as many more for every doubling as there are sets more."""
    norms = [nn.BatchNorm2d(2) if meets else nn.Identity() for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(1, 2, 3), norms[0], nn.ReLU(), nn.Conv2d(2, 2, 3), norms[1], nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    x, y, passes = torch.randn(64, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3, []
    model[0].register_forward_pre_hook(lambda *_: passes.append(1))
    estimator = fg.ForwardGradient(perturb=fg.Activity())
    fg.estimate_grad_(lambda model: F.cross_entropy(model(x), y), model, estimator, generator=torch.Generator().manual_seed(0))
    assert len(passes) <= most


@pytest.mark.parametrize("count", [2, 5, 16, 100])
@pytest.mark.parametrize("shift", [1, 2, 3, 7])
def test_every_shift_of_examples_leaves_a_half(count: int, shift: int) -> None:
    for chosen in halves(count):
        assert 0 < int(chosen.sum()) < count
        assert count <= shift or bool((chosen & ~chosen.roll(shift)).any())
