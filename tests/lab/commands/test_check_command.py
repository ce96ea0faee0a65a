"""forwardgrad check: the user's factory and estimator by path, the exit status, and one sentence for what cannot be used."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.command import run

FACTORY = """
from dataclasses import dataclass
import torch
from torch import nn
import forwardgrad as fg

def good():
    x = torch.randn(16, 4)
    y = (x.sum(1) > 0).long()
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), lambda model: nn.functional.cross_entropy(model(x), y)

class Product(nn.Module):
    def forward(self, x):
        return x.scatter_reduce(1, torch.zeros_like(x, dtype=torch.int64), x, "prod")

def product():
    return nn.Sequential(nn.Linear(4, 3), Product()), lambda model: model(torch.randn(16, 4)).square().mean()

def swapped():
    return tuple(reversed(good()))

def alone():
    return good()[0]

def stops():
    raise RuntimeError("no data")

def frozen():
    return nn.ReLU(), good()[1]

@dataclass(frozen=True)
class Half(fg.ForwardGradient):
    name = "half"

    def estimate(self, objective, generator, state):
        record, gradients = super().estimate(objective, generator, state)
        return record, {name: None if "2.weight" in name else g for name, g in gradients.items()}

def nothing():
    return 3
"""


@pytest.fixture
def factory(tmp_path: Path) -> Iterator[Path]:
    path, before = tmp_path / "checked_factory.py", list(sys.path)
    path.write_text(FACTORY)
    yield path
    sys.path[:] = before
    sys.modules.pop(path.stem, None)


def test_a_check_that_passes_ends_with_status_0_and_writes_its_findings(
    factory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    status, out, err = run(monkeypatch, capsys, "check", f"{factory}:good", "--seconds", 0.5, "--json", file)
    assert (status, err) == (0, "")
    assert out.startswith("ForwardGradient(): passed")
    assert json.loads(file.read_text())["passed"] is True


def test_an_import_path_starts_from_the_current_folder(
    factory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(factory.parent)
    assert run(monkeypatch, capsys, "check", "checked_factory:good", "--seconds", 0.1, "--estimator", "backprop")[0] == 0


@pytest.mark.parametrize(
    ("name", "estimator", "words"),
    [("product", "forward", "in module '1' (Product)"), ("good", "FILE:Half(tangents=2)", "2.weight never gets an estimate")],
)
def test_a_fault_ends_with_status_1(
    name: str, estimator: str, words: str, factory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = estimator.replace("FILE", str(factory))
    status, out, _ = run(monkeypatch, capsys, "check", f"{factory}:{name}", "--seconds", 0.1, "--estimator", text)
    assert status == 1
    assert words in out


MISTAKES = [
    (("FILE:swapped",), "returns (function, Sequential): return (model, loss), a torch.nn.Module and a function of it"),
    (("FILE:alone",), "returns Sequential: return (model, loss), the loss a function of the model"),
    (("FILE:stops",), "stops with RuntimeError: no data"),
    (("FILE:frozen",), "nothing to train"),
    (("FILE:absent",), "has no 'absent'"),
    (("FILE",), "is no import path: write module:name or FILE.py:name"),
    (("nowhere.py:good",), "nowhere.py is no file"),
    (("no_such_module_here:good",), "cannot be imported"),
    (("FILE:good", "--estimator", "evolution"), "unknown estimator 'evolution'"),
    (("FILE:good", "--estimator", "forward(tangents=0)"), "tangents must be a whole number of at least 1, not 0"),
    (("FILE:good", "--estimator", "FILE:nothing"), "makes int: it has to be a forwardgrad.Estimator"),
    (("FILE:good", "--estimator", "FILE:Half(width=2)"), "has no option 'width': its options are tangents, law"),
    (("FILE:good", "--estimator", "forward(perturb=FILE:Half)"), "is no subclass of forwardgrad.Perturbation"),
    (("FILE:good", "--estimator", "forward(law=nowhere_at_all:Law)"), "the law 'nowhere_at_all:Law' cannot be imported"),
    (("FILE:good", "--estimator", "forward(law=FILE:Lost(a=1))"), "has no 'Lost'"),
    (("FILE:good", "--seconds", "0"), "--seconds must be a number above 0"),
    (("FILE:good", "--json", "nowhere/found.json"), "there is no folder nowhere"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_what_cannot_be_used_is_one_sentence_and_status_2(
    arguments: tuple[str, ...], words: str, factory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.replace("FILE", str(factory)) for word in arguments]
    status, out, err = run(monkeypatch, capsys, "check", *given)
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
