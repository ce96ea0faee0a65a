"""Zeroth order where layers move by rules of their own: against backpropagation and forward mode, one direction and many at once.

Statistical tests have fixed seeds. A |z| ≥ 4.5 has probability 6.8e-6 for a correct estimator; the number m of
comparisons is stated in each.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import EXACT, Case, rows, seeded, trained, true_gradient
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import forwardgrad as fg
from forwardgrad.calls import displaced
from forwardgrad.diagnostics import peak_bytes

APART = "directions are evaluated one after another under this loss, since vmap cannot follow it"
TOGETHER = (
    *("mlp", "cnn", "tied", "batch norm train", "batch norm average", "padded embedding", "attention train", "attention function", "lstm"),
    *("dropout", "branching", "module list", "tagged words", "loss an example", "one example", "layer norm", "group norm"),
)
"""Cases that differ in what side by side may make of them."""
MHA = ("attention train", "attention eval", "attention classes")
X = rows(6, 4)


def step(loss: Any, at: Any, method: fg.Estimator, seed: int = 0, state: dict[str, Tensor] | None = None) -> fg.Estimate:
    torch.manual_seed(7)
    return fg.estimate_grad_(loss, at, method, generator=seeded(seed), state={} if state is None else state)


def found(case: Case, method: fg.Estimator) -> tuple[fg.Estimate, dict[str, Tensor]]:
    model, loss = case.build()
    record = step(loss, model, method)
    return record, {name: p.grad for name, p in trained(model).items() if p.grad is not None}


def single() -> tuple[nn.Module, Any]:
    """A small network and a smooth loss of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    return model, lambda m: F.cross_entropy(m(X), torch.arange(6) % 3)


@pytest.mark.product
@pytest.mark.parametrize("perturb", [fg.LowRank(2), fg.PerExample()], ids=lambda p: p.name)
@pytest.mark.parametrize("case", [case for case in EXACT if case.name not in MHA], ids=str)
def test_estimates_are_those_of_forward_mode_along_the_same_directions(case: Case, perturb: fg.Perturbation) -> None:
    """Forward mode is held against backpropagation elsewhere; from one seed the directions are the same."""
    record, gradients = found(case, fg.ZerothOrder(1e-5, tangents=2, perturb=perturb))
    exact, expected = found(case, fg.ForwardGradient(tangents=2, perturb=perturb))
    scale = float(exact.derivatives.abs().max())
    torch.testing.assert_close(record.derivatives, exact.derivatives, rtol=0, atol=1e-6 * scale)
    largest = max(float(g.abs().max()) for g in expected.values())
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("chunk_size", [1, None])
@pytest.mark.parametrize("case", [case for case in EXACT if case.name in (*MHA[1:], "layer norm")], ids=str)
def test_the_derivative_at_low_rank_is_that_of_backpropagation(case: Case, chunk_size: int | None) -> None:
    """Of two directions at once ĝ is no multiple of one of them: the second is one that has no weight, as its seed is another's."""
    model, loss = case.build()
    exact = true_gradient(model, loss)
    record = step(loss, model, fg.ZerothOrder(1e-5, perturb=fg.LowRank(2), chunk_size=chunk_size))
    v = {name: p.grad / record.derivatives for name, p in trained(model).items()}
    slope = sum((exact[name] * part).sum() for name, part in v.items())
    torch.testing.assert_close(record.derivatives[0], slope, rtol=1e-6, atol=1e-8)
    if case.name in MHA:  # which moves at low rank inside
        assert torch.linalg.matrix_rank(v["attention.in_proj_weight" if case.name == MHA[1] else "block.attention.in_proj_weight"]) == 2


@pytest.mark.parametrize(("sides", "order"), [("two", 2), ("one", 1)])
@pytest.mark.parametrize("perturb", [fg.Dense(), fg.LowRank(), fg.Sparse(0.5)], ids=lambda p: p.name)
def test_the_error_of_a_derivative_falls_with_the_step(perturb: fg.Perturbation, sides: Any, order: int) -> None:
    model, loss = single()
    exact, errors = true_gradient(model, loss), []
    for epsilon in (1e-3, 1e-4):
        model.zero_grad()
        record = step(loss, model, fg.ZerothOrder(epsilon, perturb=perturb, sides=sides))
        slope = sum(float((exact[name] * p.grad).sum()) for name, p in trained(model).items()) / float(record.derivatives)
        errors.append(float(record.derivatives) - slope)
    assert errors[0] / errors[1] == pytest.approx(10**order, rel=0.2)


