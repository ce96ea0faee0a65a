"""Small data of tokens to predict, made on the spot: no package is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from forwardgrad.lab.data.splits import Dataset, Split
from forwardgrad.lab.data.words import IGNORED, Vocabulary, windows

SIZE, PLACES = 30, 64  # tokens of the vocabulary; places of a window


def vocabulary() -> Vocabulary:
    """Letters: a is 3, b is 4, and so on."""
    codes = {sign: 3 + place for place, sign in enumerate("abcdefghijklmnopqrstuvwxyz")}
    signs = {code: sign for sign, code in codes.items()}
    return Vocabulary(lambda text: [codes[sign] for sign in text], lambda ids: "".join(signs.get(each, "") for each in ids))


def split(seed: int, texts: int, *, whole: bool) -> Split:
    """Texts of which every token follows from the one before: the next letter but one, or now and then the next."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(texts):
        strides = 1 + (torch.rand(20, generator=generator) < 0.8).long()
        begin = int(torch.randint(26, (1,), generator=generator))
        rows.append([3 + (begin + int(way)) % 26 for way in strides.cumsum(0)])
    return windows(rows, whole=whole)


def small_words(name: str = "drug-words", seed: int = 0) -> Dataset:
    """A data set in the form of the real ones."""
    parts = split(100 + seed, 40, whole=True), split(200 + seed, 11, whole=False), split(300, 14, whole=False)
    return Dataset(name, SIZE, *parts, scale=None, next_token=True)


def by_hand(scores: Tensor, behind: Tensor) -> tuple[float, float]:
    """Loss and accuracy of a token, one token after the other: −log of its share of the exponentials, and whether none has more."""
    losses, right = [], []
    for row, targets in zip(scores.double(), behind.tolist(), strict=True):
        for each, target in zip(row, targets, strict=True):
            if target != IGNORED:
                losses.append(float(each.exp().sum().log() - each[target]))
                right.append(float(each[target]) == float(each.max()))
    return sum(losses) / len(losses), sum(right) / len(right)
