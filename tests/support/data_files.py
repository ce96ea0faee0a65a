"""Small data sets for tests: files in the formats of MNIST and of CIFAR-10."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import torch

from forwardgrad.lab.data.files import KNOWN, digest
from forwardgrad.lab.data.mnist import read_mnist

COUNTS, SIZE = (7, 5), 4  # the small MNIST of these tests
TRAIN_IMAGES = "MNIST/raw/train-images-idx3-ubyte"
TRAIN_LABELS = "MNIST/raw/train-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()


def small_mnist() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    files = {}
    for prefix, n in zip(("train", "t10k"), COUNTS, strict=True):
        files[f"MNIST/raw/{prefix}-images-idx3-ubyte"] = idx(random.integers(0, 256, (n, SIZE, SIZE)))
        files[f"MNIST/raw/{prefix}-labels-idx1-ubyte"] = idx(random.integers(0, 10, n))
    return files


def write(root: Path, files: dict[str, bytes], packed: bool) -> Path:
    for relative, content in files.items():
        path = root / (f"{relative}.gz" if packed else relative)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return root


def read_small(root: Path, known: dict[str, str] | None = None) -> list[torch.Tensor]:
    train, test = read_mnist(root, COUNTS, SIZE, known or {})
    return [train.inputs, train.labels, test.inputs, test.labels]


def batch(n: int = 3, protocol: int = 4, **change: object) -> bytes:
    random = np.random.default_rng(n)
    values: dict[str, object] = {"data": random.integers(0, 256, (n, 3072)).astype(np.uint8), "labels": [i % 10 for i in range(n)]}
    return pickle.dumps({key.encode(): value for key, value in (values | change).items()}, protocol=protocol)


def small_cifar(root: Path) -> dict[str, str]:
    known = {}
    for i, relative in enumerate(KNOWN["cifar10"]):
        (root / relative).parent.mkdir(exist_ok=True)
        (root / relative).write_bytes(batch(3, labels=[i, i, i]))
        known[relative] = digest((root / relative).read_bytes())
    return known
