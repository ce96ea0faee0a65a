"""Mistakes, a full disk and damaged stores on the command line: each ends in one sentence and status 2."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.command import DIGITS, run

MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (("train", "--data", "imagenet"), "'digits', 'mnist', 'cifar10'"),
    (("train", "--model", "resnet"), "unknown model 'resnet': choose one of logistic, mlp, nn, cnn, cifar-cnn, minilm"),
    (("train", "--estimator", "evolution"), "unknown estimator 'evolution': choose one of backprop, forward"),
    (("train", "--optimizer", "lion"), "'sgd', 'nesterov', 'adam'"),
    (("train", "--estimator", "forward(law=cauchy)"), "unknown law 'cauchy': choose one of gaussian, rademacher, sphere"),
    (("train", "--lr", "0"), "learning rate must be a positive number, not 0.0"),
    (("train", "--lr", "-1"), "learning rate must be a positive number, not -1.0"),
    (("train", "--lr", "nan"), "learning rate must be a positive number"),
    (("train", "--lr", "fast"), "--lr"),
    (("train", "--decay", "-1"), "decay must be zero or positive"),
    (("train", "--momentum", "1"), "momentum must lie in [0, 1)"),
    (("train", "--beta1", "1"), "beta1 must lie in [0, 1)"),
    (("train", "--epochs", "0"), "--epochs"),
    (("train", "--epochs", "-3"), "--epochs"),
    (("train", "--batch-size", "0"), "--batch-size"),
    (("train", "--estimator", "forward(tangents=0)"), "tangents must be a whole number of at least 1, not 0"),
    (("train", "--estimator", "forward(tangents=two)"), "tangents must be a whole number of at least 1, not 'two'"),
    (("train", "--estimator", "forward(clip=0)"), "clip must be a number above 0, not 0"),
    (("train", "--estimator", "forward(clip=-1.5)"), "clip must be a number above 0, not -1.5"),
    (("train", "--estimator", "backprop(tangents=2)"), "backprop estimator has no option 'tangents'"),
    (("train", "--estimator", "forward(tangents=2"), "',' or ')' is expected at its end"),
    (("train", "--estimator", "forward; backprop"), "the end is expected at character 8"),
    (("train", "--estimator", ""), "a name is expected at its end"),
    (("train", "--tangents", "2"), "--tangents"),
    (("train", "--weight-decay", "-1"), "weight decay must be zero or positive"),
    (("train", "--lr", "0.1", "--weight-decay", "10"), "weight decay must be zero or positive and below 1/lr"),
    (("train", "--cap", "0"), "the cap of the relative step must be a positive number, not 0.0"),
    (("tune", "--lr", "0.1", "--weight-decay", "0,nan"), "--weight-decay takes finite numbers"),
    (("tune", "--lr", "0.1", "--weight-decay", "0,-0.1"), "weight decay must be zero or positive"),
    (("tune", "--lr", "0.1", "--estimator", "forward(tangents=0)"), "tangents must be"),
    (("train", "--seed", "-1"), "--seed"),
    (("train", "--device", "cuda:77"), "no GPU for --device cuda:77"),
    (("train", "--device", "abacus"), "choose cpu, cuda"),
    (("train", "--data", "mnist", "--data-dir", "NOWHERE"), "forwardgrad data fetch mnist"),
    (("train", "--data", "digits", "--model", "cnn"), "needs larger images"),
    (("train", "--data", "digits", "--out", "FILE/out"), "cannot write to the output folder"),
    (("tune", "--lr", "0.1,high"), "--lr takes numbers separated by commas"),
    (("tune", "--lr", "0.1,-0.1"), "learning rate must be a positive number, not -0.1"),
    (("tune",), "--lr"),
    (("reproduce", "table2"), "'table1', 'figure1', 'figure2', 'baydin', 'beyond', 'noise', 'faster'"),
    (("reproduce", "table1", "--rows", "15"), "choose a number from 1 to 14"),
    (("reproduce", "table1", "--epochs", "0"), "--epochs"),
    (("reproduce", "table1", "--seeds", "0"), "--seeds"),
    (("reproduce", "table1", "--jobs", "0"), "--jobs"),
    (("reproduce", "baydin", "--rows", "cnn"), "choose from logistic, nn"),
    (("reproduce", "baydin", "--retune"), "leave --retune out"),
    (("reproduce", "beyond", "--retune"), "beyond always tunes every arm; leave --retune out"),
    (("reproduce", "beyond", "--rows", "nn,cifar"), "no row 'cifar' beyond the paper: choose from nn, cnn, cifar-cnn"),
    (("reproduce", "noise", "--rows", "nn"), "no row 'nn' on noise: choose from paper-x1"),
    (("reproduce", "noise", "--retune"), "noise has the paper's hyperparameters, times a factor; leave --retune out"),
    (
        ("reproduce", "noise", "--budget", "small"),
        "belongs to `reproduce all` (small, paper), to `reproduce faster` and `passes` (small, full), and to",
    ),
    (
        ("reproduce", "faster", "--budget", "paper"),
        "belongs to `reproduce all` (small, paper), to `reproduce faster` and `passes` (small, full), and to",
    ),
    (("reproduce", "passes", "--budget", "medium"), "and to `reproduce finetune` (small, medium, full): shorten others with --epochs"),
    (("reproduce", "all", "--budget", "medium"), "the budgets of `reproduce all` are small and paper"),
    (("reproduce", "all", "--budget", "full"), "the budgets of `reproduce all` are small and paper"),
    (("reproduce", "faster", "--rows", "nn-local"), "no row 'nn-local' against the clock: choose from nn, cnn, cifar-cnn"),
    (("reproduce", "faster", "--rows", "cnn", "--budget", "small"), "against the clock (--budget small has no other): choose from nn"),
    (("reproduce", "faster", "--retune"), "faster always tunes both arms; leave --retune out"),
    (("reproduce", "passes", "--rows", "fzoo,mezo"), "no row 'mezo' at equal passes: choose from fzoo, rank, forward, directions"),
    (("reproduce", "passes", "--epochs", "2"), "passes gives every arm as many forward passes: leave --epochs out, and shorten it"),
    (("reproduce", "finetune", "--tuning-epochs", "2"), "finetune gives every arm as many seconds: leave --tuning-epochs out"),
    (("reproduce", "passes", "--retune"), "passes always tunes every arm; leave --retune out"),
    (("reproduce", "passes", "--batched"), "`reproduce passes` times every run by itself: leave --batched out"),
    (("reproduce", "faster", "--batched"), "`reproduce faster` times every run by itself: leave --batched out"),
    (("bench", "--models", "resnet"), "unknown model 'resnet': choose from logistic, mlp, nn, cnn, cifar-cnn, mlp-LAYERSxWIDTH"),
    (("bench", "--models", "mlp-0x8"), "unknown model 'mlp-0x8'"),
    (("bench", "--models", "nn", "--sweep", "depth"), "--sweep depth has its own networks: leave --models out"),
    (("bench", "--batch-size", "64,0"), "--batch-size takes whole numbers from 1 to 1,000,000 separated by commas, not '0'"),
    (("bench", "--models", "nn", "--sweep", "convolutions"), "--sweep convolutions has its own networks: leave --models out"),
    (("bench", "--sweep", "time"), "'depth', 'convolutions', 'width', 'batch'"),
    (("bench", "--models", "vgg-6x8"), "vgg-LAYERSxWIDTH such as vgg-16x32, its layers a multiple of 4"),
    (("bench", "--optimizer", "sgd,lion"), "unknown optimizer 'lion': choose from sgd, momentum, adam, adamw"),
    (("bench", "--arms", "plain,evolution"), "unknown arm 'evolution'"),
    (("bench", "--arms", "forward(tangents=0)"), "the arm 'forward(tangents=0)' cannot be used: tangents must be"),
    (("bench", "--arms", "forward(tangents=2"), "cannot read the estimator"),
    (("bench", "--layout", "diagonal"), "'contiguous', 'channels-last'"),
    (("bench", "--rounds", "4"), "--rounds"),
    (("bench", "--repeats", "9"), "--repeats must be 0, or an even number of at least 10, not 9"),
    (("bench", "--repeats", "-2"), "--repeats must be 0"),
    (("bench", "--cosine", "0.5,1"), "--cosine takes numbers between 0 and 1"),
    (("bench", "--cosine", "half"), "--cosine takes numbers separated by commas"),
    (("bench", "--threads", "0"), "--threads"),
    (("bench", "--device", "cuda:77"), "no GPU for --device cuda:77"),
    (("quality", "--estimators", "evolution"), "the estimator 'evolution' cannot be used: unknown estimator 'evolution'"),
    (("quality", "--estimators", "forward(clip=-1)"), "clip must be a number above 0, not -1"),
    (("quality", "--estimators", "forward(clip"), "cannot read the estimator 'forward(clip'"),
    (("quality", "--estimators", "forward; forward(tangents=2)"), "the same estimator is there twice"),
    (("quality", "--tangents", "0"), "--tangents takes whole numbers of at least 1"),
    (("quality", "--tangents", "1,many"), "--tangents takes whole numbers of at least 1"),
    (("quality", "--repeats", "9"), "--repeats must be an even number of at least 10, not 9"),
    (("quality", "--data", "digits", "--model", "mlp", "--batch-size", "2000"), "needs more than the 1,077 examples"),
    (("report", "NOWHERE"), "not an output folder of forwardgrad"),
    (("watch", "NOWHERE"), "not an output folder of forwardgrad"),
    (("data", "fetch", "imagenet"), "imagenet"),
    (("tarin",), "train"),
    (("train", "--data", "digits", "--model", "logistc"), "unknown model 'logistc': choose one of logistic, mlp"),
    (("train", "--learning-rate", "1"), "--learning-rate"),
    (("train", "--data", "digits", "--lr", "1e300"), "at most 1e+30"),
    (("train", "--data", "digits", "--epochs", "1000000000000"), "at most 1,000,000"),
    (("train", "--data", "digits", "--optimizer", "adam", "--momentum", "0.9"), "Adam takes no momentum"),
    (("train", "--data", "digits", "--optimizer", "sgd", "--beta1", "0.5"), "sgd takes no beta1"),
    (("train", "--data", "digits", "--out", ""), "not the current folder"),
    (("reproduce", "table1", "--rows", ","), "no row ''"),
    (("data", "verify", "digits"), "choose from mnist, cifar10"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_a_mistake_is_one_sentence_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORWARDGRAD_DATA", raising=False)
    (tmp_path / "FILE").write_text("")
    status, _, err = run(monkeypatch, capsys, *arguments)
    told = [line for line in err.strip().splitlines() if line.startswith("forwardgrad: ")]
    assert status == 2
    assert len(told) == 1
    assert words in told[0]
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("run.json"))  # nothing half-written


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path / "out") if a == "OUT" else a for a in DIGITS]

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, _, err = run(monkeypatch, capsys, *arguments)
    assert status == 2
    assert "forwardgrad: cannot write to the output folder" in err
    assert "(No space left on device)" in err
    monkeypatch.undo()
    assert run(monkeypatch, capsys, *arguments)[0] == 0


DAMAGE = [
    ("runs/*/result.json", "{}"),
    ("runs/*/result.json", '{"status": 3}'),
    ("runs/*/result.json", "[]"),
    ("runs/*/result.json", "\x00\xff"),
    ("runs/*/run.json", "{}"),
    ("runs/*/evaluations.csv", "step\n1\n"),
    ("runs/*/evaluations.csv", ""),
    ("runs/*/losses.csv.gz", "not gzip"),
    ("studies/tune.json", "{}"),
    ("studies/tune.json", '{"schema": 1, "name": "tune", "title": "", "arms": 3}'),
    ("studies/tune.json", '{"schema": 1, "name": "tune", "title": "", "arms": [{}]}'),
    ("studies/tune.json", '{"schema": 99}'),
    ("cost.json", "{"),
    ("cost.json", '{"schema": 1}'),
    ("bench.json", "{"),
    ("bench.json", '{"schema": 1}'),
    ("bench.json", '{"schema": 1, "environment": {}, "cases": [{"model": "nn"}]}'),
    ("functions.json", '{"schema": 1, "functions": [1]}'),
    ("quality.json", '{"schema": 1}'),
    ("layers.json", '{"schema": 1}'),
    ("layers.json", '{"schema": 1, "environment": {}, "measurements": [{"arms": [{}]}]}'),
    ("quality.json", '{"schema": 1, "environment": {}, "settings": [{"model": "nn"}]}'),
]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned")
    words = "tune --data digits --model logistic --estimator backprop --lr 0.1 --epochs 1 --tuning-epochs 1 --out"
    subprocess.run([sys.executable, "-m", "forwardgrad", *words.split(), str(out)], check=True, capture_output=True)
    return out


@pytest.mark.parametrize(("name", "content"), DAMAGE)
def test_a_damaged_store_is_one_sentence(
    tmp_path: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    shutil.copytree(tuned, tmp_path / "out")
    for path in list((tmp_path / "out").glob(name)) or [tmp_path / "out" / name]:
        path.write_text(content)
    status, _, err = run(monkeypatch, capsys, "report", tmp_path / "out")
    assert status == 2
    assert err.startswith("forwardgrad: ")
    assert len(err.splitlines()) == 1
    assert Path(name).name in err
    if not name.startswith("runs"):
        assert "delete the folder" not in err  # the folder is that of every run
