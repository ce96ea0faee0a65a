"""Digits, MNIST, CIFAR-10 and texts by name, as tensors on a device, split by a seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from forwardgrad.lab.data.cifar import read_cifar
from forwardgrad.lab.data.extras import need
from forwardgrad.lab.data.files import CLASSES, folder
from forwardgrad.lab.data.mnist import read_mnist
from forwardgrad.lab.data.splits import Dataset, divide
from forwardgrad.lab.data.texts import TEXTS, read_texts
from forwardgrad.lab.data.words import read_words
from forwardgrad.lab.studies import NEXT_TOKEN, run

DIGITS_TEST = 0  # digits come without a test set: this seed cuts one, the same for every run


def load(name: str, seed: int, device: torch.device | str = "cpu", data_dir: Path | str | None = None) -> Dataset:
    """The data set `name`; `seed` decides which examples train and which validate, never which test."""
    run.check_choice(name, run.DataName, "data set")
    if name in TEXTS or name in NEXT_TOKEN:
        texts = (read_words if name in NEXT_TOKEN else read_texts)(name, seed)
        train, validation, test = (split.to(device) for split in (texts.train, texts.validation, texts.test))
        return replace(texts, train=train, validation=validation, test=test)
    if name == "digits":
        rest, test = divide(*_digits(), (1437, 360), DIGITS_TEST)
        train, validation = divide(rest.inputs, rest.labels, (1077, 360), seed)
        return Dataset(name, CLASSES, train.to(device), validation.to(device), test.to(device), scale=16)
    official, test = (read_mnist if name == "mnist" else read_cifar)(folder(data_dir))
    train, validation = divide(official.inputs, official.labels, (len(official) - 10_000, 10_000), seed)
    return Dataset(name, CLASSES, train.to(device), validation.to(device), test.to(device))


def _digits() -> tuple[Tensor, Tensor]:
    digits = need("sklearn.datasets").load_digits()
    return torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1), torch.from_numpy(digits.target).to(torch.int64)
