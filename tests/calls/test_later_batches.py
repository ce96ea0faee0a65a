"""What was found out of one batch, used for others: where their structure differs, estimates are unbiased all the same."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import GIVEN_UP, Loss, rows, seeded, true_gradient
from tests.support.units import summed_over_units
from torch import Tensor, nn

import forwardgrad as fg

X, Y = rows(6, 4), torch.arange(6) % 3
pytestmark = [
    GIVEN_UP,
    pytest.mark.filterwarnings("ignore:.*a part of the loss does not tell examples apart", "ignore:There is a performance drop"),
]


class Between(nn.Module):
    """Two layers, and what is given as a function between them."""

    def __init__(self, walk: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.walk = nn.Linear(4, 6), nn.Linear(6, 3), walk

    def forward(self, x: Tensor, *by: Any) -> Tensor:
        return self.b(self.walk(self.a(x).tanh(), *by))


def between(walk: Callable[..., Tensor]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Between(walk).double()


def picked(model: nn.Module) -> Callable[..., Loss]:
    return lambda *by: lambda m: F.cross_entropy(m(X, *by), Y)


def exact(model: nn.Module, loss: Loss, patch: pytest.MonkeyPatch) -> None:
    """The estimate of a loss adds up to its gradient."""
    model.zero_grad()
    found = summed_over_units(model, loss, fg.Activity(), patch)
    for name, g in true_gradient(model, loss).items():
        torch.testing.assert_close(found[name], g, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def first(model: nn.Module, loss: Loss) -> None:
    fg.estimate_grad_(loss, model, fg.ForwardGradient(perturb=fg.Activity()), generator=seeded())


ORDER, EVERY = torch.tensor([1, 2, 3, 4, 5, 0]), torch.arange(6) + 0  # which is not what torch.arange returned
NONE, SOME = torch.zeros(6, 1, dtype=torch.bool), torch.tensor([[True], [False]] * 3)
BY_DATA: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], tuple[Any, ...]]] = {
    "index": (lambda h, i: h[i], (EVERY,), (ORDER,)),
    "list": (lambda h, i: h[i], ([0, 1, 2, 3, 4, 5],), ([1, 2, 3, 4, 5, 0],)),
    "index_select": (lambda h, i: h.index_select(0, i), (EVERY,), (ORDER,)),
    "gather": (lambda h, i: h.gather(0, i[:, None].expand(6, 6)), (EVERY,), (ORDER,)),
    "take_along_dim": (lambda h, i: h.take_along_dim(i[:, None], 0), (EVERY,), (ORDER,)),
    "sorted and back": (lambda h, n: h[n.argsort(stable=True)].cumsum(1)[n.argsort(stable=True)], (EVERY * 0,), (ORDER,)),
    "index_add": (lambda h, i: torch.zeros_like(h).index_add(0, i, h), (EVERY,), (ORDER // 2,)),
    "index_add_": (lambda h, i: torch.zeros_like(h).index_add_(0, i, h), (EVERY,), (ORDER // 2,)),
    "scatter_add": (lambda h, i: torch.zeros_like(h).scatter_add(0, i[:, None].expand(6, 6), h), (EVERY,), (ORDER // 2,)),
    "index_put": (lambda h, i: torch.zeros_like(h).index_put((i,), h), (EVERY,), (ORDER,)),
    "where": (lambda h, c: h + torch.where(c, h.roll(1, 0), 0.0), (NONE,), (SOME,)),
    "masked_fill": (lambda h, c: h + h.roll(1, 0).masked_fill(~c, 0.0), (NONE,), (SOME,)),
    "masked_scatter": (lambda h, c: torch.zeros_like(h).masked_scatter(c.expand(6, 6), h), (~NONE,), (~SOME,)),
    "pieces": (lambda h, n: torch.cat([p.mean(0, keepdim=True).expand_as(p) for p in h.split(n)]), ([1] * 6,), ([2, 1, 1, 1, 1],)),
    "one by one": (lambda h, order: torch.stack([h.unbind()[i] for i in order]), (range(6),), ([1, 2, 3, 4, 5, 0],)),
    "a loop": (lambda h, order: torch.stack([h[i] for i in order]), (range(6),), ([1, 2, 3, 4, 5, 0],)),
    "flip": (lambda h, dims: h + h.flip(dims), ([1],), ([0],)),
    "roll": (lambda h, shifts: h + h.roll(shifts, (0, 1)), ((0, 1),), ((1, 0),)),
}


@pytest.mark.parametrize("case", BY_DATA)
def test_what_is_picked_by_data_may_meet_in_a_later_batch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    walk, one, other = BY_DATA[case]
    model = between(walk)
    loss = picked(model)
    first(model, loss(*one))
    exact(model, loss(*other), monkeypatch)


def test_words_of_one_token_say_nothing_of_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(x: Tensor) -> Loss:
        return lambda m: F.cross_entropy(m(x).flatten(0, 1), torch.arange(len(x) * x.shape[1]) % 3)

    model = between(lambda h: h.cumsum(1))
    first(model, loss(rows(4, 1, 4)))
    for x in (rows(4, 5, 4), rows(4, 1, 4), rows(1, 5, 4), rows(3, 2, 4)):
        exact(model, loss(x), monkeypatch)


def test_a_row_without_a_batch_is_one_example(monkeypatch: pytest.MonkeyPatch) -> None:
    model = between(lambda h: h)
    first(model, lambda m: F.cross_entropy(m(X), Y))
    exact(model, lambda m: F.cross_entropy(m(X[0]), Y[0]), monkeypatch)


def test_other_numbers_of_rows_for_an_example_are_found_out_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(x: Tensor, mask: Tensor) -> Loss:
        return lambda m: F.cross_entropy(m(x)[mask], torch.arange(int(mask.sum())) % 3)

    model = between(lambda h: h.cumsum(1))
    masks = [torch.eye(3, dtype=torch.bool), torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]).bool(), torch.eye(3, dtype=torch.bool).flip(0)]
    for mask in masks:
        exact(model, loss(rows(3, 3, 4), mask), monkeypatch)


def test_other_trained_parameters_are_other_places(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.Tanh(), nn.Linear(6, 3)]
    model = nn.Sequential(*layers).double()
    for trained in ("3", "0", "3", ""):
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith(trained))
            p.grad = None
        exact(model, lambda m: F.cross_entropy(m(X), Y), monkeypatch)


@pytest.mark.full
def test_every_replica_of_an_ensemble_may_pick_its_own() -> None:
    models = [between(lambda h, i: h[i]) for _ in range(2)]
    order = torch.stack([EVERY, ORDER])
    method = fg.ForwardGradient(tangents=4_000, perturb=fg.Activity(), law=fg.Rademacher())
    generators = [seeded(seed) for seed in range(2)]
    fg.estimate_grads_(
        lambda m, x, i, y: F.cross_entropy(m(x, i), y),
        fg.Ensemble(models),
        (X.expand(2, 6, 4), order, Y.expand(2, 6)),
        method,
        generators=generators,
    )
    for model, i in zip(models, order, strict=True):
        g = true_gradient(model, lambda m, i=i: F.cross_entropy(m(X, i), Y))["a.weight"]
        assert model.a.weight.grad is not None
        assert float((model.a.weight.grad - g).norm() / g.norm()) < 0.5  # bias alone was 1.06; noise is about 0.2


# What hides from NaN -------------------------------------------------------------------------------------------------------------------


class Penalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.a(x)
        return self.b(self.h.tanh())


def half_hidden(h: Tensor) -> Tensor:
    return torch.where(h > 0, h, 0.0)


def noisy(strength: float) -> Loss:
    def loss(m: nn.Module) -> Tensor:
        out = m(X)
        torch.manual_seed(5)
        return (out + strength * torch.randn_like(out)).exp().mean()

    return loss


def spoiled(m: nn.Module) -> Tensor:
    each = F.cross_entropy(m(X), Y, reduction="none")
    each[Y == 2] = 0
    return each.mean()


def through_a_view(m: nn.Module) -> Tensor:
    loss = F.cross_entropy(m(X), Y)
    loss.view(1).mul_(3)
    return loss


def learned_target(m: nn.Module) -> Tensor:
    return F.mse_loss(m(X), m.b.weight[:, :3][Y])


HIDDEN: dict[str, Loss] = {
    "a penalty": lambda m: F.cross_entropy(m(X), Y) + half_hidden(m(X) * 0 + m.h[:, :3]).square().mean(),
    "a factor": lambda m: F.cross_entropy(m(X), Y) * (1 + half_hidden(m.h).mean()),
    "a target": lambda m: F.mse_loss(m(X), half_hidden(m.h)[:, :3]),
    "a sum without NaN": lambda m: F.cross_entropy(m(X), Y) + half_hidden(m.h).nansum(),
    "written into": spoiled,
    "through a view": through_a_view,
    "a learned target": learned_target,
    "by hand, as it is": lambda m: m(X).double().contiguous().logsumexp(1).mean(),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_what_follows_from_activities_is_found_whatever_hides_it(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Penalised().double()
    exact(model, HIDDEN[case], monkeypatch)


def test_noise_of_no_strength_is_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = between(lambda h: h)
    first(model, noisy(0.0))
    exact(model, noisy(0.5), monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gate_that_passes_gradients_alone_is_seen(dtype: torch.dtype) -> None:
    def gated(h: Tensor) -> Tensor:
        other = h.roll(1, 0)
        return h + (other - other.detach()).clamp(min=-1e-3)

    model = between(gated).to(dtype)
    found = fg.explain(lambda m: F.cross_entropy(m(X.to(dtype)), Y), model, fg.ForwardGradient(perturb=fg.Activity()))
    assert [row.scored for row in found.layers] == ["by the whole loss", "by example"]


def test_a_scaled_sum_with_a_constant_does_not_crash() -> None:
    """Under a dispatch mode torch 2.13 ends in a segmentation fault where a dual number and a plain tensor are added with alpha."""
    for scaled in (lambda h: torch.add(h, X[:, :1], alpha=0.5), lambda h: torch.sub(h, X[:, :1], alpha=0.5)):
        model = between(scaled)
        with pytest.warns(UserWarning, match="torch's own forward mode"):
            fg.estimate_grad_(lambda m: F.cross_entropy(m(X), Y), model, fg.ForwardGradient(), generator=seeded())


# What the passes of a survey leave -----------------------------------------------------------------------------------------------------


class Criterion(nn.Module):
    """A loss that keeps a running scale, as a buffer, an attribute and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0, dtype=torch.float64))
        self.last, self.seen = torch.tensor(1.0, dtype=torch.float64), [torch.tensor(0.0, dtype=torch.float64)]

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(out, y)
        self.scale = 0.9 * self.scale + 0.1 * loss.detach()
        self.last = 0.9 * self.last + 0.1 * loss.detach()
        self.seen[0] = self.seen[0] + loss.detach()
        return loss / self.scale


