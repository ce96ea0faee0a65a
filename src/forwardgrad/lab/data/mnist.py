"""MNIST from its IDX files."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from forwardgrad.lab.data import files
from forwardgrad.lab.data.files import CLASSES, OtherData
from forwardgrad.lab.data.splits import Split


def read_mnist(
    root: Path, counts: tuple[int, int] = (60_000, 10_000), size: int = 28, known: Mapping[str, str] = files.KNOWN["mnist"]
) -> tuple[Split, Split]:
    """The official training and test sets of MNIST, in their official order."""

    def array(relative: str, shape: tuple[int, ...]) -> Tensor:
        path, content = files.read(root, "mnist", relative)
        with files.told(path, "mnist", root):
            values = parse_idx(content, shape)
            if len(shape) == 1 and bool((values >= CLASSES).any()):
                raise OtherData(f"label {int(values.max())} is not a digit")
            if files.digest(content) != known.get(relative, files.digest(content)):
                raise OtherData("its checksum is wrong")
        return values

    splits = []
    for prefix, count in zip(("train", "t10k"), counts, strict=True):
        images = array(f"MNIST/raw/{prefix}-images-idx3-ubyte", (count, size, size))
        labels = array(f"MNIST/raw/{prefix}-labels-idx1-ubyte", (count,))
        splits.append(Split(images.unsqueeze(1), labels.to(torch.int64)))
    return splits[0], splits[1]


def parse_idx(content: bytes, shape: tuple[int, ...]) -> Tensor:
    """The uint8 array of this shape that an IDX file holds; ValueError says how the file differs."""
    header = 4 + 4 * len(shape)
    if len(content) < header:
        raise ValueError(f"it ends after {len(content)} bytes, inside its header")
    if content[:4] != bytes((0, 0, 8, len(shape))):  # two zeros, the type (8: unsigned byte), the number of dimensions
        raise ValueError(f"it starts with {content[:4].hex()}, not with {bytes((0, 0, 8, len(shape))).hex()}")
    found = struct.unpack(f">{len(shape)}I", content[4:header])
    if len(content) != header + math.prod(found):
        raise ValueError(f"it has {len(content) - header} values, not {math.prod(found)}")
    if found != shape:
        raise OtherData(f"it declares the shape {found}, not {shape}")
    # a copy, because tensors are writable and bytes are not
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).reshape(shape)
