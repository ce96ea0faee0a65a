"""Every arm of the benchmark takes the step that its name says; the peers against backpropagation and the formula, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.diagnostics import peak_bytes
from forwardgrad.engines import compiled as compiled_engine
from forwardgrad.lab.bench import optimizers, process_peak
from forwardgrad.lab.bench.allocations import allocated_bytes
from forwardgrad.lab.bench.arms import ARMS, NAMED, ArmStep, BenchArm, chosen_arms
from forwardgrad.lab.bench.cases import BenchCase, BuiltCase, build_case, chosen_cases, layouts, loss
from forwardgrad.lab.bench.optimizers import OptimizerName
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


def built(model: str = "mlp-2x8", batch: int = 4, optimizer: OptimizerName = "sgd") -> BuiltCase:
    torch.manual_seed(0)
    return build_case(BenchCase(model, batch, "contiguous", optimizer), torch.device("cpu"))


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
    fg.estimate_grad_(lambda model: F.cross_entropy(model(case.inputs), case.labels), twin, fg.Backprop())
    for p, other in zip(case.model.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert other.grad is not None
        assert torch.equal(p.grad, other.grad)


@pytest.mark.full
@pytest.mark.parametrize("name", ["backprop", "low-rank", "local-feedback", "feedback", "fixed-feedback", "zeroth-order"])
def test_the_compiled_arm_takes_the_eager_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arms differ in their estimator alone: those whose steps other tests compile are run as graphs."""
    if name in ("backprop", "low-rank", "feedback"):
        monkeypatch.setattr(compiled_engine, "compiled", lambda traced, inputs: traced.graph)
    monkeypatch.setattr(optimizers, "LR", 0.1)
    compiled, eager, still = built(), built(), built()
    for arm, case in ((f"{name}-compiled", compiled), (name, eager)):
        step = ArmStep(NAMED[arm], case)
        for _ in range(2):
            step()
    # a difference has the rounding of two losses over 2ε, which moves a weight by a direction of at most about 5 in each step of 0.1
    rounding = 2 * 0.1 * 5 * 4 * torch.finfo(torch.float32).eps * math.log(10) / (2 * fg.ZerothOrder().epsilon)
    for p, other, before in zip(*(case.model.parameters() for case in (compiled, eager, still)), strict=True):
        assert torch.allclose(p, other, rtol=1e-4, atol=rounding if name == "zeroth-order" else 1e-6)
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


