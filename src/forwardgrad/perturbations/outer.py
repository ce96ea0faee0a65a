"""Products with matrices of one or a few columns, which moves of low rank need."""

from __future__ import annotations

from typing import Any

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


def added(out: Tensor, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out [..., m] + (x [..., n] @ right [n, r]) @ left [m, r or r + 1].T, a last column meeting ones: the output of a layer that moved.

    Under `vmap` members with factors of their own are moved together, and `out` may be written to.
    """
    found: Tensor = _Added.apply(out, x, left, right)  # type: ignore[no-untyped-call]
    return found


class _Added(torch.autograd.Function):
    """As vmap would do it operation by operation, an output would go through memory several times."""

    @staticmethod
    def forward(out: Tensor, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        along = x.reshape(-1, x.shape[-1]) @ right
        return _with(out.reshape(1, -1, out.shape[-1]).clone(), along.unsqueeze(0), left.unsqueeze(0)).view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], out: Tensor, x: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, int]:
        count = info.batch_size
        left, right = (
            t.expand(count, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in zip((left, right), in_dims[2:], strict=True)
        )
        if in_dims[1] is None:  # all see the same input: one product for all of them
            flat = x.reshape(-1, x.shape[-1])
            along = (flat @ right.transpose(0, 1).flatten(1)).unflatten(1, (count, -1)).transpose(0, 1)
        else:
            along = (right.mT @ x.movedim(in_dims[1], 0).reshape(count, -1, right.shape[1]).mT).mT  # a tenth of the time of x @ right
        if in_dims[0] is None:
            shape, whole = out.shape, out.reshape(1, -1, out.shape[-1]).expand(count, -1, -1)
        else:
            moved = out.movedim(in_dims[0], 0)
            shape, whole = moved.shape[1:], moved.reshape(count, -1, moved.shape[-1])
        return _with(whole, along, left).view(count, *shape), 0


def _with(out: Tensor, along: Tensor, left: Tensor) -> Tensor:
    """out [K, N, m] + [along [K, N, r], 1] left [K, m, r or r + 1]ᵀ, in place where `out` has memory of its own."""
    if left.shape[2] > along.shape[2]:
        along = F.pad(along, (0, 1), value=1.0)
    along, left = along.to(out.dtype), left.to(out.dtype)
    if left.shape[2] == 1:  # for which libraries have no fast product
        return torch.addcmul(out, along, left.mT) if 0 in out.stride() else out.addcmul_(along, left.mT)
    return torch.baddbmm(out, along, left.mT) if 0 in out.stride() else out.baddbmm_(along, left.mT)