@pytest.mark.parametrize(
    ("perturb", "sides"), [(fg.LowRank(), "one"), (fg.LowRank(2), "two"), (fg.PerExample(), "one"), (fg.Dense(), "one")], ids=str
)
def test_unbiased_for_a_quadratic_loss(perturb: fg.Perturbation, sides: Any) -> None:
    model, x = nn.Linear(3, 2).double(), rows(4, 3)

    def loss(m: nn.Module) -> Tensor:
        return F.mse_loss(m(x), torch.ones(4, 2, dtype=torch.float64))

    exact, generator, samples = true_gradient(model, loss), seeded(4), []
    for _ in range(60):
        model.zero_grad()
        method = fg.ZerothOrder(0.1, tangents=64, perturb=perturb, sides=sides, chunk_size=None)
        fg.estimate_grad_(loss, model, method, generator=generator)
        samples.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    each = torch.stack(samples)
    g = torch.cat([exact[name].flatten() for name in trained(model)])
    z = (each.mean(0) - g) / each.std(0) * math.sqrt(len(each))
    assert z.abs().max() < 4.5  # m = 8 in each of four: false alarms below 0.02 % in all
    assert float(g.norm() / (each.std(0) / math.sqrt(len(each))).norm()) > 5  # and a gradient shows


@pytest.mark.product
@pytest.mark.parametrize("sides", ["two", "one"])
@pytest.mark.parametrize("perturb", [fg.Dense(), fg.LowRank(2), fg.PerExample(), fg.Sparse(0.5)], ids=lambda p: p.name)
@pytest.mark.parametrize("case", [case for case in EXACT if case.name in TOGETHER], ids=str)
@pytest.mark.filterwarnings(f"ignore:{APART}")
def test_a_population_is_the_loop(case: Case, perturb: fg.Perturbation, sides: Any) -> None:
    """With the same masks of dropout, the same buffers and the same state of the global generator."""
    ends = []
    for size in (1, None, 2):
        model, loss = case.build()
        record = step(loss, model, fg.ZerothOrder(1e-2, tangents=3, perturb=perturb, sides=sides, chunk_size=size))
        gradients = {name: p.grad for name, p in trained(model).items() if p.grad is not None}
        ends.append(([record.loss, record.derivatives], gradients, dict(model.named_buffers()), torch.get_rng_state()))
        assert record.forward_passes == (6 if sides == "two" else 4)
    for values, gradients, buffers, state in ends[1:]:
        torch.testing.assert_close(values, ends[0][0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradients, ends[0][1], rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(buffers, ends[0][2], rtol=1e-11, atol=1e-13)
        assert torch.equal(state, ends[0][3])


class Encoder(nn.Module):
    """Words, two of which are padding, through a block of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.norm = nn.Embedding(9, 4, padding_idx=0), nn.LayerNorm(4), nn.LayerNorm(4)
        self.into, self.out, self.up, self.down = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 4, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(-3, -2) for part in self.into(self.first(x)).chunk(3, -1))
        seen = (words != 0)[:, None, None]
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, seen).transpose(-3, -2).flatten(-2))
        return self.norm(x + self.down(F.gelu(self.up(x)))).mean(1)


@pytest.mark.parametrize("sides", ["two", "one"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("held", [2**24, 3000, 1], ids=["one batch", "batches", "one by one"])
def test_a_population_of_a_transformer_is_the_loop(held: int, rank: int, sides: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is evaluated in batches: the widest of what is made is 12 numbers for 5 words of 3 texts, 1,440 bytes a direction."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Encoder().double()
    words = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 1, 6, 7], [8, 8, 2, 1, 3]])
    monkeypatch.setattr(displaced, "_HELD", held)
    batches, together = list[int](), displaced.Lines._together

    def noted(self: Any, part: range, steps: Any) -> Any:
        batches.append(len(part))
        return together(self, part, steps)

    monkeypatch.setattr(displaced.Lines, "_together", noted)
    ends = []
    for size in (1, None):
        model.zero_grad()
        method = fg.ZerothOrder(1e-2, tangents=5, perturb=fg.LowRank(rank), sides=sides, chunk_size=size)
        record = step(lambda m: F.cross_entropy(m(words), torch.tensor([0, 1, 2])), model, method)
        ends.append((record.loss, record.derivatives, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-11)
    assert batches == ([5] if held == 2**24 or sides == "two" else [2, 2] if held == 3000 else [])  # the fifth is one by itself


def test_a_loss_that_vmap_cannot_follow_is_told_of_once() -> None:
    (model, loss), (twin, _) = single(), single()
    scores = [lambda m: loss(m).item(), lambda m: float(loss(m))]
    for score in scores:
        with pytest.warns(UserWarning, match=APART):
            record = step(score, model, fg.ZerothOrder(tangents=2, perturb=fg.LowRank(), chunk_size=None))
        step(score, model, fg.ZerothOrder(tangents=2, perturb=fg.LowRank(), chunk_size=None))  # a warning would be an error
    alone = step(loss, twin, fg.ZerothOrder(tangents=2, perturb=fg.LowRank()))
    torch.testing.assert_close(record.derivatives, alone.derivatives, rtol=1e-9, atol=1e-11)

    def broken(m: nn.Module) -> Tensor:
        raise ArithmeticError("the user's own")

    for _ in range(2):
        with pytest.raises(ArithmeticError, match="the user's own"):
            step(broken, model, fg.ZerothOrder(tangents=2, perturb=fg.LowRank(), chunk_size=None))


class Products(TorchDispatchMode):
    """Notes the rows of every product with a matrix of so many columns."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, list[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and result.shape[1] == self.columns:
            self.rows.append(result.shape[0])
        return result


def test_the_product_of_the_first_layer_is_made_once_for_the_whole_population() -> None:
    model = nn.Sequential(nn.Linear(30, 7), nn.ReLU(), nn.Linear(7, 11))
    x, noted, second = torch.ones(5, 30), Products(7), Products(11)

    def once() -> None:
        step(lambda m: m(x).square().mean(), model, fg.ZerothOrder(tangents=8, perturb=fg.LowRank(), chunk_size=None))

    once()  # a new model is looked at first
    with noted, second:
        once()
    assert noted.rows.count(5) == 1
    assert max(noted.rows) < 80
    assert 80 in second.rows  # all points of all directions, in one product


def test_a_step_at_low_rank_holds_what_inference_holds() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        deep = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.ReLU())))
        wide = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 4))

    def peak(model: nn.Module, x: Tensor, method: fg.Estimator) -> tuple[int, int]:
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        take = fg.TrainingStep(lambda m, x: m(x).square().mean(), model, optimizer, method, generator=seeded())
        take(x)
        with torch.no_grad():
            inference = peak_bytes(lambda: model(x).square().mean(), [x.device])
        return peak_bytes(lambda: take(x), [x.device]), inference

    for sides in ("two", "one"):
        method = fg.ZerothOrder(perturb=fg.LowRank(), sides=sides)  # type: ignore[arg-type]
        step_bytes, inference = peak(deep, torch.ones(1024, 64), method)
        assert step_bytes < 1.05 * inference
        step_bytes, _ = peak(wide, torch.ones(2, 512), method)
        assert step_bytes < 0.05 * wide[0].weight.nbytes  # neither a moved copy nor a direction nor a gradient of that size
    assert peak(wide, torch.ones(2, 512), fg.ZerothOrder())[0] > wide[0].weight.nbytes  # and it would show


