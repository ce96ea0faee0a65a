"""Products with matrices of one or a few columns, which moves of low rank need."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def outer(along: Tensor, left: Tensor, moved: Tensor | None, like: Tensor) -> Tensor:
    """along [K, N, r] times left [K, m, r or r + 1]: [K, N, m], added in place to `moved` [K, ..., m]; a last column meets ones."""
    if along.shape[2] == 1 and torch.compiler.is_compiling():  # which puts element-wise work together, and cannot see into products
        found = along * left[:, None, :, 0] if left.shape[2] == 1 else along * left[:, None, :, 0] + left[:, None, :, 1]
        return found.to(like.dtype) if moved is None else moved.add_(found.view(moved.shape))
    if left.shape[2] > along.shape[2]:
        along = F.pad(along, (0, 1), value=1.0)
    along, left = along.to(like.dtype), left.to(like.dtype)  # in-place products are not cast by autocast
    if moved is None:
        return along[0].mm(left[0].T).unsqueeze(0) if len(left) == 1 else along @ left.mT
    moved = moved.view(len(left), -1, left.shape[1])  # a copy would take nothing back
    for k in range(len(left)):
        moved[k].addmm_(along[k], left[k].T)
    return moved


def scaled(along: Tensor, columns: Tensor, moved: Tensor | None) -> Tensor:
    """along [N, 1, ...] times the first of the columns [m, 1 or 2, ...], and the second, added in place to `moved` [N, m, ...]."""
    if moved is not None:
        moved.addcmul_(along.to(moved.dtype), columns[:, 0].to(moved.dtype))
        return moved if columns.shape[1] == 1 else moved.add_(columns[:, 1])
    return along * columns[:, 0] if columns.shape[1] == 1 else torch.addcmul(columns[:, 1], along.to(columns.dtype), columns[:, 0])
