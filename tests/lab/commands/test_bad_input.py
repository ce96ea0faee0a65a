"""Every command of the command line, given something bad: one sentence, status 2, and an output folder that is as it was, to the byte."""

import hashlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.command import run

from forwardgrad.lab import cli

ROOT = Path(__file__).resolve().parents[3]
PARTS = """
import torch
from torch import nn
from forwardgrad.lab import Length
from forwardgrad.lab import Optimizer, Run
from forwardgrad.lab import Arm, Study

def table(seed):
    inputs = torch.randn(300, 4, generator=torch.Generator().manual_seed(seed))
    return {"train": (inputs[:200], (inputs[:200, 0] > 0).long()), "test": (inputs[200:], (inputs[200:, 0] > 0).long())}

def model():
    return nn.Linear(4, 2)

def no_model():
    return "a model"

def model_raises():
    raise KeyError("nowhere")

def data_raise(seed):
    raise OSError("no table here")

def data_break(seed):
    return table(seed)["valid"]

def half(seed):
    return {"train": table(seed)["train"]}

def optimizer(parameters, lr):
    raise TypeError("no such optimizer")

def study(name: str = "table1", first: str = "model", data: str = "table", optimizer: str = "sgd", rates: tuple = (0.1, 0.2)) -> Study:
    made = []
    for arm, build in (("nn-sgd-forward", "model"), ("nn-sgd-backprop", first)):
        run = Run(f"bad_parts:{data}", f"bad_parts:{build}", {"name": "backprop"}, Optimizer(optimizer, 0.1))
        made.append(Arm(arm, "g", arm, arm, run, {"lr": rates}))
    return Study(name, "Mine", tuple(made), 2, Length(steps=20), Length(steps=40))
"""
OUT = ("--out", "OUT")
RECIPES = ("all", "table1", "figure1", "figure2", "baydin", "beyond", "noise", "faster", "passes", "finetune")
NO_DATA = ("--data-dir", "NOWHERE")
NO_GPU = ("--device", "cuda:77")
MINE = ("study", "bad_parts.py")
BAD: list[tuple[str, ...]] = [
    ("train", *NO_DATA, *OUT),
    ("train", *NO_GPU, *OUT),
    ("train", "--data", "digits", "--model", "cnn", *OUT),
    ("train", "--data", "digits", "--estimator", "forward(tangents=0)", *OUT),
    ("train", "--data", "digits", "--lr", "nan", *OUT),
    ("train", "--data", "digits", "--model", "logistic", "--ranks", "3", "--directions", "2", *OUT),
    ("train", "--data", "digits", "--model", "logistic", "--ranks", "2", "--directions", "2", "--estimator", "backprop", *OUT),
    ("train", "--data", "digits", "--model", "logistic", "--lost-rank", "go-on", *OUT),
    ("train", "--data", "digits", "--model", "logistic", "--ranks", "2", "--lost-rank", "wait", *OUT),
    ("tune", "--lr", "0.1", "--data", "digits", "--model", "logistic", "--ranks", "2", "--directions", "2", *OUT),
    ("train", "--data", "digits", "--model", "logistic", "--start-from", "NOWHERE", *OUT),
    ("train", "--data", "digits", "--model", "gpt-1x64", *OUT),
    ("tune", "--lr", "0.1", *NO_DATA, *OUT),
    ("tune", "--lr", "0.1", *NO_GPU, *OUT),
    ("tune", "--lr", "0.1,-1", "--data", "digits", *OUT),
    ("tune", "--lr", "0.1", "--data", "digits", "--model", "cnn", *OUT),
    ("tune", "--lr", "0.1", "--data", "digits", "--seeds", "0", *OUT),
    ("check", "nowhere:factory", "--seconds", "1"),
    ("check", "bad_parts.py:missing", "--seconds", "1"),
    ("check", "bad_parts.py:no_model", "--estimator", "forward(tangents=0)", "--seconds", "1"),
    ("demo", "--epochs", "0", *OUT),
    ("demo", "--jobs", "none", *OUT),
    (*MINE, *NO_GPU, *OUT),
    (*MINE, "--set", "first=no_model", *OUT),
    (*MINE, "--set", "first=model_raises", *OUT),
    (*MINE, "--set", "first=missing", *OUT),
    (*MINE, "--set", "data=data_raise", *OUT),
    (*MINE, "--set", "data=data_break", *OUT),
    (*MINE, "--set", "data=half", *OUT),
    (*MINE, "--set", "optimizer=bad_parts:optimizer", *OUT),
    (*MINE, "--set", "rates=(0.1,-1.0)", *OUT),
    (*MINE, "--set", "name=../table1", *OUT),
    (*MINE, "--ranks", "2", "--directions", "2", *OUT),
    (*MINE, "--set", "first=model_raises", "--budget", *OUT),
    ("study", "missing.py", *OUT),
    *(
        ("reproduce", recipe, *bad, *OUT)
        for recipe in RECIPES
        for bad in (NO_DATA, NO_GPU, ("--seeds", "0"), (*NO_DATA, "--seeds", "2"), (*NO_DATA, "--engine", "compile"))
    ),
    ("reproduce", "all", "--budget", "small", *NO_DATA, *OUT),
    ("reproduce", "table1", "--rows", "nn", "--epochs", "2", *NO_DATA, *OUT),
    ("reproduce", "table1", "--rows", "imagenet", *OUT),
    ("reproduce", "beyond", "--retune", *OUT),
    ("reproduce", "passes", "--rows", "mezo", *OUT),
    ("reproduce", "passes", "--epochs", "2", *OUT),
    ("bench", *NO_GPU, *OUT),
    ("bench", "--models", "resnet", *OUT),
    ("bench", "--arms", "evolution", *OUT),
    ("bench", "--repeats", "9", *OUT),
    ("bench", "--optimizer", "lion", *OUT),
    ("bench", "--models", "logistic", "--loss", "parts", *OUT),
    ("bench", "--models", "bert-2x64", "--loss", "parts", "--memory-only", *OUT),
    ("bench", "--models", "logistic", "--memory-only", *NO_GPU, *OUT),
    ("quality", *NO_DATA, *OUT),
    ("quality", *NO_GPU, "--data", "digits", *OUT),
    ("quality", "--estimators", "evolution", *OUT),
    ("quality", "--data", "digits", "--model", "mlp", "--batch-size", "2000", *OUT),
    ("finetune", "NOWHERE", "--data", "rows.csv", *OUT),
    ("layers", "NOWHERE"),
    ("layers", "OUT", "nobody"),
    ("layers", "OUT", "--l2", "0"),
    ("layers", "OUT", "--estimator", "evolution"),
    ("report", "NOWHERE"),
    ("report", "OUT", "--pages", "3"),
    ("list", "OUT", "--status", "lost"),
    ("list", "OUT", "--csv", "NOWHERE/runs.csv"),
    ("watch", "NOWHERE"),
    ("watch", "OUT", "--twice"),
    ("pack", "NOWHERE"),
    ("pack", "OUT", "--thinner"),
    ("write", "NOWHERE"),
    ("write", "OUT"),
    ("write", "OUT", "--temperature", "nan"),
    ("replay", "NOWHERE"),
    ("replay", "OUT"),
    ("replay", "OUT", "--step", "0"),
    ("record", "list", "NOWHERE"),
    ("record", "claim", "OUT", "--task", "imagenet", "--who", "nobody", "--out", "claim.json"),
    ("record", "verify", "NOWHERE"),
    ("estimators", *OUT),
    ("data", "fetch", "imagenet"),
    ("data", "fetch", "mnist", "imagenet", "--data-dir", "OUT"),
    ("data", "verify", "--data-dir", "OUT"),
]
DAMAGED: list[tuple[str, ...]] = [
    ("tune", "--lr", "0.1", "--data", "digits", "--model", "logistic", *OUT),
    ("demo", *OUT),
    (*MINE, *OUT),
    *(("reproduce", recipe, *OUT) for recipe in RECIPES),
    ("bench", "--models", "logistic", *OUT),
    ("quality", "--data", "digits", "--model", "logistic", *OUT),
    ("layers", "OUT"),
    ("report", "OUT"),
    ("list", "OUT"),
    ("watch", "OUT"),
]


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "__pycache__"]  # which Python itself writes
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A copy of the published results as an output folder, and the digest of every file in it."""
    folder = tmp_path_factory.mktemp("clone") / "out"
    shutil.copytree(ROOT / "results", folder)
    (folder / "bad_parts.py").write_text(PARTS)
    return folder, digests(folder)


@pytest.fixture(autouse=True)
def _clean_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("FORWARDGRAD_DATA", raising=False)
    yield
    sys.modules.pop("bad_parts", None)


def told(
    words: tuple[str, ...], out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> tuple[int, list[str]]:
    """The status of a command and what it says."""
    places = {"OUT": str(out), "NOWHERE": str(tmp_path / "nowhere"), "bad_parts.py": str(out / "bad_parts.py")}
    monkeypatch.chdir(tmp_path)
    status, _, err = run(monkeypatch, capsys, *(places.get(word, word) for word in words))
    assert "Traceback" not in err
    return status, [line for line in err.splitlines() if line.startswith("forwardgrad: ")]


@pytest.mark.parametrize("words", BAD, ids=" ".join)
def test_a_bad_input_leaves_the_output_folder_as_it_was(
    published: tuple[Path, dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: tuple[str, ...],
) -> None:
    out, before = published
    status, said = told(words, out, monkeypatch, capsys, tmp_path)
    assert (status, len(said)) == (2, 1), said
    assert digests(out) == before


@pytest.mark.parametrize("name", ["studies/table1.json", "studies/another.json"])
@pytest.mark.parametrize("words", DAMAGED, ids=" ".join)
def test_an_output_folder_with_a_damaged_record_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...], name: str
) -> None:
    out = tmp_path / "out"
    for part in ("runs", "studies"):
        (out / part).mkdir(parents=True)
    (out / "bad_parts.py").write_text(PARTS)
    (out / name).write_text('{"schema": 1, "na')
    before = digests(out)
    status, said = told(words, out, monkeypatch, capsys, tmp_path)
    assert (status, len(said)) == (2, 1), said
    assert f"{Path(name).name} is damaged" in said[0]
    assert digests(out) == before


def test_every_command_is_given_something_bad() -> None:
    commands = {info.name or info.callback.__name__ for info in cli.app.registered_commands if info.callback}
    assert commands | {"data", "record"} == {words[0] for words in BAD}
    recipes = {words[1] for words in BAD if words[0] == "reproduce"}
    assert recipes == set(RECIPES)
    assert {words[1] for words in BAD if words[0] == "data"} == {"fetch", "verify"}
    assert {words[1] for words in BAD if words[0] == "record"} == {"list", "claim", "verify"}
