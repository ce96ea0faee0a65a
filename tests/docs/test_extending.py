"""docs/extending.md runs as it stands: the walk through a step, the methods of one's own, the commands, the study and the checks."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.support.command import run
from torch import nn

import forwardgrad as fg
from forwardgrad.testing import CASES, check_estimator

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


class Block(NamedTuple):
    """A piece of code of the page; `file` is where its first line says that it belongs."""

    language: str
    code: str
    file: str


def blocks() -> list[Block]:
    found = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [Block(language, code, "".join(re.findall(r"\A# (\w+\.py)\n", code))) for language, code in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a reader who did what the page says."""
    where, before = tmp_path_factory.mktemp("reader"), list(sys.path)
    for block in blocks():
        if block.file:
            with (where / block.file).open("a", encoding="utf-8") as file:
                file.write(block.code)
    sys.path.insert(0, str(where))
    yield where
    sys.path[:] = before
    for name in ("mymethods", "mystudy"):
        sys.modules.pop(name, None)


def test_the_page_has_what_it_is_for() -> None:
    assert {block.file for block in blocks()} == {"", "mymethods.py", "mystudy.py", "test_mymethods.py"}
    assert sum(block.language == "sh" for block in blocks()) == 2


def test_the_python_of_the_page_runs(folder: Path) -> None:
    printed: list[str] = []
    names: dict[str, Any] = {"__name__": "reader", "print": printed.append}
    (folder / "reader.py").write_text("")
    sys.modules["reader"] = type(sys)("reader")  # dataclasses look their module up
    for block in blocks():
        if block.language == "python" and not block.file:
            exec(compile(block.code, "extending.md", "exec"), names)
    del sys.modules["reader"]
    assert printed


@pytest.mark.full
def test_the_noise_of_a_column_is_what_the_page_says(folder: Path) -> None:
    from mymethods import Column  # type: ignore[import-not-found]

    model = nn.Linear(3, 2, bias=False).double()  # n = 3, m = 2
    x = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(4, 3)
    estimator = fg.ForwardGradient(perturb=Column())
    found = fg.quality(lambda m: m(x).exp().mean(), model, estimator, generator=torch.Generator().manual_seed(0), repeats=4000)
    assert found.total.variance.low < 3 * (2 + 2) - 1 < found.total.variance.high


@pytest.mark.full
def test_steps_with_the_methods_of_the_page_compile(folder: Path) -> None:
    from mymethods import Blockwise, Column

    for estimator in (Blockwise(), fg.ForwardGradient(perturb=Column())):
        check_estimator(estimator, cases=CASES[:1], repeats=100, compiled=True)


COMMANDS = [line for block in blocks() if block.language == "sh" for line in block.code.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_run(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    program, *arguments = shlex.split(command)
    assert program == "forwardgrad"
    status, _, err = run(monkeypatch, capsys, *arguments)
    assert status == 0, err
    out = folder / ("study" if "study" in arguments else "runs")
    stored = [json.loads(path.read_text()) for path in out.rglob("run.json")]
    assert stored
    assert all("mymethods:" in json.dumps(one["estimator"]) and re.fullmatch("[0-9a-f]{12}", one["code"]) for one in stored)


def test_the_tests_of_the_page_pass(folder: Path) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "-k", "tangents and (mlp or JSON)"]
    command = [sys.executable, "-m", "pytest", *options, "test_mymethods.py"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
