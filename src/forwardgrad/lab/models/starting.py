"""Weights that a run starts from, kept in the data folder under their digest.

The digest is that of names, shapes, types and numbers, so it is the same however a file is packed. A run's description has it: runs that
start from other weights are other runs.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store import make_folder, write_whole

FOLDER = "weights"  # in the data folder
AGAIN = "name the folder of the run that made them once more with --start-from"


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """The SHA-256 of weights by name, in 64 hexadecimal digits."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def keep_start(weights: Mapping[str, Tensor], root: Path) -> str:
    """Keep weights in a data folder for runs to start from; returns their digest."""
    path = _path(digest := digest_of(weights), root)
    if not path.exists():
        make_folder(path.parent)
        buffer = io.BytesIO()
        torch.save(dict(weights), buffer)
        write_whole(path, buffer.getvalue())
    return digest


def load_start(model: nn.Module, digest: str, root: Path) -> None:
    """Give a network the weights of this digest. UserError where they are not in the data folder, are damaged, or are another network's."""
    path = _path(digest, root)
    if not path.exists():
        raise UserError(f"the weights {digest[:12]} that this run starts from are not in {path.parent}: {AGAIN}, or choose --data-dir")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        good = digest_of(weights) == digest
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise UserError(f"{path} is damaged ({type(error).__name__}): delete it, then {AGAIN}") from error
    if not good:
        raise UserError(f"{path} is damaged (its weights are not those of its name): delete it, then {AGAIN}")
    _check_alike(model.state_dict(), weights, digest)
    model.load_state_dict(weights)


def _check_alike(mine: Mapping[str, Tensor], weights: Mapping[str, Tensor], digest: str) -> None:
    for name in [*mine, *weights]:
        here, there = (list(each[name].shape) if name in each else None for each in (mine, weights))
        if here != there:
            shapes = f"{name} is {here or 'not there'} here and {there or 'not there'} among them"
            raise UserError(f"the weights {digest[:12]} are of another network ({shapes}): choose the model and data that they came from")


def _path(digest: str, root: Path) -> Path:
    return root / FOLDER / f"{digest}.pt"
