"""Digits, MNIST and CIFAR-10 as tensors: located, checked against known checksums, read, and split by seed.

Nothing here goes on the network; `forwardgrad.lab.data.fetching` does that.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import math
import os
import pickle
import shlex
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import run

State = Literal["ok", "missing", "damaged"]

CLASSES = 10
LARGEST = 1 << 26  # bytes; no official file, unpacked, is larger

# The md5 of every official file's content. MNIST's are of the unpacked files, so that it does not matter who packed them.
KNOWN: Mapping[str, Mapping[str, str]] = {
    "digits": {},
    "mnist": {
        "MNIST/raw/train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "MNIST/raw/train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "MNIST/raw/t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "MNIST/raw/t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "cifar10": {
        "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
        "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
        "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
        "cifar-10-batches-py/batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
}


@dataclass(frozen=True, eq=False)
class Split:
    """Images [n, c, h, w] as stored (uint8) and their labels [n] (int64), on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """The three splits of one data set. `scale` is the stored value that stands for full brightness."""

    name: str
    classes: int
    train: Split
    validation: Split
    test: Split
    scale: int = 255

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def pixels(self, images: Tensor) -> Tensor:
        """A batch of stored images as float32 in [0, 1]."""
        return images.to(torch.float32) / self.scale


DIGITS_TEST = 0  # digits come without a test set: this seed cuts one, the same for every run


def load(name: str, seed: int, device: torch.device | str = "cpu", data_dir: Path | str | None = None) -> Dataset:
    """The data set `name`; `seed` decides which examples train and which validate, never which test."""
    run.check_choice(name, run.DataName, "data set")
    if name == "digits":
        rest, test = divide(*_digits(), (1437, 360), DIGITS_TEST)
        train, validation = divide(rest.images, rest.labels, (1077, 360), seed)
        return Dataset(name, CLASSES, _to(train, device), _to(validation, device), _to(test, device), scale=16)
    official, test = (read_mnist if name == "mnist" else read_cifar)(folder(data_dir))
    train, validation = divide(official.images, official.labels, (len(official) - 10_000, 10_000), seed)
    return Dataset(name, CLASSES, _to(train, device), _to(validation, device), _to(test, device))


def divide(images: Tensor, labels: Tensor, sizes: Sequence[int], seed: int) -> list[Split]:
    """Disjoint random splits of the given sizes, the same for the same seed on every device."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(run.stream(seed, "split")))
    return [Split(images[part], labels[part]) for part in torch.split(order, list(sizes))]


def _to(split: Split, device: torch.device | str) -> Split:
    return Split(split.images.to(device), split.labels.to(device))


def _digits() -> tuple[Tensor, Tensor]:
    digits = need("sklearn.datasets").load_digits()
    return torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1), torch.from_numpy(digits.target).to(torch.int64)


def need(module: str) -> Any:
    """A module of the lab's optional dependencies, imported only when it is used."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module.split('.')[0]} cannot be imported ({error}): pip install 'forwardgrad[lab]'") from error


# Where the files are, and what is wrong with them ------------------------------------------------------------------------------------


class Missing(UserError):
    """A file of a data set is not there."""


class Damaged(UserError):
    """A file of a data set is not what was published."""


def folder(data_dir: Path | str | None = None) -> Path:
    """`data_dir`, else $FORWARDGRAD_DATA, else the user's cache folder: the folder that holds MNIST/ and cifar-10-batches-py/."""
    chosen = data_dir or os.environ.get("FORWARDGRAD_DATA", "").strip() or _cache()
    try:
        return Path(chosen).expanduser()
    except RuntimeError as error:
        raise UserError(f"{chosen} has no meaning here ({error}): name the data folder with --data-dir or FORWARDGRAD_DATA") from error


def _cache() -> str:
    # The same folders as pooch.os_cache("forwardgrad"), spelled out so that they do not depend on what is installed.
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
        return f"{local}/forwardgrad/forwardgrad/Cache"
    if sys.platform == "darwin":
        return "~/Library/Caches/forwardgrad"
    base = os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    return f"{base}/forwardgrad"


def remedy(name: str, root: Path) -> str:
    """The command that mends the files of a data set in `root`."""
    option = "" if root == folder() else f" --data-dir {shlex.quote(str(root))}"
    return f"forwardgrad data fetch {name}{option}"


def verify(data_dir: Path | str | None = None, names: Sequence[str] | None = None) -> list[tuple[str, State]]:
    """Every official file of these data sets (of all, if left out) as (path relative to the data folder, state)."""
    if unknown := [name for name in names or () if not KNOWN.get(name)]:
        raise UserError(f"no files belong to the data set {unknown[0]!r}: choose from {', '.join(name for name in KNOWN if KNOWN[name])}")
    root = folder(data_dir)
    return [state(root, name, relative, md5) for name in names or KNOWN for relative, md5 in KNOWN[name].items()]


