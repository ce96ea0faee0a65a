"""What is perturbed: derivatives against backpropagation, moments against formulas, and what moves where.

Moments are exact: `Every` puts every combination of a few values in place of random draws, weighted so that their moments up to the fifth
are those of signs or of Gaussians. The tests of 'unbiased' on whole models are statistical, with fixed seeds: |z| ≥ 4.5 has probability
6.8e-6 a comparison, and there are 17 for the model and 17 for each tensor, some 14,000 in all: correct code fails under 1 seed of 10.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import (
    CASES,
    EXACT,
    Case,
    Loss,
    classify,
    convolutional,
    group_norm,
    layer_norm_classes,
    normalised,
    one_dimension,
    overlapping,
    padded,
    perceptron,
    rows,
    seeded,
    trained,
    true_gradient,
)
from torch import Generator, Tensor, nn

import forwardgrad as fg
from forwardgrad.calls.passes import Pass, perturbed_pass
from forwardgrad.diagnostics.moments import Moments, Part
from forwardgrad.directions import evaluation as streams_of_directions
from forwardgrad.directions.laws import fork
from forwardgrad.factored import dense
from forwardgrad.objective import Objective
from forwardgrad.perturbations.activity import ActivityUse
from forwardgrad.perturbations.base import Entered

CPU = torch.device("cpu")
PERTURBATIONS = [fg.LowRank(2), fg.PerExample(), fg.Activity(), fg.Activity(masked=False), fg.Cheapest(), fg.Informed()]


def evaluate(loss: Loss, model: nn.Module, perturb: fg.Perturbation, seeds: list[int], law: fg.Law | None = None, **options: Any) -> Pass:
    torch.manual_seed(7)
    with torch.no_grad():
        return perturbed_pass(Objective(loss, model), perturb, law or fg.Rademacher(), seeds, CPU, **options)


def named(case: str) -> Case:
    return next(known for known in CASES if known.name == case)


# Unbiased ----------------------------------------------------------------------------------------------------------------------------

MODELS = ["mlp", "cnn", "overlapping pools", "conv1d", "tied", "shared module", "layer norm classes", "layer norm", "batch norm train"]
MODELS += ["batch norm eval", "group norm", "embedding", "padded embedding", "attention classes", "attention function", "residual"]
MODELS += ["tagged words", "one example", "loss an example", "frozen", "gru"]


def against_backpropagation(model: nn.Module, loss: Loss, method: fg.Estimator, pairs: int = 6) -> list[Part]:
    """Pairs of estimates against the exact gradient: the model as a whole, and each tensor."""
    exact, generator, objective = true_gradient(model, loss), seeded(5), Objective(loss, model)
    moments = Moments(list(exact), list(exact.values()))
    for _ in range(pairs):
        with torch.no_grad():
            moments.add(*(list(method.estimate(objective, generator, {})[1].values()) for _ in range(2)))
    return moments.parts()


@pytest.mark.product
@pytest.mark.product
@pytest.mark.parametrize("perturb", PERTURBATIONS, ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_unbiased(name: str, perturb: fg.Perturbation) -> None:
    method = fg.ForwardGradient(64, perturb=perturb)
    assert method.unbiased
    for part in against_backpropagation(*named(name).build(), method):
        assert part.z < 4.5, part


@pytest.mark.product
@pytest.mark.parametrize("perturb", PERTURBATIONS, ids=repr)
@pytest.mark.parametrize("law", [fg.Rademacher(), fg.Sphere()], ids=lambda law: law.name)
def test_unbiased_under_other_laws(law: fg.Law, perturb: fg.Perturbation) -> None:
    assert against_backpropagation(*named("cnn").build(), fg.ForwardGradient(64, law=law, perturb=perturb))[0].z < 4.5


# Moments -----------------------------------------------------------------------------------------------------------------------------

SIGNS, GAUSSIAN = {-1.0: 1 / 2, 1.0: 1 / 2}, {-math.sqrt(3): 1 / 6, 0.0: 2 / 3, math.sqrt(3): 1 / 6}


PLACES = 1000


@pytest.fixture(autouse=True)
def numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small seeds tell the tangent and the place that numbers are drawn for."""
    mixed = streams_of_directions.sown
    monkeypatch.setattr(streams_of_directions, "sown", lambda seed, place: seed * PLACES + place if seed < 2**20 else mixed(seed, place))


