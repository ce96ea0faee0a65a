"""Momentum and Adam made again from seeds and numbers, against torch's own optimizers given the same whole estimates."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.support.cases import classify, layer_norm_classes, padded, regress, rows, seeded, tied, trained
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.diagnostics import peak_bytes
from forwardgrad.objective import Objective

X = rows(6, 4)
METHODS = [
    fg.ZerothOrder(1e-4),
    fg.ZerothOrder(1e-4, tangents=3, law=fg.Rademacher()),
    fg.ZerothOrder(1e-4, tangents=3, law=fg.Rademacher(), perturb=fg.LowRank(2), chunk_size=2),
    fg.ForwardGradient(perturb=fg.LowRank()),
    fg.ForwardGradient(3, chunk_size=2, clip=1.0, perturb=fg.LowRank(2)),
    fg.ForwardGradient(4, perturb=fg.SplitWeights(2, fg.LowRank())),
    fg.ForwardGradient(3, law=fg.Sphere(), perturb=fg.SplitWeights(1, fg.Dense())),
    fg.ForwardGradient(2, combine="projection", perturb=fg.LowRank()),
]
MODELS: list[Callable[[], tuple[nn.Module, Any]]] = [layer_norm_classes, tied, padded]
Make = Callable[[Any], torch.optim.Optimizer]
STEPS = 6
PAIRS: dict[str, tuple[Make, Callable[[Any, int], torch.optim.Optimizer]]] = {
    "momentum": (
        lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.8),
        lambda params, window: fg.ReplayedSGD(params, lr=0.02, momentum=0.8, window=window),
    ),
    "plain": (
        lambda params: torch.optim.SGD(params, lr=0.02),
        lambda params, window: fg.ReplayedSGD(params, lr=0.02, momentum=0.0, window=window),
    ),
    "adam": (
        lambda params: torch.optim.Adam(params, lr=0.02, betas=(0.8, 0.9)),
        lambda params, window: fg.ReplayedAdam(params, lr=0.02, betas=(0.8, 0.9), window=window),
    ),
    "adamw": (
        lambda params: torch.optim.AdamW(params, lr=0.02, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.3),
        lambda params, window: fg.ReplayedAdam(params, lr=0.02, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.3, window=window),
    ),
}


def model_and_loss(make: Callable[[], tuple[nn.Module, Any]]) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    model, loss = make()
    return model.double(), loss


def both(make: Callable[[], tuple[nn.Module, Any]], method: fg.Estimator, pair: str, window: int, steps: int) -> list[dict[str, Tensor]]:
    """The parameters after some steps: by torch's optimizer from whole estimates in .grad, and replayed; with a schedule of rates."""
    ends = []
    for replayed in (False, True):
        model, loss = model_and_loss(make)
        optimizer = PAIRS[pair][1](model.parameters(), window) if replayed else PAIRS[pair][0](model.parameters())
        scheduler, generator = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), seeded(3)
        step = fg.TrainingStep(lambda m, loss=loss: loss(m), model, optimizer, method, generator=generator)
        for _ in range(steps):
            if replayed:
                step()
                assert all(p.grad is None for p in model.parameters())
            else:
                optimizer.zero_grad()
                fg.estimate_grad_(loss, model, method, generator=generator)
                optimizer.step()
            scheduler.step()
        ends.append({name: p.detach() for name, p in trained(model).items()})
    return ends


@pytest.mark.product(each=3)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_window_of_all_steps_is_torchs_own_optimizer(make: Callable[[], tuple[nn.Module, Any]], method: fg.Estimator, pair: str) -> None:
    own, replayed = both(make, method, pair, STEPS, STEPS)
    rough = 1e-6 if pair.startswith("adam") else 1e-9  # Adam divides by roots of squares that may be tiny
    torch.testing.assert_close(replayed, own, rtol=rough, atol=1e-9)
    start = trained(model_and_loss(make)[0])
    assert any(not torch.equal(own[name], start[name]) for name in own)


@pytest.mark.parametrize("method", [fg.ZerothOrder(1e-4), fg.ForwardGradient(perturb=fg.LowRank())], ids=repr)
def test_what_a_window_leaves_out_of_the_velocity_is_its_tail(method: fg.Estimator) -> None:
    """The first step that differs, W + 1 = 4, lacks lr · μᵂ times torch's velocity of the first step, and nothing else."""
    (three, _), (own, replayed) = (both(layer_norm_classes, method, "momentum", 3, steps) for steps in (3, 4))
    model, loss = model_and_loss(layer_norm_classes)
    fg.estimate_grad_(loss, model, method, generator=seeded(3))
    tail = {name: p.grad for name, p in trained(model).items()}
    for name, p in own.items():
        rate = 0.02 * 0.9**3
        torch.testing.assert_close(replayed[name] - p, rate * 0.8**3 * tail[name], rtol=1e-6, atol=1e-12)
    assert any(not torch.equal(three[name], own[name]) for name in own)


