"""Kinds of methods and models that a compiled step has to take as they are, with torch's compiler at work."""

from __future__ import annotations

import pytest
import torch
from tests.test_engines import OPTIMIZERS, compare, whole
from torch import nn

import forwardgrad as fg


def wide() -> nn.Module:
    """As the paper's network, with products large enough for the compiler to join them with what is added to them."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 3))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("feedback", [True, False], ids=["feedback", "derivative"])
def test_local_losses_are_compiled_as_they_are_written(feedback: bool, optimizer: str) -> None:
    compare(wide, fg.LocalLosses(feedback=feedback), OPTIMIZERS[optimizer], run=whole, graphs=1)