CRITERION = Criterion()


@pytest.mark.parametrize("where", ["closed over", "global"])
def test_what_a_loss_keeps_is_as_after_one_step(where: str) -> None:
    own = Criterion()
    model = between(lambda h: h)
    loss: Loss = (lambda m: own(m(X), Y)) if where == "closed over" else (lambda m: CRITERION(m(X), Y))
    kept = own if where == "closed over" else CRITERION
    with torch.no_grad():
        value = float(F.cross_entropy(model(X), Y))
    fg.estimate_grad_(loss, model, fg.ForwardGradient(perturb=fg.Activity()), generator=seeded())
    assert all(bool(t.isfinite()) for t in (kept.scale, kept.last, kept.seen[0]))
    assert float(kept.scale) <= max(1.0, value) + 1e-9
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.full
def test_a_known_path_is_known_again_after_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    model = between(lambda h, n: sum((h + step for step in range(n)), torch.zeros_like(h)))
    for n in range(1, 36):
        first(model, lambda m, n=n: F.cross_entropy(m(X, n), Y))
    first(model, lambda m: F.cross_entropy(m(X, 3), Y))
    found = fg.explain(lambda m: F.cross_entropy(m(X, 3), Y), model, fg.ForwardGradient(perturb=fg.Activity()))
    assert {row.scored for row in found.layers} in ({"by example"}, {"by the loss"})


def test_a_model_of_random_calls_ends_in_a_sentence_or_works() -> None:
    draw = random.Random(0)
    model = between(lambda h: h.cumsum(0) if draw.random() < 0.5 else h)
    for step in range(10):
        with contextlib.suppress(RuntimeError):  # the sentence
            fg.estimate_grad_(lambda m: F.cross_entropy(m(X), Y), model, fg.ForwardGradient(perturb=fg.Activity()), generator=seeded(step))
