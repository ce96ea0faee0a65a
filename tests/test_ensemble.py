"""Replicas trained as one program, each against its own single run: directions, gradients, optimizers, buffers, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import forwardgrad as fg

STEPS = 20
RATES = (0.05, 0.02, 0.1)  # a grid: each replica has its own


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def convolutional() -> nn.Module:
    layers = (nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2, groups=1), nn.ReLU())
    return nn.Sequential(nn.Unflatten(1, (1, 4, 4)), *layers, nn.Flatten(), nn.Linear(4, 3))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


class Tied(nn.Module):
    """For tests: one weight in two places, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.last = nn.Linear(5, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 3)
        self.other.weight = self.one.weight
        self.last.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.other(torch.tanh(self.one(x)))))


WIDTH: dict[Callable[[], nn.Module], int] = {dense: 5, convolutional: 16, normalised: 5, Tied: 5}


def replicas(build: Callable[[], nn.Module], dtype: torch.dtype, count: int = 3) -> list[nn.Module]:
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        models.append(build().to(dtype))
    return models


def examples(width: int, dtype: torch.dtype, steps: int = STEPS, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    """The batches of every step, the replicas' own in the first dimension; the last one is smaller."""
    source = Generator().manual_seed(9)
    sizes = [6] * (steps - 1) + [4]
    return [(torch.randn(count, n, width, dtype=dtype, generator=source), torch.randint(3, (count, n), generator=source)) for n in sizes]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9),
    "nesterov": lambda groups: fg.Nesterov(groups, 0.1, 0.9),
    "adam": lambda groups: torch.optim.Adam(groups, 0.1, (0.8, 0.99)),
}


def together(
    models: list[nn.Module],
    batches: list[tuple[Tensor, Tensor]],
    estimator: fg.Estimator,
    optimizer: str,
    rates: tuple[float, ...] = RATES,
    **how: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """Train replicas as one program; the loss and the derivatives of every step."""
    ensemble = fg.Ensemble(models, **how)
    stepper = OPTIMIZERS[optimizer]([{"params": m.parameters(), "lr": 0.01 * rate if optimizer == "adam" else rate}
                                     for m, rate in zip(models, rates, strict=True)])  # fmt: skip
    generators = [Generator().manual_seed(100 + index) for index in range(len(models))]
    losses, derivatives = [], []

    def closure(batch: tuple[Tensor, Tensor]) -> Tensor:
        stepper.zero_grad()
        record = fg.estimate_grads_(loss, ensemble, batch, estimator, generators=generators)
        losses.append(record.loss)
        derivatives.append(record.derivatives)
        return record.loss

    for batch in batches:
        stepper.step(lambda batch=batch: closure(batch))
    return losses, derivatives


def alone(
    model: nn.Module, index: int, batches: list[tuple[Tensor, Tensor]], estimator: fg.Estimator, optimizer: str
) -> tuple[list[Tensor], list[Tensor]]:
    """The single run of one replica."""
    stepper = OPTIMIZERS[optimizer]([{"params": model.parameters(), "lr": RATES[index] * (0.01 if optimizer == "adam" else 1)}])
    step = fg.TrainingStep(loss, model, stepper, estimator, generator=Generator().manual_seed(100 + index))
    records = [step(x[index], y[index]) for x, y in batches]
    return [record.loss for record in records], [record.derivatives for record in records]


ESTIMATORS: dict[str, fg.Estimator] = {
    "backprop": fg.Backprop(),
    "dense": fg.ForwardGradient(clip=1.0),
    "dense-3": fg.ForwardGradient(tangents=3, law=fg.Rademacher()),
    "dense-chunks": fg.ForwardGradient(tangents=3, chunk_size=2, law=fg.Sphere()),
    "orthogonal-chunks": fg.ForwardGradient(tangents=3, chunk_size=2, law=fg.Orthogonal()),
    "projection": fg.ForwardGradient(tangents=3, combine="projection"),
    "low-rank": fg.ForwardGradient(perturb=fg.LowRank(), law=fg.Rademacher()),
    "low-rank-3": fg.ForwardGradient(tangents=3, perturb=fg.LowRank(2), clip=0.5),
    "low-rank-chunks": fg.ForwardGradient(tangents=3, chunk_size=2, perturb=fg.LowRank()),
    "informed": fg.ForwardGradient(tangents=2, perturb=fg.Informed()),
    "per-example": fg.ForwardGradient(tangents=2, perturb=fg.PerExample()),
    "activity": fg.ForwardGradient(tangents=2, perturb=fg.Activity()),
    "activity-exact": fg.ForwardGradient(tangents=3, chunk_size=2, perturb=fg.Activity(), exact_output=True),
    "cheapest": fg.ForwardGradient(perturb=fg.Cheapest(), exact_output=True),
}


def matched(
    build: Callable[[], nn.Module], estimator: fg.Estimator, optimizer: str, dtype: torch.dtype, tolerance: float, steps: int, **how: Any
) -> None:
    batches = examples(WIDTH[build], dtype, steps)
    models, singles = replicas(build, dtype), replicas(build, dtype)
    losses, derivatives = together(models, batches, estimator, optimizer, **how)
    for index, (model, single) in enumerate(zip(models, singles, strict=True)):
        before = [p.detach().clone() for p in single.parameters()]
        wanted = alone(single, index, batches, estimator, optimizer)
        close = lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)  # noqa: E731
        close(torch.stack([found[index] for found in losses]), torch.stack(wanted[0]))
        close(torch.stack([found[index] for found in derivatives]), torch.stack(wanted[1]))
        for one, other in zip((*model.parameters(), *model.buffers()), (*single.parameters(), *single.buffers()), strict=True):
            close(one, other)
        assert any(not torch.equal(p, b) for p, b in zip(single.parameters(), before, strict=True))


