"""A user's study file: the example of the documentation from the command line, and every mistake in one sentence."""

import json
import re
import sys
from pathlib import Path

import pytest
from tests.support.command import run

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies.study_file import load

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "spirals.py"
GOOD = """
from forwardgrad.lab import Optimizer, Run
from forwardgrad.lab import Arm, Study

def mine(seeds: int = 1, name: str = "a") -> Study:
    run = Run("digits", "logistic", {"name": "backprop"}, Optimizer("sgd", 0.5), epochs=1)
    return Study("mine", "Mine", (Arm(name, "g", "backprop", "b", run),), seeds)
"""


@pytest.fixture(autouse=True)
def _clean_imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a study's file adds to where Python looks is taken away again."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    monkeypatch.setattr(sys, "modules", sys.modules)  # the same object: only what is new in it goes
    yield  # type: ignore[misc]
    for name in set(sys.modules) - before:
        if "." not in name and str(getattr(sys.modules[name], "__file__", "") or "").startswith((str(tmp_path), str(EXAMPLE.parent))):
            del sys.modules[name]


def written(tmp_path: Path, text: str, name: str = "my_study.py") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_the_study_of_a_file_with_its_arguments_set(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    study, folder = load(path, {"seeds": "3", "name": "b"})
    assert (study.seeds, study.arms[0].name, folder) == (3, "b", tmp_path)
    assert load(f"{path}:mine", {})[0].seeds == 1


@pytest.mark.parametrize(
    ("imported", "name"), [("import forwardgrad.lab as lab", "lab.Study"), ("import forwardgrad.lab", "forwardgrad.lab.Study")]
)
def test_annotations_that_are_text_are_understood_however_study_was_imported(tmp_path: Path, imported: str, name: str) -> None:
    text = f"from __future__ import annotations\n{imported}\n{GOOD}".replace("-> Study", f"-> {name}")
    assert load(written(tmp_path, text), {})[0].name == "mine"


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        (GOOD, {"seed": "3"}, "has no argument 'seed': it has seeds, name"),
        (GOOD, {"seeds": "0"}, "the number of seeds must be a whole number and at least 1"),
        (GOOD.replace("seeds: int = 1", "seeds: int"), {}, "needs 'seeds': give it with --set seeds=VALUE"),
        ("x = 1", {}, "has no study: write a function whose return annotation is Study"),
        ("def f(:", {}, r"is no Python that can be read \(line 1"),
        ("import missing_package", {}, "stops at line 1 with ModuleNotFoundError"),
        ("from forwardgrad.lab.run import Run", {}, r"'forwardgrad.lab.run'; a study imports what it needs from forwardgrad.lab itself"),
        (GOOD.replace("    run = ", "    1 / 0\n    run = "), {}, "stops at line 6 with ZeroDivisionError: division by zero"),
        (
            GOOD.replace("return Study", "return [Study").replace("seeds)", "seeds)]"),
            {},
            "returns list: return a forwardgrad.lab.Study",
        ),
        (GOOD + GOOD.replace("mine(", "other("), {}, "has 2 studies, mine, other: name one as my_study.py:mine"),
        (GOOD.replace('"logistic"', '"resnet"'), {}, "unknown model 'resnet'"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, settings: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(written(tmp_path, text), settings)


@pytest.mark.parametrize(
    ("name", "words"),
    [("missing.py", "is no Python file"), ("my-study.py", "cannot be imported under its name"), ("json.py", "the name of another module")],
)
def test_a_file_that_cannot_be_imported(tmp_path: Path, name: str, words: str) -> None:
    if name != "missing.py":
        written(tmp_path, GOOD, name)
    with pytest.raises(UserError, match=words):
        load(str(tmp_path / name), {})


@pytest.mark.full
def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--set", "trials=2", "--set", "seeds=1", "--set", "passes=2400", "--out", tmp_path)
    status, out, _ = run(monkeypatch, capsys, "study", EXAMPLE, *few, "--budget")
    assert status == 0
    assert "9 runs" in out
    assert not list(tmp_path.iterdir())  # an estimate leaves nothing
    status, out, err = run(monkeypatch, capsys, "study", EXAMPLE, *few)
    assert (status, out) == (0, f"report: {tmp_path / 'report.html'}\n"), err
    record = json.loads((tmp_path / "studies" / "spirals.json").read_text())
    assert len({len(arm["trials"]) for arm in record["arms"]}) == 1  # widened or not, every arm had as many
    assert [len(arm["runs"]) for arm in record["arms"]] == [1, 1, 1]
    results = [json.loads((tmp_path / "runs" / name / "result.json").read_text()) for arm in record["arms"] for name in arm["runs"]]
    assert [result["steps"] for result in results] == [800, 480, 1200]  # 2,400 forward passes, three, five, two a step
    assert all(result["test"]["accuracy"] > 0.6 for result in results)


def test_a_study_from_the_command_line_and_what_is_wrong_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, GOOD)
    out = tmp_path / "out"
    assert run(monkeypatch, capsys, "study", path, "--out", out)[0] == 0
    for arguments, words in (((path, "--set", "seeds"), "--set takes NAME=VALUE"), ((tmp_path / "no.py",), "is no Python file")):
        status, _, err = run(monkeypatch, capsys, "study", *arguments, "--out", out)
        assert status == 2
        assert words in err
        assert err.count("\n") == 1


def test_the_documentation_quotes_the_example() -> None:
    document = (EXAMPLE.parents[1] / "docs" / "studies.md").read_text()
    (quoted,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    assert EXAMPLE.read_text().endswith(quoted)
    assert f"a whole one in {len(EXAMPLE.read_text().splitlines())} lines" in document
