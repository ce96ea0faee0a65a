"""Inputs and labels as tensors, divided at random by a seed into training, validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from forwardgrad.lab.studies import run


@dataclass(frozen=True, eq=False)
class Split:
    """Inputs [n, ...] as stored and their labels [n] (int64), on one device.

    Images are uint8 [n, c, h, w], texts int64 token ids [n, length]; a user's inputs have any shape. Where every place of a text is to be
    continued, labels are [n, length] too, and −100 where a place has none.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        return Split(self.inputs.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Dataset:
    """The three splits of one data set.

    `scale` is the stored value that stands for full brightness. It is None where inputs go to a model as they are stored. With `next_token`
    a target is the token behind every place of a text, and `classes` is how many tokens there are.
    """

    name: str
    classes: int
    train: Split
    validation: Split
    test: Split
    scale: int | None = 255
    next_token: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return tuple(self.train.inputs.shape[1:])

    def for_model(self, stored: Tensor) -> Tensor:
        """A batch of stored inputs as a model takes them: images as float32 in [0, 1]."""
        return stored if self.scale is None else stored.to(torch.float32) / self.scale


def divide(inputs: Tensor, labels: Tensor, sizes: Sequence[int], seed: int) -> list[Split]:
    """Disjoint random splits of the given sizes, the same for the same seed on every device."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(run.stream(seed, "split")))
    return [Split(inputs[part], labels[part]) for part in torch.split(order, list(sizes))]
