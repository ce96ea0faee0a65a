"""Networks that predict words, from the command line: trained, started from, written with, and fine-tuned as rows of a study."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support import words as small
from tests.support.command import run
from tests.support.stored import put

from forwardgrad.lab import data
from forwardgrad.lab.data import datasets
from forwardgrad.lab.data import words as word_data
from forwardgrad.lab.recipes import finetune
from forwardgrad.lab.store import Store

TRAIN = ("train", "--model", "gpt-1x64", "--estimator", "backprop", "--optimizer", "adam", "--lr", "0.003", "--batch-size", "4")


@pytest.fixture(autouse=True)
def _words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets, "read_words", small.small_words)
    for place in (word_data, data):  # the room keeps what was once asked of it
        monkeypatch.setattr(place, "vocabulary", small.vocabulary)
    monkeypatch.setenv("FORWARDGRAD_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


def begun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    how = ("--data", "movie-words", "--epochs", "4", "--keep-weights", "--out", "out")
    status, out, _ = run(monkeypatch, capsys, *TRAIN, *how)
    assert status == 0
    return Path(out.splitlines()[1])


def test_a_run_starts_from_the_weights_of_a_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = begun(monkeypatch, capsys)
    still = ("--data", "drug-words", "--lr", "1e-30", "--epochs", "1", "--start-from", folder, "--out", "out")
    status, out, _ = run(monkeypatch, capsys, *TRAIN, *still)
    assert status == 0
    after = json.loads((Path(out.splitlines()[1]) / "result.json").read_text())
    before = json.loads((folder / "result.json").read_text())
    assert after["test"]["loss"] == pytest.approx(before["test"]["loss"], rel=1e-6)  # both have one test split here
    (kept,) = (tmp_path / "data" / "weights").iterdir()
    assert json.loads((Path(out.splitlines()[1]) / "run.json").read_text())["start"] == kept.stem
    assert str(tmp_path) not in (Path(out.splitlines()[1]) / "run.json").read_text()


def test_a_text_is_written_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = begun(monkeypatch, capsys)

    def write(*options: str) -> str:
        status, out, err = run(monkeypatch, capsys, "write", folder, "--prompt", "abc", "--tokens", "12", *options)
        assert status == 0, err
        return out

    drawn = write("--seed", "3", "--texts", "2")
    assert drawn == write("--seed", "3", "--texts", "2") != write("--seed", "4", "--texts", "2")
    assert all(re.fullmatch("abc[a-z]{0,12}", line) for line in drawn.splitlines())
    likeliest = write("--temperature", "0")
    assert likeliest == write("--temperature", "0", "--seed", "9")
    strides = {(ord(b) - ord(a)) % 26 for a, b in zip(likeliest.strip()[2:], likeliest.strip()[3:], strict=False)}
    assert strides == {2}  # four in five letters of the texts are the next but one


def test_a_run_that_predicts_no_words_writes_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    digits = ("train", "--data", "digits", "--model", "logistic", "--estimator", "backprop", "--epochs", "1", "--out", "out")
    _, out, _ = run(monkeypatch, capsys, *digits)
    status, _, err = run(monkeypatch, capsys, "write", out.splitlines()[1])
    assert (status, "learned from digits, and predicts no words" in err) == (2, True)


def test_rows_of_words_are_begun_by_training_what_they_start_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The weights are trained first, and once; every run of the rows names their digest."""
    short = dataclasses.replace(finetune.PRETRAINING, model="gpt-1x64", epochs=1, batch_size=4)
    ways = {name: dataclasses.replace(way, model="gpt-1x64") for name, way in finetune.WORD_WAYS.items()}
    monkeypatch.setitem(finetune.TEXTS, "words", dataclasses.replace(finetune.TEXTS["words"], pretraining=short, ways=ways))
    from forwardgrad.lab import execution

    carried_out, asked = execution.execute, []

    def execute(runs: Sequence[Any], store: Store, place: Any, progress: Any) -> dict[str, Any]:
        asked.append([one.data for one in runs if store.result(one.identity) is None])
        if runs[0].data == "movie-words":
            return carried_out(runs, store, place, progress)
        for one in runs:
            put(store, one, 3.0 - one.optimizer.lr)
        return {one.identity: store.result(one.identity) for one in runs}

    monkeypatch.setattr(execution, "execute", execute, raising=False)
    command = ("reproduce", "finetune", "--rows", "words-backprop,words-mezo", "--budget", "small", "--out", "out")
    status, _, err = run(monkeypatch, capsys, *command)
    assert status == 0, err
    assert asked[0] == ["movie-words"]
    assert {data for each in asked[1:] for data in each} == {"drug-words"}
    (kept,) = (tmp_path / "data" / "weights").iterdir()
    starts = {json.loads(path.read_text()).get("start") for path in Path("out/runs").glob("*/run.json")}
    assert starts == {None, kept.stem}
    asked.clear()
    assert run(monkeypatch, capsys, *command)[0] == 0
    assert not any(asked)  # nothing is trained twice