@pytest.mark.some(6)
@pytest.mark.product
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_each_replica_is_its_single_run_in_float64(estimator: str, optimizer: str) -> None:
    matched(dense, ESTIMATORS[estimator], optimizer, torch.float64, 1e-9, STEPS)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("estimator", ["backprop", "dense-3", "low-rank"])
def test_each_replica_is_its_single_run_in_float32(estimator: str, optimizer: str) -> None:
    matched(dense, ESTIMATORS[estimator], optimizer, torch.float32, 1e-3, STEPS)  # rounding of 6e-8, amplified by noisy steps


@pytest.mark.product
@pytest.mark.parametrize("build", [convolutional, normalised, Tied], ids=lambda build: build.__name__)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_other_models_match_as_well(build: Callable[[], nn.Module], estimator: str) -> None:
    matched(build, ESTIMATORS[estimator], "adam", torch.float64, 1e-9, 3)


@pytest.mark.parametrize("estimator", ["backprop", "orthogonal-chunks", "low-rank-3", "activity-exact"])
def test_chunks_of_replicas_change_nothing(estimator: str) -> None:
    matched(dense, ESTIMATORS[estimator], "sgd", torch.float64, 1e-9, 3, chunk_size=2)


@dataclasses.dataclass(frozen=True)
class Recorded(fg.Gaussian):
    """For tests: a law that writes down what each stream gave."""

    seen: dict[int, list[Tensor]] = dataclasses.field(default_factory=dict)

    def fill_(self, tangent: list[Tensor], generator: Generator) -> None:
        super().fill_(tangent, generator)
        self.seen.setdefault(generator.initial_seed(), []).extend(part.clone() for part in tangent)


@pytest.mark.parametrize("perturb", [fg.Dense(), fg.LowRank(), fg.Activity()], ids=lambda p: p.name)
def test_directions_have_the_bits_of_the_single_run(perturb: fg.Perturbation) -> None:
    batches = examples(5, torch.float32, 2)
    laws = Recorded(), Recorded()
    together(replicas(dense, torch.float32), batches, fg.ForwardGradient(2, law=laws[0], perturb=perturb), "sgd")
    for index, single in enumerate(replicas(dense, torch.float32)):
        alone(single, index, batches, fg.ForwardGradient(2, law=laws[1], perturb=perturb), "sgd")
    assert laws[0].seen.keys() == laws[1].seen.keys()
    for seed, drawn in laws[1].seen.items():
        if isinstance(perturb, fg.Dense):
            assert all(torch.equal(one, other) for one, other in zip(laws[0].seen[seed], drawn, strict=True))
        else:  # a seed for every place: what it gives may be asked for again
            assert all(torch.equal(laws[0].seen[seed][0], again) for again in drawn)


class Switching(nn.Module):
    """For tests: a model that runs one layer, or two."""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.inner, self.last = True, nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.inner(x)) if self.deep else x)


@pytest.mark.parametrize("perturb", [fg.LowRank(), fg.Activity()], ids=lambda p: p.name)
def test_a_model_that_changes_its_course_is_followed(perturb: fg.Perturbation) -> None:
    estimator = fg.ForwardGradient(2, perturb=perturb)
    models, singles = replicas(Switching, torch.float64), replicas(Switching, torch.float64)
    ensemble = fg.Ensemble(models)
    generators, own = ([Generator().manual_seed(seed) for seed in range(3)] for _ in range(2))
    for (x, y), deep in zip(examples(5, torch.float64, 5)[:4], (True, False, False, True), strict=True):
        for model in (*models, *singles):
            model.deep = deep  # type: ignore[assignment]
            model.zero_grad()
        fg.estimate_grads_(loss, ensemble, (x, y), estimator, generators=generators)
        for index, single in enumerate(singles):
            fg.estimate_grad_(lambda m, i=index: loss(m, x[i], y[i]), single, estimator, generator=own[index])  # noqa: B023
            for p, q in zip(models[index].parameters(), single.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None)
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("estimator", ["backprop", "dense", "low-rank-3", "activity-exact"])
def test_a_replica_that_leaves_the_numbers_changes_no_bit_of_the_others(estimator: str, optimizer: str) -> None:
    batches = examples(5, torch.float32, 8)
    calm, wild = replicas(dense, torch.float32), replicas(dense, torch.float32)
    found = [
        together(models, batches, ESTIMATORS[estimator], optimizer, (0.05, rate, 0.1))[0] for models, rate in ((calm, 0.02), (wild, 1e38))
    ]
    assert not torch.stack(found[1])[:, 1].isfinite().all()
    assert all(torch.equal(torch.stack(one)[:, ::2], torch.stack(other)[:, ::2]) for one, other in [found])
    for index in (0, 2):
        assert all(torch.equal(p, q) for p, q in zip(calm[index].parameters(), wild[index].parameters(), strict=True))