def test_a_step_of_plain_sgd_takes_the_estimate() -> None:
    for perturb in (fg.LowRank(2), fg.PerExample()):
        (model, loss), (twin, _) = single(), single()
        method = fg.ZerothOrder(tangents=3, perturb=perturb, chunk_size=2)
        step(loss, twin, method)
        fg.TrainingStep(loss, model, torch.optim.SGD(model.parameters(), 0.1), method, generator=seeded())()
        torch.testing.assert_close(list(model.parameters()), [q - 0.1 * q.grad for q in twin.parameters()])


def test_one_side_reports_the_loss_and_the_buffers_of_an_ordinary_pass() -> None:
    for perturb in (fg.Dense(), fg.LowRank(), fg.PerExample()):
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
        plain = copy.deepcopy(model)
        expected = plain(X).square().mean()
        record = step(lambda m: m(X).square().mean(), model, fg.ZerothOrder(0.3, tangents=3, perturb=perturb, sides="one", chunk_size=2))
        assert record.loss == expected
        torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()), rtol=0, atol=0)
        assert record.forward_passes == 4


def test_parameters_in_a_penalty_move_as_a_whole_and_no_copy_of_them_is_kept() -> None:
    model = nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 300, bias=False))
    x = torch.ones(2, 400)

    def loss(m: nn.Module) -> Tensor:
        return m(x).square().mean() + m[0].weight.square().mean() + m[1].weight.abs().mean()

    method, copies = fg.ZerothOrder(perturb=fg.LowRank()), 400 * 300 * 4
    take = fg.TrainingStep(loss, model, torch.optim.SGD(model.parameters(), 1e-3), method, generator=seeded())
    take()
    assert peak_bytes(take, [x.device]) < 3.2 * copies  # of one parameter at a time: what is drawn, moved and squared
    record, exact = step(loss, model, method), true_gradient(model, loss)
    assert all(p.grad is not None and exact[name].any() for name, p in trained(model).items())
    assert record.derivatives.isfinite().all()


