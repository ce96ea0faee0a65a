"""Transforms of torch.func (`grad`, `vmap`, `jvp`) that a loss uses itself: whether one is at work, and which tensors it was given.

They wrap tensors, and no function mode sees that. A wrapped tensor is therefore recognised by its storage.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
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
