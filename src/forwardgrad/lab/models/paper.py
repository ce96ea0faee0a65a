"""The networks of the paper, exactly: PyTorch's default initialisation, ReLU, no normalisation, no dropout.

name       | layers                                                                              | parameters
logistic   | inputs-10                                                                           | 7,850 (MNIST)
mlp        | inputs-64-10, for the embedded digits                                               | 4,810 (digits)
nn         | inputs-1024-1024-10                                                                 | 1,863,690 (MNIST)
cnn        | 2 × conv3x3(64), pool, 2 × conv3x3(64), pool, 1024, 10; no padding: 28→26→24→12→10→8→4 | 1,171,274 (MNIST)
cifar-cnn  | three blocks of 2 × conv3x3 (padding 1) and pool with 64, 128, 256 channels, 4096, 10 | 17,967,690 (CIFAR-10)
"""

from __future__ import annotations

import math

from torch import nn

from forwardgrad.lab.errors import UserError


def build(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The paper's network `name` for images of `shape` (channels, height, width)."""
    if name == "logistic":
        return _dense(shape, (), classes)
    if name == "mlp":
        return _dense(shape, (64,), classes)
    if name == "nn":
        return _dense(shape, (1024, 1024), classes)
    if name == "cnn":
        return _convolutional(name, shape, widths=(64, 64), padding=0, dense=1024, classes=classes)
    if name == "cifar-cnn":
        return _convolutional(name, shape, widths=(64, 128, 256), padding=1, dense=4096, classes=classes)
    raise UserError(f"unknown model {name!r}: choose one of logistic, mlp, nn, cnn, cifar-cnn")


def _dense(shape: tuple[int, int, int], hidden: tuple[int, ...], classes: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    width = math.prod(shape)
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, classes))


def _convolutional(
    name: str, shape: tuple[int, int, int], *, widths: tuple[int, ...], padding: int, dense: int, classes: int
) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels, height, width = shape
    for size in widths:
        for _ in range(2):
            layers += [nn.Conv2d(channels, size, 3, padding=padding), nn.ReLU()]
            channels, height, width = size, height - 2 + 2 * padding, width - 2 + 2 * padding
        layers.append(nn.MaxPool2d(2))
        height, width = height // 2, width // 2
    if height < 1 or width < 1:
        raise UserError(f"the model {name} needs larger images than {shape[1]} × {shape[2]}: use mnist or cifar10, or another model")
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, dense), nn.ReLU(), nn.Linear(dense, classes))
