"""Texts as running tokens, each to be predicted from those before it: film critics to begin with, and reviews of drugs to go on with.

name        | what it is                                                               | places predicted: training, validation, test
movie-words | sentences of film critics, and plots of films                            | about 488,000, 25,000 and 67,000
drug-words  | the reviews of drugs that drug-reviews has, each whole                    | about 58,000, 15,000 and 45,000

Both have one vocabulary of 4,096 pieces of words. They are the pieces of MiniLM's vocabulary that occur most often in texts that are in
no test split, and every letter and sign that occurs there. A word that is not among them is spelled in smaller pieces.
The texts of a split stand in one row, a mark ahead of each, and are cut into windows of 64 places. The target of a place is the token
behind it. So a text's end is predicted too, as the mark of the next one.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from forwardgrad.lab.data import texts
from forwardgrad.lab.data.extras import need
from forwardgrad.lab.data.packages import MINILM
from forwardgrad.lab.data.splits import Dataset, Split
from forwardgrad.lab.studies import NEXT_TOKEN, run

LENGTH = 64  # places of a window
SIZE = 4096  # tokens of the vocabulary
PADDING, UNKNOWN, MARK = 0, 1, 2  # ids: of places behind the end, of signs that no training text has, and of where a text begins
SPECIAL = ("[PAD]", "[UNK]", "[CLS]")
IGNORED = -100  # the target of a place that has none, as F.cross_entropy leaves it out
VALIDATION = {"movie-words": 0.05, "drug-words": 0.2}  # of the texts that are in no test split
Texts = list[str]


def read_words(name: str, seed: int) -> Dataset:
    """The data set `name` of tokens to predict; `seed` decides which texts train and which validate, never which test.

    Raises UserError where a package is missing or damaged.
    """
    rest, test = _encoded(name)
    held = round(VALIDATION[name] * len(rest))
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(run.stream(seed, "split"))).tolist()
    train, validation = ([rest[place] for place in part] for part in (order[held:], order[:held]))
    splits = windows(train, whole=True), windows(validation), windows(test)
    return Dataset(name, SIZE, *splits, scale=None, next_token=True)


def windows(tokens: Sequence[Sequence[int]], *, whole: bool = False) -> Split:
    """Texts in one row, a mark ahead of each and one behind the last, in windows of inputs and of the targets behind them, both [n, 64].

    The last window ends in places without a target, or is left out where all are to be `whole`: so the loss of every training batch is
    the mean over as many places.
    """
    row = [*itertools.chain.from_iterable((MARK, *text) for text in tokens), MARK]
    inputs, targets = row[:-1], row[1:]
    over = len(inputs) % LENGTH
    if over and whole:
        inputs, targets = inputs[:-over], targets[:-over]
    elif over:
        inputs, targets = inputs + [PADDING] * (LENGTH - over), targets + [IGNORED] * (LENGTH - over)
    return Split(*(torch.tensor(each, dtype=torch.int64).reshape(-1, LENGTH) for each in (inputs, targets)))


@dataclass(frozen=True)
class Vocabulary:
    """From a text to the ids of its tokens, without marks, and back."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]


@functools.cache
def vocabulary() -> Vocabulary:
    """The vocabulary of both data sets. Raises UserError where a package is missing or damaged."""
    described = json.loads(MINILM.member("tokenizer.json"))
    known = _tokenizer(described, described["model"]["vocab"], described["model"]["unk_token"])
    counts = Counter[str]()
    for name in NEXT_TOKEN:
        for text in _texts(name)[0]:
            counts.update(known.encode(text, add_special_tokens=False).tokens)
    pieces = chosen_pieces(counts, described["model"]["vocab"], SIZE)
    made = _tokenizer(described, {piece: place for place, piece in enumerate(pieces)}, SPECIAL[UNKNOWN])
    return Vocabulary(lambda text: list(made.encode(text, add_special_tokens=False).ids), lambda ids: str(made.decode(list(ids))))


def chosen_pieces(counts: Counter[str], known: dict[str, int], size: int) -> list[str]:
    """The vocabulary, in the order of its ids: the special tokens, all signs that occur, ahead of a word and in it, and frequent pieces.

    Pieces that are as frequent come in the order of the alphabet.
    """
    signs = {sign for piece in counts if piece != "[UNK]" for sign in piece.removeprefix("##")}
    single = [piece for sign in sorted(signs) for piece in (sign, f"##{sign}") if piece in known]
    frequent = sorted(counts, key=lambda piece: (-counts[piece], piece))
    return list(dict.fromkeys([*SPECIAL, *single, *frequent]))[:size]


def _tokenizer(described: dict[str, Any], pieces: dict[str, int], unknown: str) -> Any:
    """A tokenizer that divides texts as MiniLM's does, into these pieces."""
    added = [{**one, "id": pieces[one["content"]]} for one in described["added_tokens"] if one["content"] in pieces]
    model = {**described["model"], "vocab": pieces, "unk_token": unknown}
    changed = {**described, "added_tokens": added, "model": model, "post_processor": None, "padding": None, "truncation": None}
    return need("tokenizers", "text").Tokenizer.from_str(json.dumps(changed))


@functools.cache
def _encoded(name: str) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens of all texts but those of the test, and of those of the test: read once a process."""
    rest, test = _texts(name)
    encode = vocabulary().encode
    return [encode(text) for text in rest], [encode(text) for text in test]


def _texts(name: str) -> tuple[Texts, Texts]:
    """All texts but those of the test, and those of the test."""
    if name == "movie-words":
        return texts.film_texts()
    rest, test = ([text for text, _ in part] for part in texts.drug_texts())
    held = set(test)  # one review is in both files of the package
    return [text for text in rest if text not in held], test
