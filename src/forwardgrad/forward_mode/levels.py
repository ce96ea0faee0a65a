"""Transforms of torch.func (`grad`, `vmap`, `jvp`) that a loss uses itself: whether one is at work, and which tensors it was given.

They wrap tensors, and no function mode sees that. A wrapped tensor is therefore recognised by its storage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter
from torch.utils._pytree import tree_leaves


def level() -> int:
    """How many transforms are at work, one inside the other."""
    return torch._C._functorch.maybe_current_level() or 0


def unwrapped(tensor: Tensor) -> Tensor:
    """The plain tensor that transforms have wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def storage(tensor: Tensor) -> int:
    """A name for the memory of a tensor, which its views and wrappers share; 0 where it has none."""
    try:
        found: int = unwrapped(tensor).untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return 0
    return found


def storages(values: Any) -> set[int]:
    """Those of all tensors among some arguments."""
    return {storage(leaf) for leaf in tree_leaves(values) if isinstance(leaf, Tensor)} - {0}


class Members(NamedTuple):
    """A tensor of all members of a batch under `vmap`, [n, *shape]; `shared`: it is one that all have, and not n copies of it."""

    all: Tensor
    shared: bool


def together(make: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The result [n, *shape] of a function of `Members`, as the tensor of each member of the vmap that is at work.

    For a few operations in a row this takes a tenth of the time that vmap takes, which goes by each of them. No function mode sees them.
    """
    vmap = retrieve_current_functorch_interpreter()
    assert isinstance(vmap, VmapInterpreter)
    depth, count = vmap.level(), vmap.batch_size()
    given = [_members(*torch._C._functorch._unwrap_batched(tensor, depth), count) for tensor in tensors]
    with torch._C.DisableTorchFunction():
        with vmap.lower():
            found = make(*given)
        return torch._C._functorch._add_batch_dim(found, 0, depth)


def _members(tensor: Tensor, dim: int | None, count: int) -> Members:
    if dim is None:
        return Members(tensor.expand(count, *tensor.shape), shared=True)
    return Members(tensor.movedim(dim, 0), shared=False)


def member(stack: Tensor) -> Tensor:
    """What each member of the vmap that is at work has of a stack [n, *shape]."""
    return torch._C._functorch._add_batch_dim(stack, 0, level())


def hangs_on_member(tensor: Tensor) -> bool:
    """Whether members of the vmap that is at work have tensors of their own."""
    return torch._C._functorch._unwrap_batched(tensor, level())[1] is not None
