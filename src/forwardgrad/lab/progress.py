"""The live display: one line a run under way, read from the status files that runs leave in their folders."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bars

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store import Store, read_json

POLL_SECONDS = 0.5


class Progress:
    """Shows the phase, the runs done and every run under way; plain lines of finished runs where the output is no terminal."""

    def __init__(self, names: dict[str, str] | None = None, *, quiet: bool = False) -> None:
        self.names = names if names is not None else {}
        self.console = Console(stderr=True, quiet=quiet, soft_wrap=not sys.stderr.isatty())

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)

    @contextmanager
    def over(self, store: Store, identities: Sequence[str], done: int = 0) -> Iterator[None]:
        """Follow these runs until the block ends."""
        if done:
            self.say(f"{done} finished before")
        if not identities:
            yield
            return
        stop = threading.Event()
        follow = self._bars if self.console.is_terminal else self._lines
        thread = threading.Thread(target=follow, args=(store, identities, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _name(self, identity: str) -> str:
        return self.names.get(identity, identity)

    def _lines(self, store: Store, identities: Sequence[str], stop: threading.Event) -> None:
        open_runs, last = list(identities), False
        while not last:
            last = stop.wait(POLL_SECONDS)
            for identity, result in _ended(store, open_runs):
                self.say(f"[{len(identities) - len(open_runs)}/{len(identities)}] {self._name(identity)}: {describe(result)}")

    def _bars(self, store: Store, identities: Sequence[str], stop: threading.Event) -> None:
        name, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
        with Bars(name, BarColumn(bar_width=10), TaskProgressColumn(), note, console=self.console, transient=False) as bars:
            overall = bars.add_task("all runs", total=len(identities), note=f"0 of {len(identities)}, starting")
            tasks: dict[str, Any] = {}
            open_runs, last = list(identities), False
            while not last:
                last = stop.wait(POLL_SECONDS)
                for identity, result in _ended(store, open_runs):
                    bars.update(overall, advance=1, note=f"{len(identities) - len(open_runs)} of {len(identities)}")
                    if identity in tasks:
                        bars.remove_task(tasks.pop(identity))
                    bars.console.print(f"{self._name(identity)}: {describe(result)}", highlight=False, markup=False)
                for identity in open_runs:
                    if (status := _look(store, identity, "status.json")) is not None:
                        if identity not in tasks:
                            tasks[identity] = bars.add_task(self._name(identity), total=status["steps"], note="")
                        bars.update(tasks[identity], completed=status["step"], note=_note(status))


def _ended(store: Store, open_runs: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The runs that have a result by now, each taken off the list."""
    for identity in list(open_runs):
        if (result := _look(store, identity, "result.json")) is not None:
            open_runs.remove(identity)
            yield identity, result


def _look(store: Store, identity: str, name: str) -> dict[str, Any] | None:
    try:
        return read_json(store.folder(identity) / name)
    except UserError:  # the run itself will say so
        return None


def _note(status: dict[str, Any]) -> str:
    left = (status["steps"] - status["step"]) * status["seconds"] / max(1, status["step"])
    minutes, seconds = divmod(round(left), 60)
    return f"loss {number(status['loss'])}, validation {number(status['validation_loss'])}, {minutes}:{seconds:02} left"


def describe(result: dict[str, Any]) -> str:
    """A finished run in one line."""
    if result["status"] == "failed":
        return f"failed at step {result['steps']} ({result['reason']})"
    outcome = f"diverged at step {result['diverged_at']} ({result['reason']})" if result["status"] == "diverged" else "finished"
    line = f"{outcome}, validation loss {number(result['validation_loss'])}, accuracy {result['validation_accuracy']:.2%}"
    if test := result["test"]:
        line += f"; test loss {number(test['loss'])}, accuracy {test['accuracy']:.2%}"
    return f"{line}; {result['seconds']:.1f} s"


def number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:#.3g}"