@dataclass(frozen=True)
class Every(fg.Law):
    """Every combination of values for `digits` numbers, one combination a tangent, in place of random draws."""

    name = "every"

    values: tuple[float, ...]
    digits: int
    sizes: dict[int, int] = field(default_factory=dict)  # numbers drawn at each place of the model

    @property
    def count(self) -> int:
        return len(self.values) ** self.digits

    def fill_(self, tangent: list[Tensor], generator: Generator) -> None:
        (part,) = tangent
        index, place = divmod(generator.initial_seed(), PLACES)
        self.sizes[place] = part.numel()
        first = sum(self.sizes[before] for before in range(place))
        chosen = [self.values[index // len(self.values) ** (first + digit) % len(self.values)] for digit in range(part.numel())]
        part.copy_(torch.tensor(chosen, dtype=part.dtype).reshape(part.shape))

    def moment(self, n: int) -> float:
        raise NotImplementedError


def every(loss: Loss, model: nn.Module, perturb: fg.Perturbation, digits: int, law: dict[float, float]) -> tuple[Pass, Tensor]:
    """One pass with every combination of draws, and the probability of each."""
    drawn = Every(tuple(law), digits)
    found = evaluate(loss, model, perturb, list(range(drawn.count)), drawn)
    assert sum(drawn.sizes.values()) == digits  # all was drawn that there is
    index, chances = torch.arange(drawn.count), torch.tensor(list(law.values()), dtype=torch.float64)
    return found, torch.stack([chances[index // len(law) ** digit % len(law)] for digit in range(digits)]).prod(0)


def matrix(inputs: int, outputs: int) -> tuple[nn.Module, Loss]:
    return nn.Linear(inputs, outputs, bias=False).double(), classify(rows(3, inputs), classes=outputs)


@pytest.mark.parametrize(("m", "n", "r"), [(2, 2, 1), (2, 3, 1), (2, 1, 2), (2, 1, 3), (2, 2, 2)])
@pytest.mark.parametrize("law", [SIGNS, GAUSSIAN], ids=["signs", "gaussian"])
def test_moments_of_low_rank_are_those_of_its_formula(law: dict[float, float], m: int, n: int, r: int) -> None:
    if law is GAUSSIAN and (m + n) * r > 6:
        m, n, r = 3, 1, 1  # 81 combinations instead of 6561 or more
    model, loss = matrix(n, m)
    g = true_gradient(model, loss)["weight"]
    found, p = every(loss, model, fg.LowRank(r), r * (m + n), law)
    (use,) = found.entered
    d, squares = found.derivatives, use.gram()[..., 0].diagonal()
    torch.testing.assert_close(dense(use.gradient((p * d).unsqueeze(1))["model.weight"]), g, rtol=1e-10, atol=1e-12)
    one = m * n if law is SIGNS else (m + 2) * (n + 2)
    assert float(p @ (d.square() * squares) / g.square().sum()) == pytest.approx((1 - 1 / r) * (m * n + 2) + one / r)


@pytest.mark.some(2)
@pytest.mark.parametrize(("law", "more"), [(SIGNS, -1), (GAUSSIAN, 1)], ids=["signs", "gaussian"])
@pytest.mark.parametrize("masked", [True, False])
def test_moments_of_activities_are_those_of_the_formula(law: dict[float, float], more: int, masked: bool) -> None:
    """Of every example: E‖δ̂ − δ‖² = (q ± 1)‖δ‖² over the units that moved in both layers."""
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)).double(), rows(2, 3)
    loss = classify(x)
    found, p = every(loss, model, fg.Activity(masked), 8, law)
    h = model[0](x).relu().detach() if masked else model[0](x).detach()
    h.requires_grad_()
    y = model[2](h.relu())
    errors = torch.autograd.grad(F.cross_entropy(y, torch.arange(2)), [h, y])
    sent = [found.of(point).unsqueeze(2) * point.moves(2) for point in found.entered]
    active = [(h > 0) | (not masked), torch.ones_like(y)]
    q = sum(a.sum(1) for a in active)
    assert (q.unique().numel() > 1) == masked  # examples differ in what is active
    for s, error, a in zip(sent, errors, active, strict=True):
        torch.testing.assert_close(torch.tensordot(p, s, dims=1), error * a, rtol=1e-10, atol=1e-12)
    noise = sum((p[:, None] * (s - e * a).square().sum(2)).sum(0) for s, e, a in zip(sent, errors, active, strict=True))
    size = sum((e * a).square().sum(1) for e, a in zip(errors, active, strict=True))
    torch.testing.assert_close(noise, (q + more) * size, rtol=1e-10, atol=1e-12)


def test_moments_of_per_example_weights_are_those_of_the_formula() -> None:
    """E‖ĝ − ∇f‖² = Σ_b (n − 1)‖∇f_b‖², n weights, random signs."""
    model, x = nn.Linear(2, 2, bias=False).double(), rows(2, 2)
    found, p = every(classify(x), model, fg.PerExample(), 8, SIGNS)
    (use,) = found.entered
    g = [torch.autograd.grad(F.cross_entropy(model(x), torch.arange(2), reduction="none")[b] / 2, model.weight)[0] for b in range(2)]
    d, identity = found.of(use), torch.eye(len(p), dtype=torch.float64)
    estimates = torch.stack([dense(use.gradient(one.unsqueeze(1) * d)["model.weight"]) for one in identity])
    torch.testing.assert_close(torch.tensordot(p, estimates, dims=1), sum(g), rtol=1e-10, atol=1e-12)
    noise = float(p @ (estimates - sum(g)).square().sum((1, 2)))
    assert noise == pytest.approx(3 * sum(float(part.square().sum()) for part in g))


# Exact derivatives -------------------------------------------------------------------------------------------------------------------


USED_TWICE = ("tied", "shared module", "penalty")  # each use of a weight has a direction of its own


def directions(entered: Entered, tangent: int, example: int | None = None) -> dict[str, Tensor]:
    """One direction as a change of parameters: that of one example, or of all together."""
    weights = torch.zeros(3, entered.rows, dtype=torch.float64)
    weights[tangent, slice(None) if example is None else example] = 1
    return {name: dense(part) for name, part in entered.gradient(weights).items()}


@pytest.mark.product(each=4)
@pytest.mark.parametrize(
    "perturb", [fg.LowRank(), fg.LowRank(3), fg.Informed(2, weighted=False), fg.Informed(keep=2, weighted=False)], ids=repr
)
@pytest.mark.parametrize("case", [case for case in EXACT if case.name not in USED_TWICE], ids=str)
def test_a_derivative_of_low_rank_is_the_gradient_times_the_direction(case: Case, perturb: fg.Perturbation) -> None:
    model, loss = case.build()
    g = true_gradient(model, loss)
    found = evaluate(loss, model, perturb, fork(seeded(), 3))
    for k in range(3):
        products = [(g[name.removeprefix("model.")] * v).sum() for e in found.entered for name, v in directions(e, k).items()]
        torch.testing.assert_close(found.derivatives[k], sum(products), rtol=1e-10, atol=1e-11)


def examples(name: str) -> tuple[nn.Module, Tensor]:
    """A model and its batch, the classes being 0, 1, 2, 0, ..."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2022)
        model, x = {
            "mlp": lambda: (perceptron(), rows(6, 4)),
            "cnn": lambda: (convolutional(), rows(3, 1, 6, 6)),
            "conv1d": lambda: (one_dimension()[0], rows(4, 4, 9)),
            "overlapping pools": lambda: (overlapping()[0], rows(4, 1, 6, 6)),
            "group norm": lambda: (group_norm()[0], rows(4, 1, 4, 4)),
            "layer norm": lambda: (layer_norm_classes()[0], rows(6, 4)),
            "rms norm": lambda: (nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5), nn.Linear(5, 3)), rows(6, 4)),
            "batch norm eval": lambda: (normalised(train=False)[0], rows(6, 4)),
            "positions": lambda: (nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(10, 3)), rows(6, 2, 4)),
            "padded embedding": lambda: (padded()[0], torch.tensor([[0, 1], [2, 2], [5, 2]])),
        }[name]()
        return model.double(), x


EXAMPLES = ["mlp", "cnn", "conv1d", "overlapping pools", "group norm", "layer norm", "rms norm", "batch norm eval", "positions"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_derivative_of_one_example_is_its_gradient_times_its_direction(name: str) -> None:
    model, x = examples(name)
    found = evaluate(classify(x), model, fg.PerExample(), fork(seeded(), 3))
    each = F.cross_entropy(model(x), torch.arange(len(x)) % 3, reduction="none") / len(x)
    assert found.rows is not None
    for b in range(len(x)):
        g = dict(zip(trained(model), torch.autograd.grad(each[b], list(model.parameters()), retain_graph=True), strict=True))
        for k in range(3):
            parts = [
                (g[name.removeprefix("model.")] * v).sum()
                for e in found.entered
                for name, v in directions(e, k, b if e.rows > 1 else None).items()  # one row: what has no rule moves for all
            ]
            torch.testing.assert_close(found.rows[k, b], sum(parts), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ["mlp", "cnn", "conv1d", "overlapping pools", "positions", "padded embedding"])
def test_activities_follow_the_errors_of_backpropagation_and_move_where_they_matter(name: str, masked: bool) -> None:
    model, x = examples(name)
    found = evaluate(classify(x), model, fg.Activity(masked), fork(seeded(), 3))
    owners = {id(p): i for i, module in enumerate(model) for p in module.parameters()}
    points = [point for point in found.entered if isinstance(point, ActivityUse)]
    assert len(points) == {"overlapping pools": 2}.get(name, len([m for m in model if list(m.parameters())]))  # of three; one has no rule
    outs = [x]
    for module in model:
        outs.append(module(outs[-1].clone() if outs[-1].is_floating_point() else outs[-1]))
    for out in outs[1:]:
        out.retain_grad()
    F.cross_entropy(outs[-1], torch.arange(len(x)) % 3).backward()
    total = torch.zeros(3, dtype=torch.float64)
    for point in points:
        place = start = 1 + owners[id(model.get_parameter(point.names[0].removeprefix("model.")))]
        while masked and place < len(model) and isinstance(model[place], (nn.ReLU, nn.MaxPool2d)):
            place += 1
        error, moves = outs[place].grad, point.moves(len(x)).reshape(3, *outs[place].shape)
        total = total + (moves * error).flatten(1).sum(1)
        matters = torch.ones_like(error, dtype=torch.bool)
        if any(isinstance(m, nn.ReLU) for m in model[start:place]):
            matters = outs[place] > 0
        if isinstance(model[start - 1], nn.Embedding):
            matters = matters & (x != 2).unsqueeze(-1)
        assert torch.equal(moves != 0, matters.expand_as(moves))
        for parameter, g in ((name, dense(part)) for name, part in point.from_error(error).items()):
            torch.testing.assert_close(g, model.get_parameter(parameter.removeprefix("model.")).grad, rtol=1e-10, atol=1e-12)
    if len(points) == len(found.entered):
        torch.testing.assert_close(found.derivatives, total, rtol=1e-10, atol=1e-12)


class Looked(nn.Module):
    """Embeddings by the functional call, with a padding word, a ReLU behind them, and max-pooling behind that."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Parameter(torch.randn(7, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.max_pool2d(F.embedding(x, self.table, padding_idx=2).relu(), 2).flatten(1))


@pytest.mark.parametrize("perturb", [*PERTURBATIONS, fg.Cheapest({"table": "low-rank", "*": "dense"})], ids=repr)
def test_unbiased_where_words_of_padding_pass_a_relu_and_a_pool(perturb: fg.Perturbation) -> None:
    torch.manual_seed(0)
    model, x = Looked().double(), torch.tensor([[0, 1, 3, 2], [2, 2, 4, 2], [5, 2, 2, 6]])
    assert not true_gradient(model, classify(x))["table"][2].any()
    for part in against_backpropagation(model, classify(x), fg.ForwardGradient(64, perturb=perturb)):
        assert part.z < 4.5, part


class Placed(nn.Module):
    """Words of a sentence and their places, which are the same for every sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(7, 4), nn.Embedding(3, 4)
        self.middle, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, words: Tensor) -> Tensor:
        h = self.words(words) + self.places(torch.arange(3))
        return self.out(self.middle(h.tanh()).tanh().mean(1))


@pytest.mark.parametrize("sentences", [3, 6])
@pytest.mark.parametrize("perturb", PERTURBATIONS, ids=repr)
def test_unbiased_where_the_rows_of_an_embedding_are_places_and_not_examples(perturb: fg.Perturbation, sentences: int) -> None:
    """As many sentences as places, or a multiple of them: no count tells that the rows are not examples."""
    torch.manual_seed(0)
    model, words = Placed().double().requires_grad_(False), torch.randint(7, (sentences, 3), generator=seeded(1))
    model.places.requires_grad_()  # alone, so that its own gradient is not lost in the noise of the others
    for part in against_backpropagation(model, classify(words), fg.ForwardGradient(64, perturb=perturb), pairs=20):
        assert part.z < 4.5, part


class WordsAndPlaces(nn.Module):
    """Words and their places, added up in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words, self.places, self.out, self.in_place = nn.Embedding(7, 5), nn.Embedding(6, 5), nn.Linear(5, 3), in_place

    def forward(self, words: Tensor) -> Tensor:
        x, places = self.words(words), self.places(torch.arange(words.shape[1]).expand(words.shape))
        if self.in_place:
            x += places
        return self.out(torch.tanh(x if self.in_place else x + places).sum(1))


@pytest.mark.parametrize("method", [fg.ForwardGradient(2, perturb=fg.Activity()), fg.LearnedFeedback()], ids=lambda method: method.name)
def test_a_sum_written_into_a_layers_output_leaves_the_moves_of_that_layer_alone(method: fg.Estimator) -> None:
    """The places' moves are added to how the words' output moves, and not to what the words moved by."""
    words, found = torch.arange(24).reshape(4, 6) % 7, []
    for in_place in (False, True):
        model, generator, state = WordsAndPlaces(in_place).double(), seeded(), dict[str, Any]()
        for _ in range(3):
            fg.estimate_grad_(classify(words), model, method, generator=generator, state=state)
        found.append({name: p.grad for name, p in trained(model).items()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
