"""The pages of the site are true: their Python runs, their commands parse, and the tests and names that they cite exist.

docs/extending.md, docs/results.md and docs/studies.md have tests of their own, since their code is about files and a store.
"""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import tomllib
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tests.support.command import run

import forwardgrad as fg
from forwardgrad.estimators import from_config
from forwardgrad.lab.cli import app
from forwardgrad.lab.studies import parse_estimator

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
ELSEWHERE = {"extending.md", "results.md", "studies.md"}
THEIRS = (  # warnings of the frameworks that docs/integrations.md is about: no GPU, few workers, what they themselves are to change
    ".*'pin_memory' argument is set as true|.*does not have many workers|The number of training batches|The `srun` command is available"
    "|.*LeafSpec|`is_gradient_checkpointing` is deprecated"
)
OTHERS = {"MALLOC_MMAP_MAX_=0"}  # a reader's own script


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def with_python() -> list[Path]:
    return [page for page in PAGES if blocks(page, "python") and page.name not in ELSEWHERE]


def commands(page: Path) -> Iterator[str]:
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.partition("#")[0].strip():
                yield line
    yield from re.findall(r"^ {4,}((?:forwardgrad|make|pip|\.venv/bin/pytest) .*)$", page.read_text(encoding="utf-8"), re.MULTILINE)


def every_command() -> list[Any]:
    return [pytest.param(line, id=f"{page.name}: {line[:60]}") for page in PAGES for line in dict.fromkeys(commands(page))]


@pytest.mark.parametrize("page", with_python(), ids=lambda page: page.name)
def test_python_runs_in_its_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"print": lambda *words: None, "__name__": "page"}
    text = page.read_text(encoding="utf-8")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "derivatives of .* are made by torch's own forward mode", UserWarning)  # the page says so
        warnings.filterwarnings("ignore", THEIRS)
        torch.manual_seed(0)
        for block in blocks(page, "python"):
            above = text[: text.index(block)].count("\n")
            exec(compile("\n" * above + block, str(page), "exec", dont_inherit=True), names)


@pytest.mark.parametrize("line", every_command())
def test_a_command_is_one_that_there_is(line: str) -> None:
    words = shlex.split(line, comments=True)
    for option, text in pairwise(words):
        if option == "--estimator" and ":" not in text:  # else it is a class of the reader's
            from_config(parse_estimator(text))
    if words[0] == "forwardgrad":
        parse(words[1:])
    elif words[0] == "make":
        assert re.search(rf"^{words[-1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        (name, _, extra) = words[2].rstrip("]").partition("[")
        assert name == "forwardgrad"
        assert not extra or extra in extras
    elif words[0] in ("python", ".venv/bin/pytest"):
        assert words[1] == "tests/test_x.py" or (ROOT / words[1]).is_file()
    elif words[0] == "torchrun" and "-m" in words:
        assert words[words.index("-m") + 1] == "forwardgrad"
        parse(words[words.index("-m") + 2 :])
    elif words[0] == "torchrun":
        assert (ROOT / words[-1]).is_file()
    else:
        assert words[0] in OTHERS or words[0] == ".ci/run"


def parse(words: list[str]) -> None:
    """Let the command line read the words, down to the last option, and run nothing."""
    command: Any = typer.main.get_command(app)
    context = None
    while hasattr(command, "commands"):
        name, *words = words
        if name.startswith("--"):
            return
        context = command.make_context(name, [], parent=context, resilient_parsing=True)
        command = command.commands[name]
    command.make_context(command.name, words, parent=context)


def test_a_command_that_there_is_not_is_found() -> None:
    for wrong in (["trian"], ["train", "--epoch", "1"], ["reproduce"]):
        with pytest.raises(Exception, match=r"trian|No such option|Missing parameter"):
            parse(wrong)


def test_every_test_that_a_page_names_exists() -> None:
    found = [(page, *names) for page in PAGES for names in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text(encoding="utf-8"))]
    assert len(found) > 20
    for page, file, name in found:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{page.name}: {file}::{name}"


def test_every_estimator_perturbation_and_law_is_in_the_tables() -> None:
    text = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    for kind in (*fg.ESTIMATORS, *fg.PERTURBATIONS, *fg.LAWS):
        assert re.search(rf"^\|.*`{kind.__name__}\(", text, re.MULTILINE), kind.__name__


def test_every_public_name_has_a_docstring_for_the_reference() -> None:
    for name in fg.__all__:
        if callable(found := getattr(fg, name)):
            assert inspect.getdoc(found), name


def test_no_page_asks_another_host() -> None:
    for page in [*PAGES, *(ROOT / "docs" / "_static").iterdir(), *(ROOT / "docs" / "pictures").glob("*.svg")]:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"(src|srcset|@import|url\()\W{0,3}https?://|!\[[^\]]*\]\(http", text), page.name


def short_commands() -> list[Any]:
    """Those that need no data and no file: docs/extending.md has a test that makes its own."""
    found = [case for case in every_command() if re.search(r"--data digits|^forwardgrad estimators", case.values[0])]
    return [case for case in found if "mymethods" not in case.values[0]]


@pytest.mark.parametrize("line", short_commands())
def test_a_short_command_runs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(monkeypatch, capsys, *shlex.split(line, comments=True)[1:])
    assert (status, bool(out)) == (0, True), err