def test_padding_and_frozen_and_unused_parameters_stay_out() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(6, 4, padding_idx=2), "out": nn.Linear(4, 2), "idle": nn.Linear(2, 2)}).double()
    model["out"].bias.requires_grad_(False)
    words = torch.tensor([[0, 1], [2, 2]])
    for perturb in (fg.LowRank(), fg.PerExample()):
        model.zero_grad(set_to_none=True)
        step(lambda m: m["out"](m["words"](words).mean(1)).exp().mean(), model, fg.ZerothOrder(perturb=perturb, tangents=2))
        assert model["words"].weight.grad is not None
        assert model["out"].weight.grad.any()
        assert model["out"].bias.grad is None
        assert model["idle"].weight.grad is None
    method = fg.ZerothOrder(perturb=fg.LowRank())
    moved = step(lambda m: m["words"](torch.tensor([1])).exp().sum(), model, method)
    still = step(lambda m: m["words"](torch.tensor([2])).exp().sum(), model, method)
    assert moved.derivatives.any()
    assert not still.derivatives.any()


WORDS = torch.tensor([[1, 2, 3], [4, 0, 1], [5, 5, 2], [3, 6, 0]])


def language() -> nn.Module:
    """A word after the other, as in every language model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 7)).double()


@pytest.mark.parametrize("options", [{}, {"sides": "one"}, {"chunk_size": None}], ids=repr)
def test_examples_that_move_apart_are_told_apart_in_flattened_rows(options: dict[str, Any]) -> None:
    """How many sentences there are stands at a place of the model alone, as the loss is given the words of all."""

    def loss(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(WORDS).flatten(0, 1), WORDS.roll(-1, 1).flatten())

    one, other = language(), language()
    record = step(loss, one, fg.ZerothOrder(1e-5, tangents=3, perturb=fg.PerExample(), **options))
    exact = step(loss, other, fg.ForwardGradient(tangents=3, perturb=fg.PerExample()))
    close = 1e-3 if "sides" in options else 1e-6
    torch.testing.assert_close(record.derivatives, exact.derivatives, rtol=close, atol=close)
    for name, p in one.named_parameters():
        torch.testing.assert_close(p.grad, other.get_parameter(name).grad, rtol=close, atol=close)


def test_the_mean_over_directions_of_flattened_rows_is_the_gradient() -> None:
    """m = 83 comparisons with backpropagation, each |z| < 4.5."""

    def loss(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(WORDS).flatten(0, 1), WORDS.roll(-1, 1).flatten())

    model, found = language(), []
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(loss(model), list(model.parameters()))])
    for seed in range(60):
        model.zero_grad()
        step(loss, model, fg.ZerothOrder(1e-4, tangents=16, perturb=fg.PerExample(), chunk_size=16), seed)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    each = torch.stack(found)
    z = (each.mean(0) - truth) / (each.std(0) / math.sqrt(len(each)) + 1e-12)
    assert float(z.abs().max()) < 4.5
