"""A read-out over a vocabulary and its loss, a few rows at a time: derivatives of the whole, in the memory of a part."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import seeded, true_gradient
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.diagnostics import peak_bytes

if not hasattr(nn, "LinearCrossEntropyOptions"):
    pytest.skip("this torch has no loss in parts: install torch 2.13 or newer", allow_module_level=True)
ROWS, WIDTH, WORDS = 10, 4, 7
X = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(ROWS) % WORDS
SOME = LABELS.clone().index_fill(0, torch.tensor([2, 7]), -100)
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "each": {"reduction": "none"},
    "classes with weights": {"weight": torch.arange(1.0, WORDS + 1, dtype=torch.float64)},
    "another label left out": {"ignore_index": 3},
}


class ReadOut(nn.Module):
    def __init__(self, size: int | None, how: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last, self.how = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS), how
        self.parts = None if size is None else nn.LinearCrossEntropyOptions(batch_chunk_size=size)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h, target = torch.tanh(self.first(x)), LABELS if "ignore_index" in self.how else SOME
        bias = self.last.bias
        return F.linear_cross_entropy(h, self.last.weight, target, linear_bias=bias, options=self.parts, **self.how)


def loss(model: nn.Module) -> Tensor:
    each: Tensor = model(X)
    return (each * torch.arange(1.0, each.numel() + 1, dtype=each.dtype).view(each.shape)).sum()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_low_rank_moves_a_read_out_along_one_direction_in_all_parts(name: str, plain: bool) -> None:
    """ĝ = d·v and d = ∇f·v say that ∇f·ĝ = d², which directions of their own in every part would not; ∇f is backpropagation's."""
    exact = true_gradient(ReadOut(3, OPTIONS[name]), loss)
    found = []
    for size in (3, None):  # in parts, and whole
        for estimator in (
            fg.ForwardGradient(perturb=fg.LowRank(1)),
            fg.ForwardGradient(perturb=fg.SplitWeights(2, fg.LowRank(1)), tangents=2),
        ):
            model = ReadOut(size, OPTIONS[name])
            with fg.plainly() if plain else nullcontext():
                record = fg.estimate_grad_(loss, model, estimator, generator=seeded(2))
            products = sum((exact[key] * p.grad).sum() for key, p in model.named_parameters() if p.grad is not None)
            torch.testing.assert_close(products, record.derivatives.square().sum(), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(record.loss, loss(model).detach(), rtol=1e-12, atol=1e-12)
        found.append(record.derivatives)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_differences_see_the_same_direction() -> None:
    exact = true_gradient(ReadOut(3, {}), loss)
    model = ReadOut(3, {})
    record = fg.estimate_grad_(loss, model, fg.ZerothOrder(perturb=fg.LowRank(), epsilon=1e-5), generator=seeded(2))
    products = sum((exact[key] * p.grad).sum() for key, p in model.named_parameters() if p.grad is not None)
    torch.testing.assert_close(products, record.derivatives.square().sum(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "estimator", [fg.ForwardGradient(perturb=fg.LowRank(1)), fg.ZerothOrder(perturb=fg.LowRank())], ids=["forward", "zeroth"]
)
def test_no_more_scores_are_there_than_those_of_a_part(estimator: fg.Estimator) -> None:
    """256 rows of 4,096 words are 4.2 MB of scores. A part of 8 rows, its tangents and what the loss makes of them are 0.6 MB at most."""
    torch.manual_seed(0)
    model, x, labels = nn.Linear(8, 4096, bias=False), torch.randn(256, 8), torch.randint(4096, (256,))
    parts = nn.LinearCrossEntropyOptions(batch_chunk_size=8)

    def of(m: nn.Linear) -> Tensor:
        return F.linear_cross_entropy(x, m.weight, labels, options=parts)

    step = fg.TrainingStep(lambda m: of(m), model, torch.optim.SGD(model.parameters(), lr=0.1), estimator, generator=seeded(0))
    step()
    assert peak_bytes(step, [x.device]) < 1_000_000


def test_one_probability_a_class_and_smoothed_labels() -> None:
    """What torch does not make in parts is made in parts along a direction all the same, or not at all, and has the same derivative."""
    shares = torch.rand(ROWS, WORDS, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).softmax(1)
    for target, how in ((shares, {}), (LABELS, {"label_smoothing": 0.25})):

        def of(m: nn.Linear, target: Tensor = target, how: dict[str, Any] = how) -> Tensor:
            return F.linear_cross_entropy(
                X, m.weight, target, linear_bias=m.bias, options=nn.LinearCrossEntropyOptions(batch_chunk_size=4), **how
            )

        torch.manual_seed(1)
        model = nn.Linear(WIDTH, WORDS).double()
        exact = torch.autograd.grad(F.cross_entropy(model(X), target, **how), list(model.parameters()))  # type: ignore[arg-type]
        record = fg.estimate_grad_(of, model, fg.ForwardGradient(perturb=fg.LowRank(1)), generator=seeded(2))
        products = sum((g * p.grad).sum() for g, p in zip(exact, model.parameters(), strict=True) if p.grad is not None)
        torch.testing.assert_close(products, record.derivatives.square().sum(), rtol=1e-9, atol=1e-12)
