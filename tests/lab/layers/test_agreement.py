"""The angle of an estimate with the gradient, layer by layer, against gradients that are known."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.lab.layers.agreement import cosines, learn

NAMES = ["0", "2", "4"]


def case(dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    return model, torch.randn(8, 6, dtype=dtype), torch.arange(8) % 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_gradient_lies_along_itself_and_an_estimate_where_its_directions_do() -> None:
    """The forward gradient is d·v: in every layer its cosine is that of v, drawn again here, with the gradient of that layer."""
    model, x, y = case()

    def loss(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(x), y)

    assert cosines(loss, model, NAMES, fg.Backprop(), generator(), {}) == pytest.approx([1, 1, 1])
    found = cosines(loss, model, NAMES, fg.ForwardGradient(), generator(3), {})
    exact, twin = copy.deepcopy(model), copy.deepcopy(model)
    loss(exact).backward()  # type: ignore[no-untyped-call]
    fg.estimate_grad_(loss, twin, fg.ForwardGradient(), generator=generator(3))
    for layer, cosine in zip((0, 2, 4), found, strict=True):
        one, other = (torch.cat([p.grad.flatten() for p in m[layer].parameters()]) for m in (exact, twin))  # type: ignore[union-attr]
        assert cosine == pytest.approx(float(F.cosine_similarity(one, other, dim=0)), rel=1e-12)


def test_local_losses_give_the_last_layer_its_gradient_and_no_other() -> None:
    model, x, y = case()

    def loss(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(x), y)

    estimator = fg.LocalLosses(feedback=True)
    memory = learn([loss], 50, model, estimator, generator())
    before = {name: kept.clone() for name, kept in memory.items()}
    first, second, last = cosines(loss, model, NAMES, estimator, generator(), memory)
    assert last == pytest.approx(1)
    assert first is not None
    assert second is not None
    assert max(abs(first), abs(second)) < 0.9999
    assert all(torch.equal(kept, before[name]) for name, kept in memory.items())
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_the_same_in_both_and_the_global_state_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.Dropout(0.5), nn.Linear(40, 3)).double()
    _, x, y = case()
    before = torch.get_rng_state()
    found = cosines(lambda m: F.cross_entropy(m(x), y), model, ["0", "2"], fg.Backprop(checkpoint=True), generator(), {})
    assert found == pytest.approx([1, 1])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_layer_without_gradient_has_no_angle() -> None:
    model, x, y = case()
    with torch.no_grad():
        model[4].weight.zero_()  # nothing passes back through it

    def loss(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(x), y)

    first, second, last = cosines(loss, model, NAMES, fg.ForwardGradient(), generator(), {})
    assert (first, second) == (None, None)
    assert last is not None
    for p in model[0].parameters():
        p.requires_grad_(False)
    assert cosines(loss, model, NAMES, fg.Backprop(), generator(), {})[0] is None
