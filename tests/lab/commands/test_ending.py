"""How commands end for a job script: nothing is chosen where nothing finished, and the status tells failures and divergence apart."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.command import run

from forwardgrad.lab.store.standing import snapshot
from forwardgrad.lab.store.store import Store

STUDY = """
import torch
from torch import nn
from forwardgrad.lab import Length
from forwardgrad.lab import Optimizer, Run
from forwardgrad.lab import Arm, Study

def table(seed):
    inputs, noise = torch.randn(2, 300, 4, generator=torch.Generator().manual_seed(seed))
    labels = (inputs[:, 0] + noise[:, 0] > 0).LABELS()
    return {"train": (inputs[:200], labels[:200]), "test": (inputs[200:], labels[200:])}

def fine():
    return nn.Linear(4, 2)

class Broken(nn.Linear):
    def forward(self, inputs):
        if len(inputs) == 64:
            raise ValueError("no such luck")
        return super().forward(inputs)

def broken():
    return Broken(4, 2)

def study(first: str = "fine", second: str = "fine", rates: tuple = (0.1, 0.2), tuned: bool = True) -> Study:
    made = []
    for name, model, estimator in (("one", first, "backprop"), ("two", second, "forward")):
        run = Run("STEM:table", f"STEM:{model}", {"name": estimator}, Optimizer("sgd", rates[0]))
        made.append(Arm(name, "g", name, name, run, {"lr": rates} if tuned else {}))
    return Study("mine", "Mine", tuple(made), 2, Length(steps=20), Length(steps=120))
"""
EXPLODES = "rates=(1e20, 1e21)"
SINGLE = ("train", "--data", "digits", "--model", "logistic", "--epochs", "4", "--estimator", "backprop")


@pytest.fixture(autouse=True)
def _clean_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.startswith("ends_")]:
        del sys.modules[name]


def written(tmp_path: Path, labels: str = "long") -> Path:
    path = tmp_path / f"ends_{labels}.py"
    path.write_text(STUDY.replace("LABELS", labels).replace("STEM", path.stem))
    return path


def arms(out: Path) -> dict[str, dict[str, Any]]:
    return {arm["name"]: arm for arm in json.loads((out / "studies" / "mine.json").read_text())["arms"]}


def last(err: str) -> str:
    """The one sentence of a command's end."""
    (told,) = [line for line in err.splitlines() if line.startswith("forwardgrad: ")]
    return told


def test_where_every_run_failed_nothing_is_chosen_and_nothing_trained_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "an out"
    status, printed, err = run(monkeypatch, capsys, "study", written(tmp_path, "float"), "--out", out)
    assert status == 1
    assert last(err).startswith("forwardgrad: no run of mine finished: nothing was chosen, and nothing trained further; error.txt")
    assert f"'{out / 'runs'}'" in last(err)
    assert printed == f"report: {out / 'report.html'}\n"
    for arm in arms(out).values():
        assert (arm["runs"], arm["chosen"]["values"], arm["no_winner"]) == ([], {}, "all 2 trials failed")
    assert len(Store(out).runs()) == 4  # the trials
    assert snapshot(Store(out)).complete  # nobody waits for runs that there will not be
    assert "no winner (all 2 trials failed)" in (out / "report.md").read_text()


def test_an_arm_without_a_winner_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = written(tmp_path), tmp_path / "out"
    status, _, err = run(monkeypatch, capsys, "study", path, "--set", "second=broken", "--out", out)
    assert status == 1
    told = "2 of 6 runs failed, and no winner was chosen, and nothing trained further, for two of mine (all 2 trials failed); error.txt"
    assert told in last(err)
    assert [len(arms(out)[name]["runs"]) for name in ("one", "two")] == [2, 0]
    assert arms(out)["one"]["chosen"]["values"] == {"lr": 0.2}
    report = (out / "report.md").read_text()
    assert "no winner (all 2 trials failed)" in report


def test_a_final_run_that_failed_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--set", "second=broken", "--set", "tuned=False", "--out", tmp_path / "out")
    status, _, err = run(monkeypatch, capsys, "study", written(tmp_path), *words)
    assert status == 1
    assert last(err).startswith("forwardgrad: 2 of 4 runs failed; error.txt in the folders below")


def test_divergence_has_a_status_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path)
    status, _, err = run(monkeypatch, capsys, "study", path, "--set", EXPLODES, "--out", tmp_path / "all")
    assert status == 3
    assert last(err) == "forwardgrad: no run of mine finished: nothing was chosen, and nothing trained further"
    assert arms(tmp_path / "all")["one"]["no_winner"] == "all 2 trials diverged"
    status, _, err = run(monkeypatch, capsys, "study", path, "--set", "rates=(0.1, 1e20)", "--out", tmp_path / "one")
    assert (status, "forwardgrad: " in err) == (0, False)  # a trial that diverged is a result of the search
    words = ("--set", EXPLODES, "--set", "tuned=False", "--out", tmp_path / "finals")
    assert run(monkeypatch, capsys, "study", path, *words)[0] == 0  # and so is a final run that did
    assert (tmp_path / "finals" / "report.md").read_text().count("diverged")


@pytest.mark.full
def test_where_all_diverged_the_space_is_still_widened_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text().replace("Length(steps=120))", "Length(steps=120), widen=1)"))
    status, _, _ = run(monkeypatch, capsys, "study", path, "--set", "rates=(0.1, 1e20)", "--set", "second=broken", "--out", tmp_path / "o")
    assert status == 1
    assert [len(arms(tmp_path / "o")[name]["trials"]) for name in ("one", "two")] == [4, 2]  # nothing is known of where to look for two
    status, _, _ = run(monkeypatch, capsys, "study", path, "--set", "rates=(1e10, 1e20)", "--out", tmp_path / "p")
    found = arms(tmp_path / "p")["one"]
    assert status == 0
    assert [trial["values"]["lr"] for trial in found["trials"]] == [1e10, 1e20, 1.0, 1e-10]
    assert found["chosen"]["values"] == {"lr": 1.0}


def test_train_tells_a_failure_from_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", tmp_path / "an out")
    assert run(monkeypatch, capsys, *SINGLE, "--lr", "0.1", *out)[0] == 0
    status, printed, err = run(monkeypatch, capsys, *SINGLE, "--lr", "1e20", *out)
    assert status == 3
    assert printed.startswith("diverged at step")
    assert re_step(last(err)) == re_step(printed)
    with monkeypatch.context() as patch:
        patch.setattr("forwardgrad.lab.training.loop.train_to_end", lambda *_: 1 / 0)
        status, printed, err = run(monkeypatch, capsys, *SINGLE, "--lr", "0.2", *out)
    assert status == 1
    assert printed.startswith("failed at step 0 (ZeroDivisionError")
    folder = printed.splitlines()[1]
    assert f"the run failed: '{folder}/error.txt' says why, and --retry-failed runs it again" in last(err)
    assert run(monkeypatch, capsys, *SINGLE, "--lr", "0.2", *out)[0] == 1  # it stays so until it is asked for again
    assert run(monkeypatch, capsys, *SINGLE, "--lr", "0.2", *out, "--retry-failed")[0] == 0


def re_step(text: str) -> str:
    return text.partition("at step ")[2].partition(" ")[0].rstrip(":")


@pytest.mark.parametrize("command", [(), ("train",), ("study",)])
def test_the_help_says_what_the_statuses_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    text = " ".join(run(monkeypatch, capsys, *command, "--help")[1].split())
    assert "Exit status: 0" in text
    assert "diverged" in text
