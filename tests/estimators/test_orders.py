"""Losses that have scores and targets in another order than the model has them in: against backpropagation of each block's own loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import Loss, seeded, trained
from torch import Tensor, nn

import forwardgrad as fg

TEXTS, LENGTH, WORDS, WIDTH = 3, 3, 7, 4  # a square, so that no size tells texts from their words
TOKENS = torch.randint(WORDS, (TEXTS, LENGTH), generator=seeded(1))
TARGETS = torch.randint(WORDS, (TEXTS, LENGTH), generator=seeded(2))
TARGETS[0, 1] = -100
State = dict[str, Tensor]
End = Callable[[Tensor], Tensor]


class Tagger(nn.Module):
    """Layers that see what came before, with texts first, words first, or both as rows; `begin`, `back` go there and back again."""

    def __init__(self, order: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = order in ("texts", "rows of texts")
        self.flat = order.startswith("rows")
        self.words, self.hidden, self.outer, self.readout = (
            nn.Embedding(WORDS, WIDTH),
            nn.Linear(WIDTH, 5),
            nn.Linear(5, WIDTH),
            nn.Linear(WIDTH, WORDS),
        )
        self.double()

    def begin(self, t: Tensor) -> Tensor:
        t = t if self.first else t.transpose(0, 1)
        return t.flatten(0, 1) if self.flat else t

    def back(self, t: Tensor) -> Tensor:
        t = t.unflatten(0, (TEXTS, LENGTH) if self.first else (LENGTH, TEXTS)) if self.flat else t
        return t if self.first else t.transpose(0, 1)

    def forward(self, tokens: Tensor, end: End = lambda h: h) -> Tensor:
        h = end(self.hidden(end(self.words(self.begin(tokens))))).tanh()
        h = self.begin(self.back(h).cumsum(1))
        return self.readout(end(self.outer(h)).tanh())


WAYS: dict[str, Callable[[Tensor], Tensor]] = {  # of scores [texts, words of a text, words]
    "rows of texts": lambda s: F.cross_entropy(s.flatten(0, 1), TARGETS.flatten()),
    "rows of words": lambda s: F.cross_entropy(s.transpose(0, 1).flatten(0, 1), TARGETS.T.flatten()),
    "texts first": lambda s: F.cross_entropy(s.transpose(1, 2), TARGETS),
    "words first": lambda s: F.cross_entropy(s.permute(1, 2, 0), TARGETS.T),
}
TERMS: dict[str, Callable[[Tensor], Any]] = {  # of scores as the model has them
    "alone": lambda s: 0.0,
    "with scores squared": lambda s: 0.05 * s.logsumexp(-1).square().mean(),
}

UNTOLD = {  # rows whose order no size tells: where the loss goes on with other rows, or has a term of its own
    (order, way, term)
    for order, other in (("rows of texts", "rows of words"), ("rows of words", "rows of texts"))
    for way in WAYS
    for term in TERMS
    if way == other or (term != "alone" and way != order)
}


def blocks_of(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], own: Callable[[Tensor], Tensor], state: State) -> State:
    """Gradients of the loss of every block's classifier and of the model's, with nothing that crosses the end of a block."""
    parts: list[Tensor] = []

    def end(h: Tensor) -> Tensor:
        weight, bias = (state[f"head.{len(parts)}.{name}"] for name in ("weight", "bias"))
        parts.append(own(h @ weight.T + bias))
        return h.detach()

    total = loss(model(x, end)) + torch.stack(parts).sum()
    return dict(zip(trained(model), torch.autograd.grad(total, list(trained(model).values())), strict=True))


def learned(loss: Loss, model: nn.Module, method: Callable[[float], fg.Estimator]) -> tuple[State, State]:
    """The state after six steps in which classifiers learn and four in which feedback follows, and the last estimate."""
    state: State = {}
    for seed in range(10):
        model.zero_grad()
        fg.estimate_grad_(loss, model, method(0.1 if seed < 6 else 1e-12), generator=seeded(seed), state=state)
    return state, {name: p.grad for name, p in trained(model).items() if p.grad is not None}


@pytest.mark.some(12)
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", ["texts", "words", "rows of texts", "rows of words"])
def test_blocks_learn_the_targets_of_their_own_positions_or_say_that_they_cannot(order: str, way: str, term: str) -> None:
    model = Tagger(order)

    def of_scores(s: Tensor) -> Tensor:
        return WAYS[way](model.back(s)) + TERMS[term](s)

    if (order, way, term) in UNTOLD:
        with pytest.raises(ValueError, match="LocalLosses needs"):
            learned(lambda m: of_scores(m(TOKENS)), model, lambda rate: fg.LocalLosses(feedback=True, head_rate=rate))
        return
    state, found = learned(lambda m: of_scores(m(TOKENS)), model, lambda rate: fg.LocalLosses(feedback=True, head_rate=rate))
    exact = blocks_of(model, TOKENS, of_scores, lambda s: WAYS[way](model.back(s)), state)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-8)


class Painter(nn.Module):
    """Labels every pixel; `turned` exchanges rows and columns between two layers."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.turned = turned
        self.first, self.second, self.readout = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, WORDS, 1)
        self.double()

    def forward(self, x: Tensor, end: End = lambda h: h) -> Tensor:
        h = end(self.first(x)).tanh()
        h = end(self.second(h.transpose(2, 3) if self.turned else h)).tanh()
        return self.readout(h.transpose(2, 3) if self.turned else h)


