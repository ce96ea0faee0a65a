"""Products with matrices of one or a few columns, which moves of low rank need."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from forwardgrad.forward_mode import levels


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


def added(out: levels.Members, along: Tensor, left: Tensor) -> Tensor:
    """out [K, ..., m] + [along [K, N, r], 1] left [K, m, r or r + 1]ᵀ, in place where each member has an output of its own."""
    flat, shape = out.all.reshape(len(left), -1, left.shape[1]), out.all.shape
    if left.shape[2] > along.shape[2]:
        along = F.pad(along, (0, 1), value=1.0)
    along, left = along.to(flat.dtype), left.to(flat.dtype)
    if left.shape[2] == 1:  # for which libraries have no fast product
        found = torch.addcmul(flat, along, left.mT) if out.shared else flat.addcmul_(along, left.mT)
    else:
        found = torch.baddbmm(flat, along, left.mT) if out.shared else flat.baddbmm_(along, left.mT)
    return found.view(shape)


def onto(x: levels.Members, right: Tensor) -> Tensor:
    """x [K, ..., n] times right [K, n, r]: [K, N, r]."""
    if x.shared:  # one product for all of them
        flat = x.all[0].reshape(-1, x.all.shape[-1])
        along: Tensor = (flat @ right.transpose(0, 1).flatten(1)).unflatten(1, (len(right), -1))
        return along.transpose(0, 1)
    return (right.mT @ x.all.reshape(len(right), -1, right.shape[1]).mT).mT  # a tenth of the time of x @ right


def stepped(factors: Tensor, steps: Tensor) -> Tensor:
    """The factors [K, m, r] of all members, those of each direction times the steps [n] along it: [n, m, r]."""
    return (factors * steps.view(-1, len(factors), 1, 1)).flatten(0, 1)


def repeated(factors: Tensor, steps: Tensor) -> Tensor:
    """The factors [K, m, r] of all members, one for every step: [n, m, r]."""
    return factors if len(steps) == len(factors) else factors.repeat(len(steps) // len(factors), 1, 1)
