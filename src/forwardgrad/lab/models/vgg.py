"""Plain chains of 3×3 convolutions with batch norm, after Simonyan and Zisserman (2015) and Nøkland and Eidnes (2019).

name  | layers, with a pool of 2×2 where P stands                                                | parameters (CIFAR-10)
vgg8b | 128 256 P 256 512 P 512 P 512 P, then 1024 dense units                                   | 8,900,234
vgg16 | 64 64 P 128 128 P 3 × 256 P 3 × 512 P 3 × 512 P: configuration D, 13 convolutions         | 14,724,042
vgg19 | 64 64 P 128 128 P 4 × 256 P 4 × 512 P 4 × 512 P: configuration E, 16 convolutions         | 20,035,018

Every convolution pads by 1. Batch norm and ReLU follow each, and the dense units of vgg8b, so these layers have no bias. A linear
classifier ends each network: vgg16 and vgg19 are made for 32×32 pixels, and have no further dense layers as those for 224×224 have.
There is no dropout. Weights start as PyTorch draws them.
"""

from __future__ import annotations

from torch import nn

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import Family

POOL = 0
LAYERS: dict[str, tuple[int, ...]] = {
    "vgg8b": (128, 256, POOL, 256, 512, POOL, 512, POOL, 512, POOL),
    "vgg16": (64, 64, POOL, 128, 128, POOL, *[256] * 3, POOL, *[512] * 3, POOL, *[512] * 3, POOL),
    "vgg19": (64, 64, POOL, 128, 128, POOL, *[256] * 4, POOL, *[512] * 4, POOL, *[512] * 4, POOL),
}
DENSE = {"vgg8b": 1024}  # units between the convolutions and the classifier


def vgg(family: Family, shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """The network of a family, its widths multiplied by the family's factor."""
    channels, height, width = shape
    layers: list[nn.Module] = []
    for size in LAYERS[family.name]:
        if size == POOL:
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        else:
            layers += [nn.Conv2d(channels, family.wide(size), 3, padding=1, bias=False), nn.BatchNorm2d(family.wide(size)), nn.ReLU()]
            channels = family.wide(size)
    if height < 1 or width < 1:
        smallest = 2 ** LAYERS[family.name].count(POOL)
        raise UserError(f"the model {family.name} needs images of {smallest} × {smallest} at least, not {shape[1]} × {shape[2]}")
    layers.append(nn.Flatten())
    units = channels * height * width
    if family.name in DENSE:
        dense = family.wide(DENSE[family.name])
        layers += [nn.Linear(units, dense, bias=False), nn.BatchNorm1d(dense), nn.ReLU()]
        units = dense
    return nn.Sequential(*layers, nn.Linear(units, classes))
