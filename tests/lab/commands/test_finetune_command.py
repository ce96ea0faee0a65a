"""`forwardgrad finetune` as a user calls it: mistakes are one sentence and status 2, and leave nothing behind."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from tests.support import language_models
from tests.support.command import run


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier's encoder, a language model, rows, and what is wrong with copies of them."""
    root = tmp_path_factory.mktemp("finetune")
    language_models.bert(root / "bert")
    language_models.reviews(root / "rows.csv", 16)
    (root / "strange.csv").write_text("text,label\nthe film is good,meh\n")
    (root / "one.csv").write_text("text,label\nthe film is good,pos\nthe film is fine,pos\n")
    (root / "texts.jsonl").write_text('{"text": "the film is good"}\n' * 2)
    (root / "empty").mkdir()
    for name in ("pickled", "code", "broken", "words", "adapted"):
        shutil.copytree(root / "bert", root / name)
    (root / "pickled" / "model.safetensors").rename(root / "pickled" / "pytorch_model.bin")
    config = json.loads((root / "bert" / "config.json").read_text())
    own = {**config, "model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (root / "code" / "config.json").write_text(json.dumps(own))
    (root / "broken" / "model.safetensors").write_bytes(b"\0" * 100)
    (root / "words" / "config.json").write_text(json.dumps({**config, "vocab_size": 8}))
    (root / "adapted" / "adapter_config.json").write_text("{}")
    (root / "taken").mkdir()
    (root / "taken" / "notes.txt").write_text("mine")
    return root


MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (("nowhere", "--data", "rows.csv"), "there is no folder nowhere: give one that holds config.json, safetensors and a tokenizer"),
    (("empty", "--data", "rows.csv"), "empty has no config.json"),
    (("pickled", "--data", "rows.csv"), "has no .safetensors file, only pytorch_model.bin, which is a pickle and is not read"),
    (("code", "--data", "rows.csv"), "the configuration of code cannot be read"),
    (("broken", "--data", "rows.csv"), "cannot be read as safetensors"),
    (("words", "--data", "rows.csv"), "words lacks weights of BertForSequenceClassification"),
    (("adapted", "--data", "rows.csv"), "adapted holds adapters: merge them into their model first"),
    (("bert", "--data", "nowhere.csv"), "there is no file nowhere.csv"),
    (("bert", "--data", "rows.csv", "--label-column", "stars"), "rows.csv has no column 'stars' for the label: it has 'text', 'label'"),
    (
        ("bert", "--data", "rows.csv", "--validation", "strange.csv"),
        "line 2 of strange.csv has the label 'meh', which no row to train",
    ),
    (("bert", "--data", "one.csv"), "all rows have the label 'pos'"),
    (("bert", "--data", "texts.jsonl"), "bert holds weights of BertModel, and no causal language model: give data with a label column"),
    (("bert", "--data", "rows.csv", "--estimator", "evolution"), "unknown estimator 'evolution': choose one of backprop"),
    (("bert", "--data", "rows.csv", "--estimator", "backprop(x=1)"), "backprop estimator has no option 'x'"),
    (("bert", "--data", "rows.csv", "--max-length", "64"), "--max-length 64 is more than the 32 tokens that bert takes"),
    (("bert", "--data", "rows.csv", "--lr", "0.1", "--weight-decay", "10"), "--weight-decay must be below 1/lr"),
    (("bert", "--data", "rows.csv", "--epochs", "1", "--seconds", "2"), "a run has one length"),
    (("bert", "--data", "rows.csv", "--score", "nowhere.py:f"), "nowhere.py is no file"),
    (("bert", "--data", "rows.csv", "--device", "cuda:77"), "no GPU for --device cuda:77"),
    (("bert", "--data", "rows.csv", "--out", "taken"), "taken holds other files, and no run of fine-tuning"),
    (("bert",), "--data"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else None)
def test_a_mistake_is_one_sentence(
    words: tuple[str, ...], said: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here)
    before = sorted(path.name for path in here.iterdir())
    status, _, err = run(monkeypatch, capsys, "finetune", *words)
    assert (status, err.count("\n"), "Traceback" in err) == (2, 1, False), err
    assert said in err
    assert sorted(path.name for path in here.iterdir()) == before


def test_without_the_packages_their_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, _, err = run(monkeypatch, capsys, "finetune", "model", "--data", "rows.csv")
    assert (status, "transformers cannot be imported" in err, "pip install 'forwardgrad[finetune]'" in err) == (2, True, True), err


def test_adapters_need_one_more(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setitem(sys.modules, "peft", None)
    status, _, err = run(monkeypatch, capsys, "finetune", "bert", "--data", "rows.csv", "--lora", "2")
    assert (status, "pip install 'forwardgrad[finetune]'" in err, err.count("\n")) == (2, True, 1), err


def test_a_run_from_command_to_folder(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here)
    words = (
        "finetune",
        "bert",
        "--data",
        "rows.csv",
        "--estimator",
        "zeroth-order",
        "--steps",
        "2",
        "--lr",
        "1e-3",
        "--out",
        tmp_path / "out",
    )
    status, out, err = run(monkeypatch, capsys, *words)
    assert status == 0, err
    assert [line.split()[0] for line in out.splitlines()] == ["classification:", "the", "memory:", "step", "step", "step", "the"]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["environment"]["command"].startswith("forwardgrad finetune bert --data rows.csv --estimator zeroth-order --steps 2")
    assert run(monkeypatch, capsys, *words)[1].splitlines()[-1].startswith("this run is finished")
    status, _, err = run(monkeypatch, capsys, *words[:-3], "2e-3", *words[-2:])
    assert (status, "holds another run (its lr is 0.001, not 0.002)" in err) == (2, True), err


def test_a_run_that_diverged_ends_with_status_3(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here)
    words = ("--estimator", "backprop", "--optimizer", "sgd", "--lr", "1e9", "--epochs", "4", "--out", tmp_path / "out")
    status, _, err = run(monkeypatch, capsys, "finetune", "bert", "--data", "rows.csv", *words)
    assert (status, "the run diverged at step" in err) == (3, True), err