def test_moments_over_a_window_are_means_over_its_steps() -> None:
    """Adam's numbers with W = 3 at step 5, written out from the estimates of steps 3 to 5."""
    model, loss = model_and_loss(layer_norm_classes)
    method, generator = fg.ForwardGradient(perturb=fg.LowRank()), seeded(4)
    optimizer = fg.ReplayedAdam(model.parameters(), lr=0.01, betas=(0.7, 0.9), window=3)
    step, estimates = fg.TrainingStep(lambda m: loss(m), model, optimizer, method, generator=generator), []
    for _ in range(5):
        other = copy.deepcopy(model)
        fg.estimate_grad_(loss, other, method, generator=torch.Generator().set_state(generator.get_state()))
        estimates.append({name: p.grad for name, p in trained(other).items()})
        before = {name: p.detach().clone() for name, p in trained(model).items()}
        step()
    for name, p in trained(model).items():
        g = torch.stack([each[name] for each in estimates[-3:]])
        weigh = [torch.tensor([beta**2, beta, 1], dtype=torch.float64).view(3, *[1] * p.dim()) for beta in (0.7, 0.9)]
        mean, square = (weigh[0] * g).sum(0) / weigh[0].sum(), (weigh[1] * g.square()).sum(0) / weigh[1].sum()
        torch.testing.assert_close(p.detach(), before[name] - 0.01 * mean / (square.sqrt() + 1e-8), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_recipe_gives_the_bits_of_the_estimate(method: fg.Estimator) -> None:
    model, loss = model_and_loss(tied)
    with torch.no_grad():
        objective = Objective(loss, model)
        record, gradients = method.estimate(objective, seeded(2), {})
        other, recipe = method.recipe(objective, seeded(2), {})
    torch.testing.assert_close(other.derivatives, record.derivatives, rtol=0, atol=0)
    assert recipe.names == {name for name, gradient in gradients.items() if gradient is not None}
    for name in recipe.names:
        parts = [part if isinstance(part, Tensor) else part.dense() for part in recipe.gradients(name, objective.parameters[name])]
        torch.testing.assert_close(sum(parts), gradients[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("pair", ["momentum", "adam"])
@pytest.mark.parametrize("method", [METHODS[1], METHODS[3], METHODS[4]], ids=repr)
def test_resumes_to_the_same_bits_from_a_checkpoint_read_without_pickle(method: fg.Estimator, pair: str) -> None:
    def made() -> tuple[nn.Module, fg.TrainingStep]:
        model, loss = model_and_loss(layer_norm_classes)
        optimizer = PAIRS[pair][1](model.parameters(), 3)
        return model, fg.TrainingStep(lambda m: loss(m), model, optimizer, method, generator=seeded(5))

    model, step = made()
    for _ in range(4):
        step()
    file = io.BytesIO()
    assert step.generator is not None
    torch.save({"model": model.state_dict(), "optimizer": step.optimizer.state_dict(), "generator": step.generator.get_state()}, file)
    file.seek(0)
    other, again = made()
    read = torch.load(file, weights_only=True)
    other.load_state_dict(read["model"])
    again.optimizer.load_state_dict(read["optimizer"])
    assert again.generator is not None
    again.generator.set_state(read["generator"])
    for _ in range(3):
        step()
        again()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_memory_is_a_few_tensors_of_the_largest_parameter() -> None:
    """Eight layers of 64 × 64: 33 KB a layer in float64, 266 KB the model; the state of torch's optimizer is one or two models."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(8)]).double()
    x, layer, peaks = rows(2, 64), 64 * 64 * 8, {}
    for name, method in (("zeroth", fg.ZerothOrder(1e-4)), ("low rank", fg.ForwardGradient(perturb=fg.LowRank()))):
        for kind in (fg.ReplayedSGD, fg.ReplayedAdam):
            optimizer = kind(model.parameters(), lr=1e-4, window=4)
            step = fg.TrainingStep(lambda m: m(x).square().mean(), model, optimizer, method, generator=seeded())
            for _ in range(5):  # the window is full, and the model's path known
                step()
            peaks[name, kind] = peak_bytes(step, [torch.device("cpu")])
    assert all(peak < 5 * layer for peak in peaks.values())
    assert peaks["low rank", fg.ReplayedSGD] < 1.5 * layer  # thin matrices are added up, and none of them is made whole
    sgd = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    step = fg.TrainingStep(lambda m: m(x).square().mean(), model, sgd, fg.ZerothOrder(1e-4), generator=seeded())
    assert peak_bytes(step, [torch.device("cpu")]) > 15 * layer  # a gradient and a velocity of eight layers


def test_checkpoints_are_tiny() -> None:
    model = nn.Linear(300, 300)
    optimizer = fg.ReplayedSGD(model.parameters(), lr=1e-4, window=10)
    x = rows(2, 300, dtype=torch.float32)
    step = fg.TrainingStep(lambda m: m(x).square().mean(), model, optimizer, fg.ForwardGradient(perturb=fg.LowRank()), generator=seeded())
    for _ in range(12):
        step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert len(optimizer.history) == 10
    assert file.tell() < 20_000 < 300 * 300 * 4 / 10


@pytest.mark.parametrize("method", [fg.ZerothOrder(0.1), fg.ForwardGradient(perturb=fg.LowRank())], ids=lambda method: method.name)
def test_half_precision_parameters_move_by_a_sum_that_is_rounded_once(method: fg.Estimator) -> None:
    """The sum of the window in float64, to 2⁻⁸ of each number: a sum kept in bfloat16 would be off by more."""
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4, bias=False).bfloat16(), rows(3, 6, dtype=torch.bfloat16)
    optimizer = fg.ReplayedSGD(model.parameters(), lr=1.0, momentum=0.99, window=40)
    step = fg.TrainingStep(lambda m: m(x).float().square().mean(), model, optimizer, method, generator=seeded())
    optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(40):
        step()
    before = model.weight.detach().double()
    recipes = list(optimizer.history)[1:]
    optimizer.param_groups[0]["lr"] = 1.0
    step()
    total = torch.zeros_like(before)
    for age, recipe in enumerate([*recipes, optimizer.history[-1]]):
        for part in recipe.gradients("model.weight", model.weight.detach()):
            total += 0.99 ** (39 - age) * (part if isinstance(part, Tensor) else part.dense()).double()
    expected = before - total
    assert model.weight.dtype == torch.bfloat16
    close = 2**-8 if isinstance(method, fg.ZerothOrder) else 2**-6  # thin matrices are rounded, each of 40 to 2⁻⁹, before their product
    assert float((model.weight.detach().double() - expected).abs().max()) < close * float(expected.abs().max())


def test_parameters_that_are_not_the_optimizers_and_frozen_ones_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    model[0].bias.requires_grad_(False)
    before = copy.deepcopy(model)
    optimizer = fg.ReplayedSGD(model[0].parameters(), lr=0.1, window=3)
    step = fg.TrainingStep(lambda m: regress(X)(m), model, optimizer, fg.ZerothOrder(), generator=seeded())
    step()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)]
    assert moved == [True, False, False, False]


def test_what_cannot_be_replayed_is_told() -> None:
    model = nn.Linear(4, 3).double()
    optimizer = fg.ReplayedSGD(model.parameters(), lr=0.1)

    def loss(m: nn.Module) -> Tensor:
        return classify(X)(m)

    others = [fg.ForwardGradient(perturb=perturb) for perturb in (fg.Dense(), fg.Informed(), fg.Activity())]
    for method in (
        *others,
        fg.Backprop(),
        fg.ForwardGradient(perturb=fg.LowRank(), control_variate=0.5),
        fg.ZerothOrder(perturb=fg.Sparse()),
    ):
        with pytest.raises(ValueError, match=r"cannot be made again from seeds and numbers: ZerothOrder\(\) and"):
            fg.TrainingStep(loss, model, optimizer, method, generator=seeded())
        with torch.no_grad(), pytest.raises(ValueError, match="cannot be made again"):
            method.recipe(Objective(loss, model), seeded(), {})
    with pytest.raises(ValueError, match="which no graph can: use engine='eager'"):
        fg.TrainingStep(loss, model, optimizer, fg.ZerothOrder(), generator=seeded(), engine="compile")
    with pytest.raises(RuntimeError, match=r"takes steps by seeds and numbers, not by \.grad"):
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (fg.ReplayedSGD, {"lr": -1.0}, r"lr must lie in \[0, inf\), not -1.0"),
        (fg.ReplayedSGD, {"lr": 0.1, "momentum": 1.0}, r"momentum must lie in \[0, 1\), not 1.0"),
        (fg.ReplayedSGD, {"lr": 0.1, "window": 0}, "window must be a whole number of at least 1, not 0"),
        (fg.ReplayedAdam, {"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\), not \(0.9, 1.0\)"),
        (fg.ReplayedAdam, {"weight_decay": -0.1}, r"weight_decay must lie in \[0, inf\), not -0.1"),
    ],
)
def test_limits(kind: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        kind(nn.Linear(2, 1).parameters(), **options)
