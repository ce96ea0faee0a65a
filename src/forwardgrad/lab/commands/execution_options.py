"""The options on where runs are executed, declared once for all commands that carry out studies."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from forwardgrad.lab.commands.options import (
    OUT,
    Address,
    Batched,
    DataDir,
    Device,
    Directions,
    ExecutorOption,
    Gpus,
    Jobs,
    KeepWeights,
    LostRankOption,
    Out,
    Ranks,
    RetryFailed,
    TensorBoard,
    Threads,
)
from forwardgrad.lab.execution import Place


@dataclass(frozen=True)
class ExecutionOptions:
    """Where the runs of a command are executed, and where they are kept: one option for each field, in this order."""

    device: Device = "cpu"
    data_dir: DataDir = None
    out: Out = OUT
    jobs: Jobs = 1
    batched: Batched = None
    threads: Threads = None
    executor: ExecutorOption = "process"
    address: Address = None
    gpus: Gpus = None
    retry_failed: RetryFailed = False
    tensorboard: TensorBoard = False
    keep_weights: KeepWeights = False
    ranks: Ranks = 1
    directions: Directions = 1
    lost_rank: LostRankOption = "end"

    def place(self, path: Path | None = None) -> Place:
        """The place that the options describe; `path` is a folder whose modules every worker can import."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "out"}
        return Place(**fields, path=path)


def takes_execution_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for every field of ExecutionOptions in place of its parameter `execution`."""
    names = [field.name for field in dataclasses.fields(ExecutionOptions)]

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        execution = ExecutionOptions(**{name: given.pop(name) for name in names if name in given})
        command(**given, execution=execution)

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        parameters += _options() if parameter.name == "execution" else [parameter]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def _options() -> list[inspect.Parameter]:
    """A keyword for every field of ExecutionOptions."""
    hints, kind = get_type_hints(ExecutionOptions, include_extras=True), inspect.Parameter.KEYWORD_ONLY
    fields = dataclasses.fields(ExecutionOptions)
    return [inspect.Parameter(field.name, kind, default=field.default, annotation=hints[field.name]) for field in fields]
