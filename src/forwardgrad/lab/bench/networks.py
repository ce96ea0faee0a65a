"""The benchmark's own networks, of any depth and width: MLPs and VGG-like chains of convolutions."""

from __future__ import annotations

import math
import re
from itertools import pairwise

from torch import nn

MLP = re.compile(r"mlp-([1-9]\d{0,3})x([1-9]\d{0,4})")  # layers with weights × units
VGG = re.compile(r"vgg-([1-9]\d{0,2})x([1-9]\d{0,3})")  # convolutions × channels
QUARTERS = 4  # parts of a VGG, each with a pool behind it


def is_vgg(name: str) -> bool:
    """Whether it is the name of a VGG whose convolutions can be parted into quarters."""
    found = VGG.fullmatch(name)
    return found is not None and int(found[1]) % QUARTERS == 0


def of_own_shape(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module | None:
    """The network that such a name describes; None for any other name."""
    if found := MLP.fullmatch(name):
        return _mlp(shape, int(found[1]), int(found[2]), classes)
    if is_vgg(name) and (found := VGG.fullmatch(name)):
        return _vgg(shape, int(found[1]), int(found[2]), classes)
    return None


def _mlp(shape: tuple[int, int, int], depth: int, width: int, classes: int) -> nn.Sequential:
    """An MLP with He's initialisation.

    With PyTorch's own the errors shrink from layer to layer, until an arm computes with denormal numbers, which are slow.
    """
    sizes = [math.prod(shape), *[width] * (depth - 1), classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _vgg(shape: tuple[int, int, int], depth: int, width: int, classes: int) -> nn.Sequential:
    """Convolutions of 3 × 3 of one width, each with batch norm and ReLU, a pool after every quarter of them, and one linear layer."""
    layers: list[nn.Module] = []
    channels, height, across = shape
    for index in range(depth):
        convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
        if (index + 1) % (depth // QUARTERS) == 0:
            layers.append(nn.MaxPool2d(2))
            height, across = height // 2, across // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * height * across, classes))
