"""Rows of a CSV, TSV or JSON Lines file, and what each column of them is for."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.finetuning.asked import COLUMNS, FineTuning, Task
from forwardgrad.lab.studies import stream

SEPARATORS = {".csv": ",", ".tsv": "\t"}
SHOWN = 8  # columns or labels that a sentence names
Row = dict[str, Any]


@dataclass(frozen=True)
class TextTable:
    """The rows of a file in the order of the file, and the columns that are used."""

    name: str
    task: Task
    rows: list[Row]
    numbers: list[int]  # of each row, the line of the file that it begins on
    used: dict[str, str]  # columns by what they are for

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self, what: str) -> list[str]:
        """The texts of a column. UserError, naming the line, where a row has none."""
        column, found = self.used[what], []
        for number, row in zip(self.numbers, self.rows, strict=True):
            text = row.get(column)
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"line {number} of {self.name} has no text in the column {column!r}: fill it in, or leave the row out")
            found.append(text)
        return found

    def labels(self) -> list[str]:
        """The labels, as words. UserError, naming the line, where a row has none."""
        column, found = self.used["label"], []
        for number, row in zip(self.numbers, self.rows, strict=True):
            value = row.get(column)
            label = value.strip() if isinstance(value, str) else json.dumps(value) if isinstance(value, (bool, int, float)) else ""
            if not label:
                raise UserError(f"line {number} of {self.name} has no label in the column {column!r}: fill it in, or leave the row out")
            found.append(label)
        return found

    def part(self, which: Sequence[int]) -> TextTable:
        """Some of the rows, in this order."""
        return TextTable(self.name, self.task, [self.rows[i] for i in which], [self.numbers[i] for i in which], self.used)


def read_table(path: Path, asked: FineTuning, task: Task | None) -> TextTable:
    """The rows of a file. Which task they are for follows from the columns where `task` is None.

    A label makes it classification; texts alone, or prompts with completions, a causal language model.

    Raises UserError for a file that cannot be read as what its name says, a column that is missing, and a file without rows.
    """
    rows, numbers, columns = _read(path)
    for what, column in asked.columns.items():
        if column not in columns:
            raise UserError(
                f"{path.name} has no column {column!r} for the {'second text' if what == 'second' else what}: it has {_named(columns)}"
            )
    has = {what: column for what in COLUMNS if (column := asked.column(what)) in columns}
    task = task or ("classification" if "label" in has else "causal-lm")
    if task == "classification":
        wanted = ("text", "label", *(["second"] if "second" in has else []))
    else:
        wanted = ("prompt", "completion") if "text" not in has or {"prompt", "completion"} <= has.keys() else ("text",)
    if lacking := [what for what in wanted if what not in has]:
        what = "text" if task == "causal-lm" else lacking[0]
        option = "" if what not in ("text", "label") else f", or name another one with --{what}-column"
        raise UserError(f"{path.name} has no column {asked.column(what)!r}, only {_named(columns)}: add it{option}")
    if not rows:
        raise UserError(f"{path.name} has no rows")
    return TextTable(path.name, task, rows, numbers, {what: has[what] for what in wanted})


def divided(table: TextTable, held_out: float, seed: int) -> tuple[TextTable, TextTable | None]:
    """The rows to train on, and those held out for validation by the seed: None of them where the fraction is 0."""
    if not held_out:
        return table, None
    if len(table) < 2:
        raise UserError(f"{table.name} has one row: nothing can be held out for validation; give more rows, or --held-out 0")
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(stream(seed, "split"))).tolist()
    count = min(max(1, round(held_out * len(table))), len(table) - 1)
    return table.part(sorted(order[count:])), table.part(sorted(order[:count]))


def _named(words: Sequence[str]) -> str:
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return ", ".join(map(repr, words[:SHOWN])) + more if words else "none"


def _read(path: Path) -> tuple[list[Row], list[int], list[str]]:
    kind = path.suffix.lower()
    if kind not in (*SEPARATORS, ".jsonl"):
        raise UserError(f"{path.name} is of no kind that is read: give a file that ends in .csv, .tsv or .jsonl")
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        return _json_lines(path) if kind == ".jsonl" else _separated(path, SEPARATORS[kind])
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} is not UTF-8 (byte {error.start}): save it in that encoding") from error
    except csv.Error as error:
        raise UserError(f"{path.name} cannot be read as {kind[1:].upper()} ({error})") from error


def _separated(path: Path, separator: str) -> tuple[list[Row], list[int], list[str]]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        columns = [name.strip() for name in next(reader, [])]
        if len(set(columns)) < len(columns):
            raise UserError(f"{path.name} has two columns of one name among {_named(columns)}: rename one")
        rows, numbers, line = [], [], reader.line_num + 1
        for fields in reader:
            if fields:  # an empty line at the end, or between rows, is none
                if len(fields) != len(columns):
                    raise UserError(f"line {line} of {path.name} has {len(fields)} fields, and the first line names {len(columns)} columns")
                rows.append(dict(zip(columns, fields, strict=True)))
                numbers.append(line)
            line = reader.line_num + 1
    return rows, numbers, columns


def _json_lines(path: Path) -> tuple[list[Row], list[int], list[str]]:
    rows, numbers, columns = [], [], dict[str, None]()
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"line {number} of {path.name} is no JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"line {number} of {path.name} is no JSON object: write one object a line")
            rows.append(row)
            numbers.append(number)
            columns |= dict.fromkeys(row)
    return rows, numbers, list(columns)
