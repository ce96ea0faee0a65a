"""What a step holds while it runs, in bytes of tensors that operators returned, beside what backpropagation holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import rows, seeded, trained
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.diagnostics import peak_bytes

BLOCKS = 8
Optimizers = Callable[[nn.Module], torch.optim.Optimizer]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 1e-3)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 1e-3)


def chain(width: int) -> nn.Sequential:
    """Blocks of two layers, and a classifier."""
    torch.manual_seed(0)
    layers = [layer for _ in range(2 * BLOCKS) for layer in (nn.Linear(width, width, bias=False), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(width, 3)).double()


def peak(method: fg.Estimator, width: int, examples: int, optimizer: Optimizers) -> int:
    """The most that a step holds above model, optimizer and state, once the path of calls is known."""
    model, x, y = chain(width), rows(examples, width), torch.arange(examples) % 3

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m(x), y)

    step = fg.TrainingStep(loss, model, optimizer(model), method, generator=seeded(), state={})
    for _ in range(2):
        step(x, y)
    return peak_bytes(lambda: step(x, y), [torch.device("cpu")])


ENDS = tuple(f"{4 * block + 2}.weight" for block in range(BLOCKS))
LOCAL = fg.LocalLosses(feedback=True, ends=ENDS)
KEEPING = [fg.LearnedFeedback(), fg.LearnedFeedback(tangents=2, use="control-variate"), fg.ForwardGradient(perturb=fg.Activity()), LOCAL]


@pytest.mark.parametrize("method", KEEPING, ids=["feedback", "control variate", "activity", "local"])
def test_of_activations_no_more_than_the_inputs_of_layers_are_held(method: fg.Estimator) -> None:
    """Sixteen layers of 16 × 16 on 1,024 rows, so that weights are small: an activation is 131 kB, and each layer is given one.

    Its output, how that moved and what moved there are gone by the end of the pass; with a tangent each of them is one activation more.
    """
    activation, layers = 1024 * 16 * 8, 2 * BLOCKS
    ends = 2 * BLOCKS if method is LOCAL else 0  # values and moves at the ends of blocks wait for the loss, too
    assert peak(method, 16, 1024, sgd) / activation < layers + ends + 10  # ten of the call under way and of the layer that learns


def test_feedback_holds_less_than_backpropagation() -> None:
    """GELU and the layer behind it keep two numbers a unit for a backward pass."""
    assert peak(fg.LearnedFeedback(), 16, 1024, sgd) < 0.8 * peak(fg.Backprop(), 16, 1024, sgd)


@pytest.mark.parametrize("optimizer", [sgd, adam], ids=["sgd", "adam"])
def test_local_losses_never_hold_the_gradient_of_the_model(optimizer: Optimizers) -> None:
    """Sixteen layers of 128 × 128 on 4 rows, so that activations are small: a weight is 131 kB, and so is its gradient."""
    weight = 128 * 128 * 8
    assert peak(LOCAL, 128, 4, optimizer) < 7 * weight  # a block's two gradients, two tensors of Adam's, and what layers were given
    assert peak(fg.Backprop(), 128, 4, optimizer) > 2 * BLOCKS * weight


@pytest.mark.parametrize("optimizer", [sgd, adam], ids=["sgd", "adam"])
def test_a_weight_of_several_blocks_moves_once_along_its_whole_gradient(optimizer: Optimizers) -> None:
    """The step of a model that uses one layer in every block, beside the gradient and the optimizer's step one after the other."""
    x, y = rows(12, 6), torch.arange(12) % 3

    def made() -> nn.Module:
        torch.manual_seed(0)
        return Shared().double()

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m(x), y)

    method = fg.LocalLosses(feedback=True, ends=("own.*.weight",))
    model, other = made(), made()
    step = fg.TrainingStep(loss, model, optimizer(model), method, generator=seeded(), state={})
    move, generator, state = optimizer(other), seeded(), dict[str, Any]()
    for _ in range(4):
        step(x, y)
        move.zero_grad()
        fg.estimate_grad_(lambda m: loss(m, x, y), other, method, generator=generator, state=state)
        move.step()
    torch.testing.assert_close(trained(model), trained(other), rtol=0, atol=0)
    assert {name for name, p in trained(other).items() if p.grad is None} == set()


class Shared(nn.Module):
    """Blocks of a layer that all of them share and one of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.out = nn.Linear(6, 6), nn.Linear(6, 3)
        self.own = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for own in self.own:
            x = own(self.shared(x).tanh()).tanh()
        return self.out(x)  # type: ignore[no-any-return]
