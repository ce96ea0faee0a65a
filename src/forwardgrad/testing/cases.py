"""Models and losses that an estimator is checked on: small, and with the same weights at every call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Case:
    """A model and its loss, made by `make`, which is called under a fixed seed.

    Args:
        name: what messages call it.
        make: returns the model and its loss, a function of the model.
        random: whether the forward pass draws from the global generator, as dropout does.
        exact: whether the model is to be converted to float64, where tight tolerances hold.
        output: what is known of a loss that ends in F.cross_entropy: "labels", one class index an example, and the output of the model's
            last layer as it is; "reshaped", that output in another shape; "single", that of one example without a batch; None for other
            losses.
    """

    name: str
    make: Callable[[], tuple[nn.Module, Loss]]
    random: bool = False
    exact: bool = True
    output: str | None = None

    def build(self, device: str = "cpu") -> tuple[nn.Module, Loss]:
        """A fresh model and its loss; on another device than the processor, what `make` makes is made there."""
        with torch.random.fork_rng(devices=gpus(device)), torch.device(device) if gpus(device) else nullcontext():
            torch.manual_seed(2022)
            model, loss = self.make()
        return (model.double() if self.exact else model), loss

    def __str__(self) -> str:
        return self.name


def gpus(device: str) -> list[torch.device]:
    """The GPU that a device's name names, if it names one."""
    return [torch.device(device)] if device.startswith("cuda") else []


def _rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers that look random and are the same on every device."""
    return (3.7 * torch.arange(1, torch.Size(shape).numel() + 1, dtype=dtype)).sin().reshape(shape)


def _classify(x: Tensor, classes: int = 3) -> Loss:
    labels = torch.arange(len(x), device=x.device) % classes
    return lambda model: F.cross_entropy(model(x), labels)


def _perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def _convolutional() -> tuple[nn.Module, Loss]:
    layers = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers), _classify(_rows(3, 1, 6, 6))


def _normalised() -> tuple[nn.Module, Loss]:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)), _classify(_rows(6, 4))


def _dropout() -> tuple[nn.Module, Loss]:
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 3)), _classify(_rows(6, 4))


def _frozen() -> tuple[nn.Module, Loss]:
    model = _perceptron()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model, _classify(_rows(6, 4))


class _Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.second(self.first(x).tanh()).tanh())
        return found


CASES: tuple[Case, ...] = (
    Case("mlp", lambda: (_perceptron(), _classify(_rows(6, 4))), output="labels"),
    Case("cnn", _convolutional, output="labels"),
    Case("tied weights", lambda: (_Tied(), _classify(_rows(6, 4))), output="labels"),
    Case("frozen weights", _frozen, output="labels"),
    Case("batch norm", _normalised, output="labels"),
    Case("dropout", _dropout, random=True, output="labels"),
    Case("float32", lambda: (_perceptron(), _classify(_rows(6, 4, dtype=torch.float32))), exact=False, output="labels"),
)
"""What `check_estimator` looks at where no other cases are given."""
