"""Augmentation of training images: random crops and mirror images, as one gather on the device where the images lie.

What is drawn follows from the seed and the epoch alone, so a resumed run sees the same images, to the bit, on every device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from forwardgrad.lab.studies import stream

PADDING = 4  # zeros on each side, as in He et al. (2016), section 4.2


def draws_of_epoch(seed: int, epoch: int, examples: int) -> Tensor:
    """What happens to each image of an epoch, in its order: [examples, 3], top and left of the crop in 0..8, and mirrored or not."""
    generator = torch.Generator().manual_seed(stream(seed, f"augmentation of epoch {epoch}"))
    corners = torch.randint(2 * PADDING + 1, (examples, 2), generator=generator)
    return torch.cat([corners, torch.randint(2, (examples, 1), generator=generator)], 1)


def crop_flip(images: Tensor, draws: Tensor) -> Tensor:
    """Each image [c, h, w] padded with zeros, cut to its size at its corner, and mirrored from left to right where drawn."""
    n, channels, height, width = images.shape
    top, left, mirrored = draws.unsqueeze(2).unbind(1)  # each [n, 1]
    rows = top + torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device)
    columns = left + torch.where(mirrored.bool(), width - 1 - across, across)
    padded = F.pad(images, [PADDING] * 4)
    examples, planes = torch.arange(n, device=images.device), torch.arange(channels, device=images.device)
    return padded[examples.view(n, 1, 1, 1), planes.view(1, channels, 1, 1), rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]
