"""fg.quality against definitions computed with every estimate at hand, formulas, scipy and a count of bytes by hand.

Statistics have fixed seeds; where a measured mean is compared with a formula, the test would fail by chance in 1 of 150,000 (|z| < 4.5).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import scipy.stats
import torch
from tests.support.cases import CASES, EXACT, Case, classify, perceptron, rows, seeded, trained, true_gradient
from torch import Generator, Tensor

import forwardgrad as fg
from forwardgrad.diagnostics.memory import peak_bytes
from forwardgrad.diagnostics.moments import DIRECTIONS, Interval, Moments, Part, standard, student
from forwardgrad.objective import Objective

CPU = [torch.device("cpu")]


def moments(g: Tensor, estimates: Tensor) -> Part:
    found = Moments(["one"], [g])
    for first, second in zip(estimates[::2], estimates[1::2], strict=True):
        found.add([first], [second])
    total, one = found.parts()
    assert dataclasses.replace(one, name="all") == total
    return total


def close(interval: Interval | None, value: float, z: float = 4.5) -> bool:
    """Whether a value lies within z standard errors, a 95 % interval having some two on each side."""
    assert interval is not None
    return abs(interval.value - value) <= z * (interval.high - interval.low) / (2 * 1.96)


# The statistics ----------------------------------------------------------------------------------------------------------------------


def test_streamed_moments_are_the_definitions() -> None:
    count, n = 30, 37
    g = rows(n)
    x = g + 0.3 + 2 * rows(count, n)
    found, mean = moments(g, x), x.mean(dim=0)
    gram = (x - g) @ (x - g).t()
    between_different = (gram.sum() - gram.trace()) / (count * (count - 1))
    lengths, cosines = x @ g / g.square().sum(), torch.cosine_similarity(x, g[None])
    assert found.bias is not None
    assert found.variance is not None
    assert found.bias.value == pytest.approx(float(between_different / g.square().sum()), rel=1e-10)
    assert found.variance.value == pytest.approx(float(x.var(dim=0).sum() / g.square().sum()), rel=1e-10)
    assert found.norm == pytest.approx(float(g.norm()))
    assert found.cosine_of_mean == pytest.approx(float(torch.cosine_similarity(mean, g, dim=0)))
    for interval, values in ((found.length, lengths), (found.cosine, cosines)):
        low, high = scipy.stats.t.interval(0.95, count - 1, values.mean(), values.std() / math.sqrt(count))
        assert dataclasses.astuple(interval) == pytest.approx((float(values.mean()), low, high), rel=1e-3)
    pairs = (x[1::2] - x[::2]).square().sum(dim=1) / 2 / g.square().sum()
    low, high = scipy.stats.t.interval(0.95, count // 2 - 1, 0.0, pairs.std() / math.sqrt(count // 2))
    assert (found.variance.low, found.variance.high) == pytest.approx((found.variance.value + low, found.variance.value + high), rel=1e-3)


def test_the_interval_of_the_bias_has_the_width_of_theory() -> None:
    """Unit noise in n directions, no bias: U has the variance 2n/(R(R − 1)), far below what single pairs would give."""
    count, n = 400, 300
    g = torch.ones(n, dtype=torch.float64) / math.sqrt(n)
    found = moments(g, g + rows(count, n)).bias
    assert found is not None
    width = (found.high - found.low) / (2 * 1.966 * math.sqrt(2 * n / (count * (count - 1))))
    assert 0.9 < width < 1.6  # wider, not narrower: what m's noise adds is taken off only as far as it is seen
    assert close(found, 0.0)


@pytest.mark.parametrize(("shift", "least"), [(0.0, 0.90), (1.0, 0.84), (2.0, 0.84)])
def test_intervals_cover_and_the_test_keeps_its_level(shift: float, least: float) -> None:
    """200 cases of 40 estimates: 95 % (with a bias 90 %) coverage falls as low, or 5 % false alarms rise as high, in less than 1 of 100."""
    generator, n, cases = seeded(1), 20, 200
    g = torch.ones(n, dtype=torch.float64) / math.sqrt(n)
    bias = torch.zeros(n, dtype=torch.float64)
    bias[3] = shift
    covered = dict.fromkeys(("bias", "length", "variance"), 0)
    alarms = 0
    for _ in range(cases):
        found = moments(g, g + bias + torch.randn(40, n, dtype=torch.float64, generator=generator))
        for name, truth in (("bias", shift**2), ("length", 1 + float(bias @ g)), ("variance", n)):
            interval = getattr(found, name)
            covered[name] += interval.low <= truth <= interval.high
        alarms += found.p < 0.05
    assert min(covered.values()) / cases >= least
    assert alarms / cases <= 0.11 if shift == 0 else alarms / cases > 0.5


@pytest.mark.full
def test_the_test_keeps_its_level_where_estimates_are_skewed() -> None:
    """One Gaussian tangent, 20 estimates, 1,500 cases. Some 0.3 % are expected below 0.001 (Student's t alone: 1 %) and 4 % below 0.05;
    the bounds are reached by chance in 1 of 200 and less than 1 of 10,000."""
    generator = seeded(5)
    g = torch.zeros(17, dtype=torch.float64)
    g[0] = 1
    found = []
    for _ in range(1500):
        v = torch.randn(20, 17, dtype=torch.float64, generator=generator)
        found.append(moments(g, v[:, :1] * v).p)
    assert sum(p < 0.001 for p in found) < 12
    assert sum(p < 0.05 for p in found) < 105


def test_a_standard_normal_as_far_out_as_students_t() -> None:
    for freedom in (9, 19, 199):
        assert student(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=1e-3)
        for t in (0.5, 1.0, 2.0, 3.0, 5.0):
            assert standard(t, freedom) == pytest.approx(scipy.stats.norm.isf(scipy.stats.t.sf(t, freedom)), abs=0.01)


def test_a_bias_that_never_varies_is_found_and_rounding_is_none() -> None:
    g = rows(50).float()
    wrong, rounded = moments(g, (1.01 * g).expand(10, -1)), moments(g, (g * (1 + 2e-7)).expand(10, -1))
    assert wrong.p < 1e-6
    assert wrong.bias is not None
    assert wrong.bias.value == pytest.approx(1e-4, rel=1e-3)
    assert rounded.p == 1.0


def test_a_direction_sees_every_weight() -> None:
    """A bias in any single weight of a tensor is found, however small the tensor; 3 is less than the number of directions."""
    for n in (1, 3, DIRECTIONS + 5):
        g = torch.zeros(n, dtype=torch.float64)
        g[0] = 1
        for weight in range(n):
            x = g.repeat(10, 1)
            x[:, weight] += 0.1
            assert moments(g, x).p < 1e-6


# Estimators --------------------------------------------------------------------------------------------------------------------------


def measured(case: Case, method: fg.Estimator, **options: Any) -> fg.Quality:
    model, loss = case.build()
    torch.manual_seed(7)
    return fg.quality(loss, model, method, generator=seeded(3), **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backpropagation_has_no_bias_and_no_variance(case: Case) -> None:
    """With dropout too: all repeats see the same masks."""
    found = measured(case, fg.Backprop(), repeats=10)
    assert found.total.variance == found.total.bias == Interval(0.0, 0.0, 0.0)
    assert found.total.p == 1.0
    assert found.total.cosine_of_mean == pytest.approx(1.0, abs=1e-12)
    assert found.total.cosine is not None
    assert found.total.cosine.value == pytest.approx(1.0, abs=1e-12)
    assert (found.theory, found.forward_passes) == (0.0, 1)
    exact = true_gradient(*case.build())
    assert [part.name for part in found.tensors] == list(exact)
    assert [part.norm for part in found.tensors] == pytest.approx([float(g.double().norm()) for g in exact.values()], rel=1e-6, abs=1e-12)
    assert [part.weights for part in found.tensors] == [g.numel() for g in exact.values()]


@pytest.mark.some(3)
@pytest.mark.parametrize("law", [fg.Gaussian(), fg.Rademacher(), fg.Sphere(), fg.Orthogonal()], ids=lambda law: law.name)
@pytest.mark.parametrize("tangents", [1, 4])
def test_the_variance_is_that_of_theory(law: fg.Law, tangents: int) -> None:
    found = measured(CASES[0], fg.ForwardGradient(tangents, law), repeats=400)
    n = sum(p.numel() for p in trained(CASES[0].build()[0]).values())
    single = n + 1 if law.name == "gaussian" else n - 1
    assert found.theory == pytest.approx(n / tangents - 1 if law.name == "orthogonal" else single / tangents)
    assert close(found.total.variance, found.theory)
    assert close(found.total.length, 1.0)
    assert close(found.total.bias, 0.0)
    assert found.total.z < 4.5
    assert found.forward_passes == tangents + 1


def test_a_clip_shortens_the_gradient_by_what_theory_says() -> None:
    model, loss = CASES[0].build()
    norm = math.sqrt(sum(float(g.square().sum()) for g in true_gradient(model, loss).values()))
    clip = 0.5 * norm
    factor = math.erf(clip / (norm * math.sqrt(2)))
    found = fg.quality(loss, model, fg.ForwardGradient(tangents=4, clip=clip), generator=seeded(), repeats=1000)
    assert close(found.total.length, factor)
    assert close(found.total.bias, (1 - factor) ** 2)
    assert found.total.p < 1e-6
    assert found.theory is None
    for part in found.tensors:  # the direction stays right, so every tensor is shortened alike
        assert close(part.length, factor)


@dataclass(frozen=True)
class OneTensor(fg.Estimator):
    """Half of the exact gradient of the first parameter, and nothing known of the others."""

    name = "one tensor"

    @property
    def unbiased(self) -> bool:
        return False

    def estimate(self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]) -> Any:
        record, exact = fg.Backprop().estimate(objective, None, {})
        return record, {name: exact[name] / 2 if i == 0 else None for i, name in enumerate(exact)}


def test_none_counts_as_zero() -> None:
    found = measured(CASES[0], OneTensor(), repeats=10)
    first, *others = found.tensors
    assert first.bias is not None
    assert (first.bias.value, first.cosine_of_mean) == pytest.approx((0.25, 1.0))
    for part in others:
        assert part.bias == Interval(1.0, 1.0, 1.0)
        assert part.length == part.cosine == part.variance == Interval(0.0, 0.0, 0.0)
        assert part.cosine_of_mean == 0.0
        assert part.p < 1e-6
    lost = sum(part.norm**2 for part in others) + first.norm**2 / 4
    assert found.total.bias is not None
    assert found.total.bias.value == pytest.approx(lost / found.total.norm**2)


@dataclass(frozen=True)
class Learner(fg.Estimator):
    """Gives steps/10 of the exact gradient, where `steps` is how often it has been asked."""

    name = "learner"

    @property
    def unbiased(self) -> bool:
        return False

    @property
    def stateful(self) -> bool:
        return True

    def estimate(self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]) -> Any:
        state.setdefault("steps", torch.zeros(())).add_(1)
        record, exact = fg.Backprop().estimate(objective, None, {})
        return record, {name: None if g is None else g * state["steps"] / 10 for name, g in exact.items()}


def test_the_memory_of_an_estimator_is_copied_and_held_still() -> None:
    def length(state: Mapping[str, Tensor] | None, warm_up: int) -> float:
        found = measured(CASES[0], Learner(), repeats=10, state=state, warm_up=warm_up).total
        assert found.length is not None
        assert found.variance is not None
        assert found.variance.value == pytest.approx(0, abs=1e-12)
        return found.length.value

    state = {"steps": torch.tensor(3.0)}
    assert length(state, 0) == pytest.approx(0.4)
    assert length(state, 5) == pytest.approx(0.9)
    assert length(None, 9) == pytest.approx(1.0)
    assert length({}, 0) == pytest.approx(0.1)
    assert torch.equal(state["steps"], torch.tensor(3.0))
    with pytest.raises(ValueError, match="Learner learns from step to step: pass the state it has, or let it learn with warm_up=100"):
        measured(CASES[0], Learner())


# What is left as it was --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [fg.Backprop(), fg.ForwardGradient(2)], ids=lambda method: method.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_of_the_model_changes(method: fg.Estimator, case: Case) -> None:
    model, loss = case.build()
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 3.0) if i % 2 else None
    gradients = [p.grad for p in model.parameters()]
    before, twin = {**dict(model.named_parameters()), **dict(model.named_buffers())}, copy.deepcopy(model)
    modes = [module.training for module in model.modules()]
    torch.manual_seed(7)
    start = torch.get_rng_state()
    fg.quality(loss, model, method, generator=seeded(), repeats=10)
    assert torch.equal(torch.get_rng_state(), start)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[name] is tensor for name, tensor in before.items())
    assert [module.training for module in model.modules()] == modes
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert p.grad is gradient
        assert gradient is None or torch.equal(gradient, torch.full_like(p, 3.0))
    for (name, tensor), other in zip(after.items(), [*twin.parameters(), *twin.buffers()], strict=True):
        assert torch.equal(tensor, other), name


def test_a_buffer_that_the_model_replaces_or_that_belongs_to_the_loss_is_put_back() -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, model: torch.nn.Module) -> Tensor:
            self.seen = self.seen + 1
            return classify(rows(6, 4))(model) * self.seen

    loss = Counting()
    seen = loss.seen
    found = fg.quality(loss, perceptron().double(), fg.Backprop(), repeats=10)
    assert loss.seen is seen
    assert float(seen) == 0.0
    assert found.total.bias == Interval(0.0, 0.0, 0.0)  # a loss that grew from call to call would be biased


def test_the_same_seed_gives_the_same_findings_and_the_exact_gradient_may_be_given() -> None:
    model, loss = CASES[0].build()
    method = fg.ForwardGradient(tangents=2)
    first = measured(CASES[0], method, repeats=10)
    given = measured(CASES[0], method, repeats=10, exact=true_gradient(model, loss))
    other = fg.quality(loss, model, method, generator=seeded(4), repeats=10)
    assert (first.total, first.tensors) == (given.total, given.tensors)
    assert first.total != other.total


def test_an_exact_estimator_of_random_directions_is_exact() -> None:
    n = sum(p.numel() for p in trained(CASES[0].build()[0]).values())
    found = measured(CASES[0], fg.ForwardGradient(tangents=n, law=fg.Orthogonal()), repeats=10).total
    assert found.p == 1.0
    assert found.variance is not None
    assert found.variance.value < 1e-20


# Cost and form -----------------------------------------------------------------------------------------------------------------------


def test_bytes_are_those_counted_by_hand() -> None:
    x = torch.ones(1000, requires_grad=True)  # 4,000 bytes, there before
    with torch.no_grad():
        assert peak_bytes(lambda: x.exp().exp().sum(), CPU) == 8000  # a result and its argument
        assert peak_bytes(lambda: x.mul_(1).view(10, 100).t(), CPU) == 0  # in place, and views
    # both results are kept, then the gradient of one is added; the loss and its gradient are 4 bytes each
    assert peak_bytes(lambda: x.exp().exp().sum().backward(), CPU) == 12_008
    kept = [torch.ones(10)]
    assert peak_bytes(lambda: kept.append(torch.ones(5)), CPU) == 20
    assert peak_bytes(lambda: (torch.ones(5, device="meta"), torch._efficientzerotensor((5,))), CPU) == 0  # neither has memory


def test_bytes_grow_with_the_tangents_and_not_with_the_repeats() -> None:
    one, many = (measured(CASES[0], fg.ForwardGradient(k), repeats=10).peak_bytes for k in (1, 16))
    weights = 8 * sum(p.numel() for p in trained(CASES[0].build()[0]).values())
    assert one >= weights
    assert many >= 16 * weights
    assert measured(CASES[0], fg.ForwardGradient(), repeats=20).peak_bytes == one


def test_findings_are_plain_values_and_a_table() -> None:
    found = measured(EXACT[0], fg.ForwardGradient(), repeats=10)
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert stored["total"]["bias"]["value"] == found.total.bias.value if found.total.bias else False
    lines = found.table().splitlines()
    assert lines[0].startswith("ForwardGradient(tangents=1,")
    assert "(theory 44)" in lines[0]  # 43 weights
    assert [line.split()[0] for line in lines[2:-1]] == ["all", *trained(EXACT[0].build()[0])]
    assert "2 forward passes" in lines[-1]
    assert found.seconds > 0


def test_a_tensor_without_gradient_has_nothing_relative() -> None:
    used, unused = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = fg.quality(lambda a, b: a.square().sum() + 0 * b.sum(), [used, unused], fg.ForwardGradient(), generator=seeded(), repeats=10)
    first, second = found.tensors
    assert (first.name, second.name) == ("tensor 0", "tensor 1")
    assert first.bias is not None
    assert second.bias is second.length is second.variance is second.cosine is second.cosine_of_mean is None
    assert second.norm == 0
    assert "–" in found.table()


MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"repeats": 8}, ValueError, "repeats must be an even number of at least 10, not 8"),
    ({"repeats": 11}, ValueError, "repeats must be an even number of at least 10, not 11"),
    ({"repeats": 20.0}, ValueError, "repeats must be a whole number"),
    ({"warm_up": -1}, ValueError, "warm_up must be a whole number"),
    ({"estimator": "forward"}, TypeError, "the estimator must be an object such as ForwardGradient"),
    ({"estimator": fg.ForwardGradient(), "generator": None}, ValueError, "explicit generator"),
    ({"exact": {"0.weight": torch.ones(2)}}, ValueError, r"the exact gradient of 0\.weight has shape \(2,\), not that of the parameter"),
    ({"exact": {}}, ValueError, "the exact gradient is zero"),
    ({"loss": lambda model: classify(rows(6, 4))(model) * 0}, ValueError, "the exact gradient is zero"),
    ({"loss": lambda model: classify(rows(6, 4))(model) * math.inf}, ValueError, "the exact gradient is not finite"),
    ({"loss": lambda model: model(rows(6, 4))}, ValueError, "must have one element"),
]


@pytest.mark.parametrize(("wrong", "kind", "words"), MISTAKES, ids=[words for _, _, words in MISTAKES])
def test_a_mistake_is_one_sentence(wrong: dict[str, Any], kind: type[Exception], words: str) -> None:
    model, loss = CASES[0].build()
    arguments = {"loss": loss, "at": model, "estimator": fg.Backprop(), "generator": seeded(), "repeats": 10} | wrong
    with pytest.raises(kind, match=words) as told:
        fg.quality(**arguments)
    assert "\n" not in str(told.value)


def test_an_estimate_that_is_not_finite_is_said() -> None:
    with pytest.raises(RuntimeError, match="an estimate is not finite"):
        moments(torch.ones(3), torch.full((10, 3), math.inf))
