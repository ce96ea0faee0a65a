"""CIFAR-10 from its pickled batch files, without running anything that a pickle asks for.

A file is compared to its known checksum before anything in it is interpreted. What is interpreted then goes through an unpickler that
knows one class, which does nothing.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from forwardgrad.lab.data import files
from forwardgrad.lab.data.files import CLASSES, OtherData
from forwardgrad.lab.data.splits import Split


def read_cifar(root: Path, count: int = 10_000, known: Mapping[str, str] = files.KNOWN["cifar10"]) -> tuple[Split, Split]:
    """The official training and test sets of CIFAR-10, in their official order; `count` examples a file."""

    def batch(relative: str) -> Split:
        path, content = files.read(root, "cifar10", relative)
        with files.told(path, "cifar10", root):
            if files.digest(content) != known[relative]:  # before anything in it is interpreted
                raise OtherData("its checksum is wrong")
            return parse_batch(content, count)

    batches = [batch(f"cifar-10-batches-py/data_batch_{i}") for i in range(1, 6)]
    train = Split(torch.cat([b.inputs for b in batches]), torch.cat([b.labels for b in batches]))
    return train, batch("cifar-10-batches-py/test_batch")


def parse_batch(content: bytes, count: int) -> Split:
    """The images and labels that a CIFAR-10 batch file holds; ValueError says how the file differs."""
    batch = unpickle(content)
    labels, values = (batch.get(b"labels"), batch.get(b"data")) if isinstance(batch, dict) else (None, None)
    if not (isinstance(labels, list) and len(labels) == count and all(type(x) is int and 0 <= x < CLASSES for x in labels)):
        raise ValueError(f"it does not hold {count} labels from 0 to {CLASSES - 1}")
    images = _array(values, (count, 3 * 32 * 32)).reshape(count, 3, 32, 32)
    return Split(images, torch.tensor(labels, dtype=torch.int64))


def _array(stored: object, shape: tuple[int, ...]) -> Tensor:
    match stored:
        case PickledArray(state=(int(), found, PickledArray(arguments=(b"u1" | "u1", *_)), False, bytes(content))):
            if found == shape and len(content) == math.prod(shape):
                return torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(shape)  # a copy: tensors are writable
    raise ValueError(f"it does not hold a uint8 array of shape {shape}")


class PickledArray:
    """Stands in for a pickled numpy array, its constructor and its dtype: it keeps what the pickle says and does nothing."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class RestrictedUnpickler(pickle.Unpickler):
    """Reads plain values and numpy arrays without calling anything but `PickledArray`, not even numpy."""

    def find_class(self, module: str, name: str) -> type[PickledArray]:
        # numpy._core is what numpy 2 writes.
        constructors = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}
        if (module, name) in constructors | {("numpy", "ndarray"), ("numpy", "dtype")}:
            return PickledArray
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data file needs")


def unpickle(content: bytes) -> object:
    """The plain values in a pickle, arrays as `PickledArray`; ValueError for anything that a data file does not need."""
    try:
        return RestrictedUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise nearly anything, and all of it means the same
        raise ValueError(f"it cannot be unpickled: {error or type(error).__name__}") from error