def test_equal_hyperparameters_go_into_one_group() -> None:
    batches = examples(5, torch.float64, 4)
    apart, joint = replicas(dense, torch.float64), replicas(dense, torch.float64)
    together(apart, batches, fg.Backprop(), "sgd", (0.1, 0.1, 0.1))
    ensemble = fg.Ensemble(joint)
    optimizer = torch.optim.SGD([p for model in joint for p in model.parameters()], 0.1, momentum=0.9)
    for batch in batches:
        optimizer.zero_grad()
        fg.estimate_grads_(loss, ensemble, batch, fg.Backprop())
        optimizer.step()
    for one, other in zip(apart, joint, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_gradients_are_added_and_the_models_stay_whole() -> None:
    models = replicas(normalised, torch.float64)
    before = [{name: t.clone() for name, t in model.state_dict().items()} for model in models]
    ensemble, (batch,) = fg.Ensemble(models), examples(5, torch.float64, 1)
    assert all(torch.equal(t, kept[name]) for model, kept in zip(models, before, strict=True) for name, t in model.state_dict().items())
    fg.estimate_grads_(loss, ensemble, batch, fg.Backprop())
    once = [p.grad.clone() for model in models for p in model.parameters()]  # type: ignore[union-attr]
    for model, kept in zip(models, before, strict=True):
        model.load_state_dict(kept)
    fg.estimate_grads_(loss, ensemble, batch, fg.Backprop())
    for grad, p in zip(once, (p for model in models for p in model.parameters()), strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)


def test_the_global_generator_is_left_alone_and_dropout_is_refused() -> None:
    (batch,) = examples(5, torch.float32, 1)
    generators = [Generator().manual_seed(seed) for seed in range(3)]
    before = torch.get_rng_state()
    ensemble = fg.Ensemble([dense() for _ in range(3)])
    torch.set_rng_state(before)
    for estimator in ESTIMATORS.values():
        fg.estimate_grads_(loss, ensemble, batch, estimator, generators=generators)
    assert torch.equal(before, torch.get_rng_state())
    random = fg.Ensemble([nn.Sequential(nn.Dropout(), nn.Linear(5, 3)) for _ in range(3)])
    for estimator in (fg.Backprop(), fg.ForwardGradient()):
        with pytest.raises(RuntimeError, match="draws random numbers as it runs"):
            fg.estimate_grads_(loss, random, batch, estimator, generators=generators)


@pytest.mark.parametrize(
    "estimator",
    [
        fg.Backprop(checkpoint=True),
        fg.ForwardGradient(control_variate=0.9),
        fg.ForwardGradient(perturb=fg.LowRank(), combine="projection"),
        fg.ForwardGradient(2, perturb=fg.SplitWeights(2)),
        fg.LearnedFeedback(),
        fg.ZerothOrder(),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_what_has_no_batched_form_is_one_clear_error(estimator: fg.Estimator) -> None:
    (batch,) = examples(5, torch.float32, 1)
    with pytest.raises(ValueError, match=r"has no batched form: .*; train its replicas one after another"):
        fg.estimate_grads_(loss, fg.Ensemble(replicas(dense, torch.float32)), batch, estimator)


def test_mistakes_are_told() -> None:
    (batch,) = examples(5, torch.float32, 1)
    models = replicas(dense, torch.float32)
    for wrong in ([], [*models, nn.Linear(5, 3)], [models[0], models[0]]):
        with pytest.raises(ValueError, match="built alike"):
            fg.Ensemble(wrong)
    with pytest.raises(ValueError, match="cannot be stacked"):
        fg.Ensemble([models[0], dense().eval()])
    with pytest.raises(ValueError, match="chunk_size"):
        fg.Ensemble(models, chunk_size=0)
    ensemble, one = fg.Ensemble(models), Generator().manual_seed(0)
    for generators in (None, [one], [one, one, one]):
        with pytest.raises(ValueError, match="generator for each of the 3 replicas"):
            fg.estimate_grads_(loss, ensemble, batch, generators=generators)
    with pytest.raises(ValueError, match="first dimension is the 3 replicas"):
        fg.estimate_grads_(loss, ensemble, [t[:2] for t in batch], fg.Backprop())
    with pytest.raises(RuntimeError, match="does not depend on any trainable parameter"):
        fg.estimate_grads_(lambda m, x, y: x.mean(), ensemble, batch, fg.Backprop())
    with pytest.raises(TypeError, match="must be an object"):
        fg.estimate_grads_(loss, ensemble, batch, "backprop")  # type: ignore[arg-type]
    models[1].double()
    with pytest.raises(RuntimeError, match="were moved since"):
        fg.estimate_grads_(loss, ensemble, batch, fg.Backprop())
