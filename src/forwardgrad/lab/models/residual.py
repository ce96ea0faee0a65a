"""The residual networks for CIFAR of He, Zhang, Ren and Sun, "Deep residual learning" (2016), section 4.2.

A 3×3 convolution to 16 channels, three stages of n basic blocks with 16, 32 and 64 channels, the mean over all positions, a linear
classifier: 6n + 2 layers with weights. A stage after the first begins with stride 2. Batch norm follows every convolution. Convolutions
have no bias.

Shortcuts are option A, as in the paper's networks for CIFAR: the identity, and where a stage begins every second position with zeros for
the channels that are new. So a shortcut has no weights. resnet20 has 269,722 parameters, as the paper's 0.27 million.
Weights start as PyTorch draws them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forwardgrad.lab.studies import Family

CHANNELS = (16, 32, 64)


class Shortcut(nn.Module):
    """The identity, or every `stride`-th position followed by `new` channels of zeros."""

    def __init__(self, new: int, stride: int) -> None:
        super().__init__()
        self.new, self.stride = new, stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return torch.cat([x, x.new_zeros(len(x), self.new, *x.shape[2:])], 1) if self.new else x


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut: ReLU(norm(conv(ReLU(norm(conv(x))))) + shortcut(x))."""

    def __init__(self, channels: int, size: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, size, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(size)
        self.conv2 = nn.Conv2d(size, size, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(size)
        self.shortcut = Shortcut(size - channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


def residual(family: Family, shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """The network of 6n + 2 layers, its channels multiplied by the family's factor."""
    first, blocks = family.wide(CHANNELS[0]), (family.depth - 2) // 6
    layers: list[nn.Module] = [nn.Conv2d(shape[0], first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU()]
    channels = first
    for stage, size in enumerate(map(family.wide, CHANNELS)):
        for block in range(blocks):
            layers.append(BasicBlock(channels, size, stride=2 if stage and not block else 1))
            channels = size
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
