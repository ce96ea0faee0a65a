"""Every arm of the benchmark takes the step that its name says; the peers against backpropagation and the formula, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.lab.bench import arms as bench_arms
from forwardgrad.lab.bench.arms import ARMS, NAMED, ArmStep, BenchArm, chosen_arms
from forwardgrad.lab.bench.cases import BenchCase, BuiltCase, build_case, chosen_cases, layouts
from forwardgrad.lab.bench.peers import PEERS, PeerLoss, two_passes
from forwardgrad.lab.errors import UserError

RATE = 0.1


def problem() -> tuple[nn.Module, PeerLoss]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double()
    x, y = torch.randn(6, 1, 4, 4, dtype=torch.float64), torch.randint(4, (6,))
    return model, lambda call: F.cross_entropy(call(x), y)


def gradient(model: nn.Module, loss: PeerLoss) -> list[Tensor]:
    return list(torch.autograd.grad(loss(model), list(model.parameters())))


@pytest.mark.parametrize("name", ["func-jvp", "dual-numbers"])
def test_a_peer_moves_along_the_derivative_times_its_direction(name: str) -> None:
    model, loss = problem()
    before = copy.deepcopy(model)
    g = gradient(before, loss)
    step = PEERS[name](model, loss, torch.optim.SGD(model.parameters(), RATE))
    torch.manual_seed(7)
    value = step()
    torch.manual_seed(7)
    v = [torch.randn_like(p) for p in before.parameters()]
    d = sum((a * b).sum() for a, b in zip(g, v, strict=True))
    assert torch.allclose(value, loss(before))
    for p, old, direction in zip(model.parameters(), before.parameters(), v, strict=True):
        assert p.grad is not None
        assert torch.allclose(p.grad, d * direction, rtol=1e-10)
        assert torch.allclose(p, old - RATE * d * direction, rtol=1e-10)
        assert not p.grad.requires_grad


def test_the_two_passes_follow_the_formula_and_walk_back() -> None:
    model, loss = problem()
    before, epsilon = copy.deepcopy(model), 1e-4
    step = two_passes(model, loss, torch.optim.SGD(model.parameters(), RATE), epsilon)
    torch.manual_seed(7)
    value = step()
    torch.manual_seed(7)
    torch.manual_seed(int(torch.randint(2**31 - 1, ())))
    z = [torch.randn_like(p) for p in before.parameters()]

    def at(length: float) -> Tensor:
        twin = copy.deepcopy(before)
        with torch.no_grad():
            for p, direction in zip(twin.parameters(), z, strict=True):
                p.add_(length * direction)
            return loss(twin)

    slope = (at(epsilon) - at(-epsilon)) / (2 * epsilon)
    derivative = sum((a * b).sum() for a, b in zip(gradient(before, loss), z, strict=True))
    assert torch.allclose(slope, torch.as_tensor(derivative), rtol=1e-5)
    assert torch.allclose(value, (at(epsilon) + at(-epsilon)) / 2)
    for p, old, direction in zip(model.parameters(), before.parameters(), z, strict=True):
        assert torch.allclose(p, old - RATE * slope * direction, rtol=1e-8, atol=1e-10)


def built(model: str = "mlp-2x8", batch: int = 4) -> BuiltCase:
    torch.manual_seed(0)
    return build_case(BenchCase(model, batch, "contiguous"), torch.device("cpu"))


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.engine == "eager"], ids=lambda arm: arm.name)
def test_an_arm_takes_a_whole_step(arm: BenchArm) -> None:
    """All but the plain forward pass move the parameters; all see the same loss, zeroth order the mean of two points near by."""
    case = built()
    plain = ArmStep(NAMED["plain"], case)()
    before = [p.clone() for p in case.model.parameters()]
    loss = ArmStep(arm, case)()
    assert torch.allclose(loss, plain, atol=1e-3)
    moved = any(not torch.equal(p, b) for p, b in zip(case.model.parameters(), before, strict=True))
    assert moved == (arm.name != "plain")
    assert not loss.requires_grad


def test_an_arm_of_the_library_moves_as_its_estimator_says() -> None:
    case = built()
    twin = copy.deepcopy(case.model)
    ArmStep(NAMED["backprop"], case)()
    fg.estimate_grad_(lambda model: F.cross_entropy(model(case.images), case.labels), twin, fg.Backprop())
    for p, other in zip(case.model.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert other.grad is not None
        assert torch.equal(p.grad, other.grad)


@pytest.mark.full
@pytest.mark.parametrize("name", ["backprop", "low-rank"])
def test_the_compiled_arm_takes_the_eager_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_arms, "LR", 0.1)
    compiled, eager, still = built(), built(), built()
    for arm, case in ((f"{name}-compiled", compiled), (name, eager)):
        step = ArmStep(NAMED[arm], case)
        for _ in range(2):
            step()
    for p, other, before in zip(*(case.model.parameters() for case in (compiled, eager, still)), strict=True):
        assert torch.allclose(p, other, rtol=1e-4, atol=1e-6)
        assert not torch.equal(p, before)


def test_arms_by_name_and_by_estimator() -> None:
    chosen = chosen_arms("low-rank, forward(tangents=2, perturb=low-rank(rank=2)); local-feedback")
    assert [arm.name for arm in chosen[:3]] == ["plain", "backprop", "low-rank"]
    assert chosen[3].estimator == fg.ForwardGradient(tangents=2, perturb=fg.LowRank(2))
    assert chosen[4].estimator == fg.LocalLosses(feedback=True, head="pooled", cells=4)
    assert chosen_arms("backprop,plain") == chosen_arms("plain") == [NAMED["plain"], NAMED["backprop"]]
    assert [arm.name for arm in chosen_arms(None)] == [arm.name for arm in ARMS]


def test_a_law_is_that_of_the_arms_that_move_less() -> None:
    for law in (fg.Gaussian(), fg.Rademacher()):
        told = {arm.name: getattr(arm.estimator, "law", None) for arm in chosen_arms(None, law.name)}
        assert all(told[name] == law for name in ("low-rank", "low-rank-k16", "per-example", "activity"))
        assert told["forward"] == told["zeroth-order"] == fg.Gaussian()
    usual = {arm.name: getattr(arm.estimator, "law", None) for arm in chosen_arms(None)}
    assert (usual["low-rank"], usual["per-example"], usual["activity"]) == (fg.Gaussian(), fg.Rademacher(), fg.Rademacher())


def test_a_spec_leaves_out_what_is_usual() -> None:
    assert NAMED["forward"].estimator_text == "forward"
    assert NAMED["per-example"].estimator_text == "forward(law=rademacher, perturb=per-example)"
    assert NAMED["mezo"].estimator_text is None


def test_cases_of_a_sweep() -> None:
    assert chosen_cases(None, "64,8", None, "contiguous")[:2] == [BenchCase("nn", 64, "contiguous"), BenchCase("nn", 8, "contiguous")]
    depths = chosen_cases(None, "256", "depth", "fastest")
    assert [case.model for case in depths] == [f"mlp-{n}x1024" for n in (2, 4, 8, 16, 32, 64)]
    assert {case.batch for case in depths} == {256}
    assert [case.batch for case in chosen_cases("cnn", "64", "batch", "fastest")] == [1, 4, 16, 64, 256, 1024, 4096]
    with pytest.raises(UserError, match="unknown model 'mlp-2'"):
        chosen_cases("mlp-2", "64", None, "fastest")


def test_an_mlp_has_its_depth_width_and_a_signal_at_every_depth() -> None:
    deep = built("mlp-64x32")
    weights = [p for p in deep.model.parameters() if p.dim() == 2]
    assert [tuple(w.shape) for w in weights] == [(32, 784), *[(32, 32)] * 62, (10, 32)]
    ArmStep(NAMED["backprop"], deep)()
    norms = [float(w.grad.norm()) for w in weights if w.grad is not None]
    assert len(norms) == 64
    assert min(norms) > 1e-6 * max(norms)


def test_an_order_in_memory_is_that_of_images_and_convolutions() -> None:
    on = torch.device("cpu")
    for layout, format in (("contiguous", torch.contiguous_format), ("channels-last", torch.channels_last)):
        case = build_case(BenchCase("cifar-cnn", 2, layout), torch.device("meta"))  # type: ignore[arg-type]
        assert case.images.is_contiguous(memory_format=format)
        assert all(p.is_contiguous(memory_format=format) for p in case.model.parameters() if p.dim() == 4 and p.shape[1] > 1)
    assert [case.layout for case in layouts(BenchCase("cnn", 2), on)] == ["contiguous", "channels-last"]
    assert [case.layout for case in layouts(BenchCase("nn", 2), on)] == ["contiguous"]
    assert layouts(BenchCase("cnn", 2, "contiguous"), on) == [BenchCase("cnn", 2, "contiguous")]
