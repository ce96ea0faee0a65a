"""Lengths of parameters: against a plain sum in float64, whatever their shapes and order in memory."""

import math

import pytest
import torch
from torch import Tensor

from forwardgrad.lab.training import norms


def length(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_walk_is_what_plain_sums_say(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(norms, "PIECE", 7)  # several pieces a tensor, the last one cut
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (20,), (), (0,), (2, 3, 4, 5)]
    before = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    before[-1] = before[-1].contiguous(memory_format=torch.channels_last)
    after = [(b + 1e-3 * torch.randn(b.shape, generator=generator, dtype=dtype)).requires_grad_() for b in before]
    way = [a.detach().double() - b.double() for a, b in zip(after, before, strict=True)]
    assert norms.walked(before, after) == pytest.approx((length(before), length(after), length(way)), rel=1e-6)
    assert norms.walked(before, after)[:2] == pytest.approx((norms.norm(before), norms.norm(after)), rel=1e-14)


def test_no_way_and_no_number() -> None:
    still = [torch.ones(3), torch.zeros(2)]
    assert norms.walked(still, still) == (math.sqrt(3), math.sqrt(3), 0.0)
    assert math.isinf(norms.walked(still, [torch.full((3,), math.inf), torch.zeros(2)])[1])
