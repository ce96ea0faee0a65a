"""The command line called in this process, as a user calls it in another."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from forwardgrad.lab import cli

DIGITS = ("train", "--data", "digits", "--model", "logistic", "--epochs", "2", "--lr", "0.01", "--out", "OUT")
"""A short run of the command, OUT to be replaced by a folder."""


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["forwardgrad", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err