def test_arms_that_cost_the_compiler_much_are_timed_by_name_alone() -> None:
    usual = {arm.name for arm in chosen_arms(None)}
    assert {"local-feedback", "local-feedback-compiled", "feedback", "fixed-feedback", "zeroth-order"} <= usual
    for name in ("feedback", "fixed-feedback"):
        assert f"{name}-compiled" not in usual
        for engine, mark in (("compile", "compiled"), ("graph", "graph")):
            (arm,) = [arm for arm in chosen_arms(f"{name}-{mark}") if arm.name not in ("plain", "backprop")]
            assert (arm.engine, arm.estimator, arm.kind) == (engine, NAMED[name].estimator, NAMED[name].kind)
    assert "local-feedback-graph" in {arm.name for arm in chosen_arms(None, on_gpu=True)} - usual


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw"])
def test_every_arm_steps_as_the_optimizer_of_torch_does(name: OptimizerName, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of backpropagation, against the same steps of torch's optimizer in its usual form."""
    monkeypatch.setattr(optimizers, "LR", 0.1)
    case, twin = (built(optimizer=name) for _ in range(2))
    kinds = {"momentum": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    other = kinds[name](twin.model.parameters(), 0.1, **({"momentum": 0.9} if name == "momentum" else {}))
    for p in twin.model.parameters():
        p.grad = torch.zeros_like(p)
    other.step()  # the step along zeros that makes its memory
    step = ArmStep(NAMED["backprop"], case)
    for _ in range(2):
        step()
        other.zero_grad()
        F.cross_entropy(twin.model(twin.inputs), twin.labels).backward()
        other.step()
    for p, wanted in zip(case.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.allclose(p, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if (arm.engine == "eager" and arm.estimator) or arm.peer], ids=lambda arm: arm.name)
def test_an_arm_fills_the_memory_of_adam(arm: BenchArm) -> None:
    case = built(optimizer="adam")
    ArmStep(arm, case)()
    moments = [kept["exp_avg"] for kept in case.optimizer().state.values()]
    assert len(moments) == len(list(case.model.parameters()))
    assert any(moment.any() for moment in moments)


def test_two_passes_hand_their_gradient_to_any_other_optimizer() -> None:
    model, loss = problem()
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    twin = copy.deepcopy(model)
    torch.manual_seed(7)
    two_passes(model, loss, optimizer)()
    torch.manual_seed(7)
    two_passes(twin, loss, torch.optim.SGD(twin.parameters(), RATE))()
    for p, plain, old in zip(model.parameters(), twin.parameters(), before.parameters(), strict=True):
        assert torch.allclose(p, plain, rtol=1e-9, atol=1e-12)  # the first step of momentum is that of SGD
        assert not torch.equal(p, old)


def test_the_memory_of_an_optimizer_is_counted_by_itself() -> None:
    numbers = built().parameters
    held = {name: optimizers.state_bytes(built(optimizer=name).optimizer()) for name in ("sgd", "momentum", "adam", "adamw")}
    assert held == {"sgd": 0, "momentum": 4 * numbers, "adam": 8 * numbers + 16, "adamw": 8 * numbers + 16}  # and 4 counters of steps
    eager = {name: process_peak.tally(begun("backprop", name), built()) for name in ("sgd", "adam")}
    assert eager["sgd"] == eager["adam"]  # which is in no peak


def begun(arm: str, optimizer: OptimizerName) -> ArmStep:
    step = ArmStep(NAMED[arm], built(optimizer=optimizer))
    step.begin()
    return step


def test_optimizers_by_name() -> None:
    assert optimizers.chosen_optimizers("adam, sgd,adam") == ["adam", "sgd"]
    cases = chosen_cases("nn", "64,512", None, "contiguous", "sgd,adam")
    assert [(case.batch, case.optimizer) for case in cases] == [(64, "sgd"), (64, "adam"), (512, "sgd"), (512, "adam")]
    with pytest.raises(UserError, match="unknown optimizer 'lion': choose from sgd, momentum, adam, adamw"):
        optimizers.chosen_optimizers("sgd,lion")


def test_a_vgg_has_its_convolutions_norms_and_a_pool_after_every_quarter() -> None:
    found = built("vgg-8x4", 2)
    kinds = [type(layer).__name__ for layer in found.model.children()]
    quarter = ["Conv2d", "BatchNorm2d", "ReLU"] * 2 + ["MaxPool2d"]
    assert kinds == [*quarter * 4, "Flatten", "Linear"]
    assert found.inputs.shape == (2, 3, 32, 32)
    assert found.case.data == "cifar10"
    assert found.parameters == 9 * 3 * 4 + 7 * 9 * 4 * 4 + 8 * 2 * 4 + (4 * 2 * 2) * 10 + 10
    for name in ("vgg-6x4", "vgg-16", "vgg-0x4"):
        with pytest.raises(UserError, match=f"unknown model '{name}'.*a multiple of 4"):
            BenchCase(name, 2)


@pytest.mark.parametrize("work", ["backprop", "local-feedback"])
def test_the_allocator_gives_out_what_the_tensors_hold(work: str) -> None:
    """On products of matrices, whose kernels need no scratch but a few bytes for numbers."""
    step = begun(work, "sgd")
    step.forget_gradients()
    tensors = peak_bytes(step, [torch.device("cpu")])
    step.forget_gradients()
    generator = torch.get_rng_state().numel()  # a pass keeps it, and no operator returns it
    assert tensors <= allocated_bytes(step) <= tensors + generator + 100


def test_the_profilers_banner_is_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    assert allocated_bytes(lambda: torch.empty(100) + torch.empty(100)) == 1200
    assert capfd.readouterr() == ("", "")


def test_cases_of_a_sweep() -> None:
    assert chosen_cases(None, "64,8", None, "contiguous")[:2] == [BenchCase("nn", 64, "contiguous"), BenchCase("nn", 8, "contiguous")]
    chains = chosen_cases(None, "128", "convolutions", "fastest")
    assert [(case.model, case.batch) for case in chains] == [(f"vgg-{n}x32", 128) for n in (4, 8, 16, 32)]
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
        assert case.inputs.is_contiguous(memory_format=format)
        assert all(p.is_contiguous(memory_format=format) for p in case.model.parameters() if p.dim() == 4 and p.shape[1] > 1)
    assert [case.layout for case in layouts(BenchCase("cnn", 2), on)] == ["contiguous", "channels-last"]
    assert [case.layout for case in layouts(BenchCase("nn", 2), on)] == ["contiguous"]
    assert layouts(BenchCase("cnn", 2, "contiguous"), on) == [BenchCase("cnn", 2, "contiguous")]


def test_a_transformer_reads_tokens_of_the_length_that_was_asked_for() -> None:
    torch.manual_seed(0)
    cases = chosen_cases("gpt-1x64,bert-1x64,nn", "2", None, "contiguous", "sgd", 5)
    assert [case.sequence for case in cases] == [5, 5, None]
    assert chosen_cases("bert-1x64", "2", None, "contiguous")[0].sequence == 128
    gpt, bert = (build_case(case, torch.device("cpu")) for case in cases[:2])
    assert (gpt.inputs.shape, gpt.labels.shape, bert.labels.shape) == ((2, 5), (2, 5), (2,))
    assert int(bert.inputs.min()) > 0  # no padding
    scores = gpt.model(gpt.inputs)
    logs = torch.log_softmax(scores.double(), -1)
    mean = -torch.stack([logs[i, j, gpt.labels[i, j]] for i in range(2) for j in range(5)]).mean()
    assert torch.allclose(loss(gpt.model, gpt.inputs, gpt.labels).double(), mean, rtol=1e-5)
    with pytest.raises(UserError, match="--sequence is for transformers"):
        chosen_cases("nn", "2", None, "contiguous", "sgd", 5)
    with pytest.raises(UserError, match="bert-1x64 reads 1 to 512 tokens an example, not 600"):
        BenchCase("bert-1x64", 2, sequence=600)
    with pytest.raises(UserError, match="nn takes no tokens"):
        BenchCase("nn", 2, sequence=5)


@pytest.mark.parametrize("name", ["backprop", "low-rank", "activity", "zeroth-order"])
def test_arms_step_on_tokens(name: str) -> None:
    torch.manual_seed(0)
    found = build_case(BenchCase("bert-1x64", 3, "contiguous", sequence=6), torch.device("cpu"))
    step = ArmStep(NAMED[name], found)
    step.begin()
    before = [p.detach().clone() for p in found.model.parameters()]
    assert step().isfinite()
    assert any(not torch.equal(p, old) for p, old in zip(found.model.parameters(), before, strict=True))
