"""A digest of a model's parameters: a short number that is another one as soon as a single bit of them is."""

from __future__ import annotations

import ctypes
import hashlib

from torch import Tensor, nn

SIZE = 16  # bytes of a digest


def digest_of(model: nn.Module) -> bytes:
    """The digest of all parameters, frozen ones too, with their names, shapes and kinds of number; buffers are not in it."""
    found = hashlib.blake2b(digest_size=SIZE)
    for name, p in model.named_parameters():
        found.update(f"{name} {p.dtype} {tuple(p.shape)}\n".encode())
        update(found, p)
    return found.digest()


def update(digest: hashlib.blake2b, tensor: Tensor) -> None:
    """Take in the bits of a tensor, where they lie."""
    held = tensor.detach().cpu().contiguous()
    digest.update((ctypes.c_char * (held.numel() * held.element_size())).from_address(held.data_ptr()) if held.numel() else b"")
