"""What a step is timed on: a network, a batch and an order in memory. They are the same for all arms."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.training import models

Layout = Literal["fastest", "contiguous", "channels-last"]
Sweep = Literal["depth", "width", "batch"]
INPUTS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "logistic": ("mnist", (1, 28, 28)),
    "mlp": ("digits", (1, 8, 8)),
    "nn": ("mnist", (1, 28, 28)),
    "cnn": ("mnist", (1, 28, 28)),
    "cifar-cnn": ("cifar10", (3, 32, 32)),
}
MLP = re.compile(r"mlp-([1-9]\d{0,3})x([1-9]\d{0,4})")  # layers with weights × units
CLASSES = 10
PAPER = "nn,cnn,cifar-cnn"
DEPTHS, WIDTHS, BATCHES = (2, 4, 8, 16, 32, 64), (64, 256, 1024, 4096), (1, 4, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class BenchCase:
    """One network at one batch size; `layout` is the order in memory of images and convolutions."""

    model: str
    batch: int
    layout: Layout = "fastest"

    def __post_init__(self) -> None:
        if self.model not in INPUTS and not MLP.fullmatch(self.model):
            raise UserError(f"unknown model {self.model!r}: choose from {', '.join(INPUTS)}, or mlp-LAYERSxWIDTH such as mlp-64x1024")

    @property
    def data(self) -> str:
        return INPUTS[self.model][0] if self.model in INPUTS else "mnist"


def chosen_cases(names: str | None, batches: str, sweep: Sweep | None, layout: Layout) -> list[BenchCase]:
    """The cases that a command asks for. A sweep takes the place of the option that it varies."""
    if names is not None and sweep in ("depth", "width"):
        raise UserError(f"--sweep {sweep} has its own networks: leave --models out")
    chosen = {"depth": [f"mlp-{depth}x1024" for depth in DEPTHS], "width": [f"mlp-3x{width}" for width in WIDTHS]}
    networks = chosen.get(sweep or "") or _words(names or ("nn" if sweep == "batch" else PAPER))
    sizes = list(BATCHES) if sweep == "batch" else [_size(word) for word in _words(batches)]
    return [BenchCase(network, size, layout) for network in networks for size in sizes]


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",")))


def _size(word: str) -> int:
    if not word.isdecimal() or not 1 <= int(word) <= 1_000_000:
        raise UserError(f"--batch-size takes whole numbers from 1 to 1,000,000 separated by commas, not {word!r}")
    return int(word)


@dataclass(frozen=True)
class BuiltCase:
    """A case that is ready to be timed: its network, and a batch of images and labels."""

    case: BenchCase
    model: nn.Module
    images: Tensor
    labels: Tensor

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def build_case(case: BenchCase, on: torch.device) -> BuiltCase:
    """The network with its weights at their start, and a batch of random images with random labels.

    All are drawn from the global generator.
    """
    shape = INPUTS[case.model][1] if case.model in INPUTS else INPUTS["nn"][1]
    found = MLP.fullmatch(case.model)
    model = _mlp(shape, int(found[1]), int(found[2])) if found else models.build(case.model, shape, CLASSES)
    model, images = model.to(on), torch.rand(case.batch, *shape, device=on)
    if case.layout == "channels-last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    return BuiltCase(case, model, images, torch.randint(CLASSES, (case.batch,), device=on))


def _mlp(shape: tuple[int, int, int], depth: int, width: int) -> nn.Sequential:
    """An MLP with He's initialisation.

    With PyTorch's own the errors shrink from layer to layer, until an arm computes with denormal numbers, which are slow.
    """
    sizes = [math.prod(shape), *[width] * (depth - 1), CLASSES]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def layouts(case: BenchCase, on: torch.device) -> Sequence[BenchCase]:
    """The case in every order in memory that it leaves open. A network without convolutions has one order alone."""
    if case.layout != "fastest":
        return [case]
    convolves = any(p.dim() == 4 for p in build_case(case, torch.device("meta")).model.parameters())
    options: tuple[Layout, ...] = ("contiguous", "channels-last") if convolves else ("contiguous",)
    return [dataclasses.replace(case, layout=layout) for layout in options]