IMAGES = torch.randn(3, 2, 2, 4, generator=seeded(3), dtype=torch.float64)
PIXELS = torch.randint(WORDS, (3, 2, 4), generator=seeded(4))
ALIKE: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda s: F.cross_entropy(s, PIXELS),
    "in a row": lambda s: F.cross_entropy(s.flatten(2), PIXELS.flatten(1)),
    "as rows": lambda s: F.cross_entropy(s.permute(0, 2, 3, 1).flatten(0, 2), PIXELS.flatten()),
    "images last": lambda s: F.cross_entropy(s.permute(2, 3, 0, 1).flatten(0, 2), PIXELS.permute(1, 2, 0).flatten()),
    "with scores squared": lambda s: F.cross_entropy(s.flatten(2), PIXELS.flatten(1)) + 0.1 * s.logsumexp(1).square().mean(),
}
OTHERWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "turned": lambda s: F.cross_entropy(s.transpose(2, 3), PIXELS.transpose(1, 2)),
    "turned rows": lambda s: F.cross_entropy(s.permute(0, 3, 2, 1).flatten(0, 2), PIXELS.transpose(1, 2).flatten()),
    "mirrored": lambda s: F.cross_entropy(s.flip(2), PIXELS.flip(1)),
}


@pytest.mark.parametrize("name", ALIKE)
def test_blocks_of_images_learn_the_targets_of_their_own_pixels(name: str) -> None:
    model, loss = Painter(), ALIKE[name]
    state, found = learned(lambda m: loss(m(IMAGES)), model, lambda rate: fg.LocalLosses(feedback=True, head_rate=rate))

    def own(scores: Tensor) -> Tensor:
        return F.cross_entropy(scores.movedim(-1, 1), PIXELS)

    parts: list[Tensor] = []

    def end(h: Tensor) -> Tensor:
        parts.append(own(h.movedim(1, -1) @ state[f"head.{len(parts)}.weight"].T + state[f"head.{len(parts)}.bias"]))
        return h.detach()

    total = loss(model(IMAGES, end)) + torch.stack(parts).sum()
    exact = dict(zip(trained(model), torch.autograd.grad(total, list(trained(model).values())), strict=True))
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", [*OTHERWISE, "inside"])
def test_positions_in_another_order_than_the_targets_are_told(name: str) -> None:
    model, loss = Painter(name == "inside"), OTHERWISE.get(name, ALIKE["as they are"])
    state: State = {}
    for _ in range(2):  # the second step would let blocks learn ahead of the loss
        with pytest.raises(ValueError, match="lie in another order than the targets"):
            fg.estimate_grad_(lambda m: loss(m(IMAGES)), model, fg.LocalLosses(feedback=True), generator=seeded(), state=state)


@pytest.mark.full
def test_feedback_of_layers_in_another_order_goes_by_the_derivative() -> None:
    """The read-out is exact; of 4,000 directions the rest is within a tenth of backpropagation's gradient, at 4.7 standard errors."""
    for turned, loss in ((True, ALIKE["as they are"]), (False, OTHERWISE["turned"])):
        model = Painter(turned)
        exact = dict(zip(trained(model), torch.autograd.grad(loss(model(IMAGES)), list(trained(model).values())), strict=True))
        fg.estimate_grad_(lambda m, loss=loss: loss(m(IMAGES)), model, fg.LearnedFeedback(tangents=4000), generator=seeded(), state={})
        torch.testing.assert_close(model.readout.weight.grad, exact["readout.weight"])
        found = model.second.weight.grad
        assert found is not None
        assert (found - exact["second.weight"]).norm() < 0.3 * exact["second.weight"].norm()


@pytest.mark.parametrize("method", [fg.LearnedFeedback(), fg.FixedFeedback(), fg.LocalLosses(feedback=True)], ids=lambda m: m.name)
def test_a_further_term_whose_error_is_not_known_is_refused(method: fg.Estimator) -> None:
    """3,600 numbers are too many for a forward derivative each."""
    x, y = torch.randn(600, 2, generator=seeded(5), dtype=torch.float64), torch.arange(600) % 6
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 6)).double()

    def loss(m: nn.Module) -> Tensor:
        scores = m(x)
        return F.cross_entropy(scores, y) + 0.1 * scores.logsumexp(1).square().mean()

    with pytest.raises(ValueError, match="a further term that may use that output"):
        fg.estimate_grad_(loss, model, method, generator=seeded(), state={})


def test_a_square_batch_with_words_first_learns_in_whole_steps_as_it_is_estimated() -> None:
    """Texts and their words are as many, so sizes do not tell that the labels have words first."""
    model, state = Tagger("words"), {}

    def loss(m: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(m(tokens).transpose(1, 2), targets)

    step = fg.TrainingStep(
        loss, model, torch.optim.SGD(model.parameters(), lr=0.0), fg.LocalLosses(feedback=True), generator=seeded(), state=state
    )
    other, again = Tagger("words"), {}
    for seed in range(3):
        step(TOKENS, TARGETS.T.contiguous())
        other.zero_grad()
        fg.estimate_grad_(lambda m: loss(m, TOKENS, TARGETS.T), other, fg.LocalLosses(feedback=True), generator=seeded(seed), state=again)
    heads = [key for key in state if key.startswith("head.") and key.endswith("weight")]
    assert heads
    torch.testing.assert_close({key: state[key] for key in heads}, {key: again[key] for key in heads}, rtol=1e-9, atol=1e-12)
