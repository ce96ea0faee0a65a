"""Images and labels as tensors, divided at random by a seed into training, validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from forwardgrad.lab.studies import run


@dataclass(frozen=True, eq=False)
class Split:
    """Images [n, c, h, w] as stored (uint8) and their labels [n] (int64), on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Dataset:
    """The three splits of one data set. `scale` is the stored value that stands for full brightness."""

    name: str
    classes: int
    train: Split
    validation: Split
    test: Split
    scale: int = 255

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def pixels(self, images: Tensor) -> Tensor:
        """A batch of stored images as float32 in [0, 1]."""
        return images.to(torch.float32) / self.scale


def divide(images: Tensor, labels: Tensor, sizes: Sequence[int], seed: int) -> list[Split]:
    """Disjoint random splits of the given sizes, the same for the same seed on every device."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(run.stream(seed, "split")))
    return [Split(images[part], labels[part]) for part in torch.split(order, list(sizes))]
