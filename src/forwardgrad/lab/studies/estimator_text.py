"""Estimators by one line of text, as the command line takes them; loads without torch.

    estimator := name [ "(" option "," option "," ... ")" ]         forward(tangents=8, law=rademacher, perturb=low-rank(rank=2))
    name      := a word, or the import path of a user's class       forward(perturb=package.module:Mine(rank=2))
    option    := name "=" value                                     a value is a number, true, false, none (or as Python writes them), a
                                                                    "text", a list [a, b] or an estimator's component: a name, with
                                                                    options of its own or none

What the names and options are is not known here: `forwardgrad.estimators.from_config` refuses those that do not exist.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from forwardgrad.lab.errors import UserError

PATH = re.compile(r"[\w./~-]+:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")  # a file may stand before the colon: commands read it, descriptions do not
NAME = re.compile(r"[A-Za-z_][\w-]*")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?(?![\w.])")
TEXT = re.compile(r'"(\\.|[^"\\])*"')
LONGEST = 300  # digits of a number
WORDS: dict[str, bool | None] = {"true": True, "false": False, "none": None, "True": True, "False": False, "None": None}


def parse_estimator(text: str) -> dict[str, Any]:
    """The JSON form of an estimator: its name and the options that were given. UserError points at what cannot be read.

    >>> parse_estimator("forward(tangents=8, perturb=low-rank(rank=2), law=sphere)")
    {'name': 'forward', 'tangents': 8, 'perturb': {'name': 'low-rank', 'rank': 2}, 'law': 'sphere'}
    >>> parse_estimator("mine:Method(law=mine:Law)")
    {'name': 'mine:Method', 'law': {'name': 'mine:Law'}}
    """
    reader = _Reader(text)
    config = reader.estimator()
    reader.end("the end")
    return config


def parse_estimators(text: str) -> list[dict[str, Any]]:
    """The same for several, separated by semicolons.

    >>> parse_estimators("backprop; forward(clip=1.0)")
    [{'name': 'backprop'}, {'name': 'forward', 'clip': 1.0}]
    """
    reader = _Reader(text)
    configs = [reader.estimator()]
    while reader.took(";"):
        configs.append(reader.estimator())
    reader.end("';' or the end")
    return configs


def format_estimator(config: Mapping[str, Any]) -> str:
    """The text that `parse_estimator` reads as this configuration; ValueError for values that have no such text.

    >>> format_estimator({"name": "forward", "law": "sphere", "clip": None})
    'forward(law=sphere, clip=none)'
    """
    options = ", ".join(f"{key}={format_value(value)}" for key, value in config.items() if key != "name")
    return f"{config['name']}({options})" if options else str(config["name"])


def format_value(value: Any) -> str:
    """One option's value in such a text."""
    if isinstance(value, Mapping):
        return format_estimator(value)
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, str):
        return value if NAME.fullmatch(value) and value not in WORDS else json.dumps(value)
    if isinstance(value, (int, float)) and math.isfinite(value):
        return repr(value)
    raise ValueError(f"{value!r} cannot be written in an estimator's text")


class _Reader:
    """A place in a text, and what is read there."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def estimator(self) -> dict[str, Any]:
        name = self.path() or self.match(NAME, "a name")
        return {"name": name, **self.options()}

    def options(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if not self.took("(") or self.took(")"):
            return found
        while True:
            self.space()
            start = self.at
            key = self.match(NAME, "the name of an option")
            if key in found or key == "name":
                self.fail("another option" if key in found else "an option other than 'name'", start)
            if not self.took("="):
                self.fail(f"'=' after {key!r}")
            found[key] = self.value()
            if self.took(")"):
                return found
            if not self.took(","):
                self.fail("',' or ')'")

    def value(self) -> Any:
        if path := self.path():
            return {"name": path, **self.options()}
        start = self.at
        if number := NUMBER.match(self.text, start):
            if len(number[0]) > LONGEST or not math.isfinite(float(number[0])):
                self.fail("a number that a computer can hold")
            self.at = number.end()
            return float(number[0]) if re.search(r"[.eE]", number[0]) else int(number[0])
        if text := TEXT.match(self.text, start):
            self.at = text.end()
            try:
                return json.loads(text[0])
            except ValueError:
                self.fail("a text in JSON's form", start)
        if self.took("["):
            return self.listed()
        name = self.match(NAME, "a value")
        if name in WORDS:
            return WORDS[name]
        options = self.options()
        return {"name": name, **options} if options else name

    def listed(self) -> list[Any]:
        found: list[Any] = []
        while not self.took("]"):
            if found and not self.took(","):
                self.fail("',' or ']'")
            found.append(self.value())
        return found

    def path(self) -> str | None:
        """An import path, where one stands here."""
        self.space()
        if found := PATH.match(self.text, self.at):
            self.at = found.end()
        return found and found[0]

    def took(self, sign: str) -> bool:
        self.space()
        there = self.text.startswith(sign, self.at)
        self.at += len(sign) if there else 0
        return there

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        self.space()
        if not (found := pattern.match(self.text, self.at)):
            self.fail(what)
        self.at = found.end()
        return found[0]

    def space(self) -> None:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1

    def end(self, expected: str) -> None:
        self.space()
        if self.at < len(self.text):
            self.fail(expected)

    def fail(self, expected: str, at: int | None = None) -> NoReturn:
        at = self.at if at is None else at
        where = f"at character {at + 1}, before {self.text[at : at + 20]!r}" if at < len(self.text) else "at its end"
        raise UserError(f"cannot read the estimator {self.text!r}: {expected} is expected {where}")
