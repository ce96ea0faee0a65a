"""The options on where runs are executed: the same of every command that carries out studies, and all of them in the place."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
from tests.support.command import run

from forwardgrad.lab.commands import studies, training
from forwardgrad.lab.commands.execution_options import ExecutionOptions, takes_execution_options
from forwardgrad.lab.execution.place import Place

GIVEN: dict[str, Any] = {
    "device": "cuda",
    "data_dir": Path("data"),
    "jobs": 3,
    "batched": False,
    "threads": 2,
    "ranks": 2,
    "directions": 2,
    "lost_rank": "go-on",
    "executor": "ray",
    "address": "auto",
    "gpus": 0.5,
    "retry_failed": True,
    "tensorboard": True,
    "keep_weights": True,
}
NAMES = [field.name for field in dataclasses.fields(ExecutionOptions)]


def test_every_option_is_in_the_place() -> None:
    assert ExecutionOptions(**GIVEN, out=Path("here")).place(Path("mine")) == Place(**GIVEN, path=Path("mine"))
    assert ExecutionOptions().place() == Place()
    assert {*GIVEN, "out"} == set(NAMES)


@pytest.mark.parametrize("command", [studies.study, studies.reproduce, training.tune], ids=lambda command: command.__name__)
def test_commands_that_carry_out_studies_have_the_same_options(command: Any) -> None:
    parameters = inspect.signature(command).parameters
    assert [name for name in parameters if name in NAMES] == NAMES
    assert {name: parameters[name].default for name in NAMES} == dataclasses.asdict(ExecutionOptions())


def test_a_command_gets_the_options_as_one_object() -> None:
    seen: list[Any] = []

    @takes_execution_options
    def command(word: str, *, execution: ExecutionOptions) -> None:
        seen.extend((word, execution))

    command(word="go", jobs=2, out=Path("there"))
    assert seen == ["go", ExecutionOptions(jobs=2, out=Path("there"))]


def test_the_command_line_reaches_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    places: list[Place] = []

    def carried_out(studies: Any, out: Path, place: Place) -> Any:
        places.append(place)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "carry_out", carried_out)
    words = ("tune", "--lr", "0.1", "--jobs", "3", "--no-batched", "--threads", "2", "--retry-failed", "--data-dir", tmp_path)
    assert run(monkeypatch, capsys, *words)[0] == 130
    assert places == [Place(jobs=3, batched=False, threads=2, retry_failed=True, data_dir=tmp_path)]