def state(root: Path, name: str, relative: str, md5: str) -> tuple[str, State]:
    """The file that `load` would read for `relative`, and whether its content has this md5."""
    try:
        path, content = _read(root, name, relative)
    except Missing:
        return _candidates(name, relative)[0], "missing"
    except Damaged:
        return _candidates(name, relative)[0], "damaged"
    return path.relative_to(root).as_posix(), "ok" if digest(content) == md5 else "damaged"


def digest(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _candidates(name: str, relative: str) -> tuple[str, ...]:
    # The packed file first: it is what a fetch brings, so a fetch also mends a folder whose unpacked file is damaged.
    return (f"{relative}.gz", relative) if name == "mnist" else (relative,)


def _read(root: Path, name: str, relative: str) -> tuple[Path, bytes]:
    """The path and unpacked content of one file; content beyond LARGEST is cut, which no length or checksum check lets pass."""
    for candidate in _candidates(name, relative):
        path = root / candidate
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                return path, file.read(LARGEST + 1)
        except FileNotFoundError:
            continue
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _damaged(path, error, name, root) from error
        except OSError as error:
            why = error.strerror or error
            other = f"fill another folder with `forwardgrad data fetch {name} --data-dir FOLDER`"
            raise UserError(f"cannot read {path} ({why}): make it readable, or {other}") from error
    raise Missing(f"{root / _candidates(name, relative)[0]} is missing: run `{remedy(name, root)}`, or name the folder that has it")


def _damaged(path: Path, why: object, name: str, root: Path) -> Damaged:
    return Damaged(f"{path} is damaged ({why}): run `{remedy(name, root)}`")


class _Other(ValueError):
    """A file that can be read and is not the official one: damaged, or of another data set."""


def _other(path: Path, why: object, name: str, root: Path) -> Damaged:
    own = "data of your own belong in a study that names them by import path (docs/studies.md)"
    return Damaged(f"{path} is damaged or of another data set ({why}): run `{remedy(name, root)}` for the official one; {own}")


# MNIST -------------------------------------------------------------------------------------------------------------------------------


def read_mnist(
    root: Path, counts: tuple[int, int] = (60_000, 10_000), size: int = 28, known: Mapping[str, str] = KNOWN["mnist"]
) -> tuple[Split, Split]:
    """The official training and test sets of MNIST, in their official order."""

    def part(relative: str, shape: tuple[int, ...]) -> Tensor:
        path, content = _read(root, "mnist", relative)
        try:
            values = parse_idx(content, shape)
            if len(shape) == 1 and bool((values >= CLASSES).any()):
                raise _Other(f"label {int(values.max())} is not a digit")
            if digest(content) != known.get(relative, digest(content)):
                raise _Other("its checksum is wrong")
        except _Other as error:
            raise _other(path, error, "mnist", root) from error
        except ValueError as error:
            raise _damaged(path, error, "mnist", root) from error
        return values

    splits = []
    for prefix, count in zip(("train", "t10k"), counts, strict=True):
        images = part(f"MNIST/raw/{prefix}-images-idx3-ubyte", (count, size, size))
        labels = part(f"MNIST/raw/{prefix}-labels-idx1-ubyte", (count,))
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
        raise _Other(f"it declares the shape {found}, not {shape}")
    return _bytes(content[header:]).reshape(shape)


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)  # a copy, because tensors are writable and bytes are not


# CIFAR-10 ----------------------------------------------------------------------------------------------------------------------------


def read_cifar(root: Path, count: int = 10_000, known: Mapping[str, str] = KNOWN["cifar10"]) -> tuple[Split, Split]:
    """The official training and test sets of CIFAR-10, in their official order; `count` examples a file."""

    def part(relative: str) -> Split:
        path, content = _read(root, "cifar10", relative)
        try:
            if digest(content) != known[relative]:  # before anything in it is interpreted
                raise _Other("its checksum is wrong")
            return parse_batch(content, count)
        except _Other as error:
            raise _other(path, error, "cifar10", root) from error
        except ValueError as error:
            raise _damaged(path, error, "cifar10", root) from error

    parts = [part(f"cifar-10-batches-py/data_batch_{i}") for i in range(1, 6)]
    train = Split(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))
    return train, part("cifar-10-batches-py/test_batch")


class _Array:
    """Stands in for a pickled numpy array, its constructor and its dtype: it keeps what the pickle says and does nothing."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Reads plain values and numpy arrays without calling anything but `_Array`, not even numpy."""

    def find_class(self, module: str, name: str) -> type[_Array]:
        # numpy._core is what numpy 2 writes.
        constructors = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}
        if (module, name) in constructors | {("numpy", "ndarray"), ("numpy", "dtype")}:
            return _Array
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data file needs")


def unpickle(content: bytes) -> object:
    """The plain values in a pickle, arrays as `_Array`; ValueError for anything that a data file does not need."""
    try:
        return _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise nearly anything, and all of it means the same
        raise ValueError(f"it cannot be unpickled: {error or type(error).__name__}") from error


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
        case _Array(state=(int(), found, _Array(arguments=(b"u1" | "u1", *_)), False, bytes(content))):
            if found == shape and len(content) == math.prod(shape):
                return _bytes(content).reshape(shape)
    raise ValueError(f"it does not hold a uint8 array of shape {shape}")
