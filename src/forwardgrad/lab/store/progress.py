"""The live display: a line for every arm under way, drawn from snapshots of a store; plain lines where the output is no terminal."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from forwardgrad.lab import interrupts
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store.standing import ArmNow, Phase, StoreNow, StoreWatch, StudyNow
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.store.time_left import WorkLeft

POLL_SECONDS = 0.5
LOG_SECONDS = 60.0  # between two lines of totals where there is no terminal
SHARE = 100  # a look takes at most one part in so many of the time, but for the slowest, which are this many seconds apart:
SLOWEST_SECONDS = 5.0
HEADS = 8  # studies that a display has a line of their own for
WIDE = 90  # columns from which words are written out
PIPED = 120  # columns of a snapshot that goes to a file or a pipe
STYLES = {"done": "green", "waiting": "dim", "stopped": "yellow"}


def console_on(stream: TextIO, *, quiet: bool = False) -> Console:
    """A console on a stream. It moves the cursor in a terminal only, and wraps no line of a log."""
    terminal = stream.isatty()
    return Console(file=stream, quiet=quiet, force_terminal=terminal, soft_wrap=not terminal)


class Progress:
    """Shows how far studies and runs are while they are carried out."""

    def __init__(self, names: dict[str, str] | None = None, *, quiet: bool = False) -> None:
        self.names = names if names is not None else {}
        self.quiet = quiet
        self.console = console_on(sys.stderr, quiet=quiet)

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)

    @contextmanager
    def over(self, store: Store, identities: Sequence[str], done: int = 0) -> Iterator[None]:
        """Follow these runs until the block ends."""
        if done:
            self.say(f"{done} finished before")
        if not identities or self.quiet:
            yield
            return
        stop, watch = threading.Event(), StoreWatch(store, runs=identities, names=self.names)
        thread = threading.Thread(target=follow, args=(watch, self.console, stop, set(identities)), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def watch(store: Store, *, once: bool = False) -> None:
    """Show a store on the output until all in it is done, or as it is now; UserError at the end where a record could not be read."""
    console, looked = console_on(sys.stdout), StoreWatch(store)
    if once:
        if not console.is_terminal:
            console.width = max(console.width, PIPED)
        console.print(Display(now := looked.snapshot(), whole=True))
    else:
        now = follow(looked, console, threading.Event(), None)
    if now.unread:
        raise UserError(now.unread[0] + (f" ({len(now.unread) - 1} more like it)" if len(now.unread) > 1 else ""))


def follow(watched: StoreWatch, console: Console, stop: threading.Event, expected: set[str] | None) -> StoreNow:
    """Draw until told to stop, or until all is done where nobody expects certain runs; returns what it saw last.

    A record that cannot be read is looked at twice, and not waited for after that.
    """
    show = _Live(watched, console, expected) if console.is_terminal and not console.is_dumb_terminal else _Log(watched, console, expected)
    with show:
        last, unread = False, set[str]()
        while not last:
            began = time.monotonic()
            now = watched.snapshot()
            show.update(now)
            if expected is None:
                interrupts.check()
                last = now.complete and unread.issuperset(now.unread)
                unread = set(now.unread)
            if not last and stop.wait(min(max(POLL_SECONDS, SHARE * (time.monotonic() - began)), SLOWEST_SECONDS)):
                now = watched.snapshot()
                show.update(now)
                last = True
    return now


class _Log:
    """A line for every run that ends, and one for every study now and then."""

    def __init__(self, watched: StoreWatch, console: Console, expected: set[str] | None) -> None:
        self.watched, self.console, self.expected = watched, console, expected
        self.told: set[str] | None = set() if expected is not None else None
        self.logged = time.monotonic()
        self.unread: set[str] = set()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, now: StoreNow) -> None:
        self._ended(now)
        for words in () if now.complete else now.unread:  # else they are the last that is said
            if words not in self.unread:
                self.unread.add(words)
                self._print(words)
        if time.monotonic() - self.logged >= LOG_SECONDS:
            self.logged = time.monotonic()
            for study in now.studies:
                self._print(head(study))

    def _ended(self, now: StoreNow) -> None:
        ended = {run for run in self.watched.ended if self.expected is None or run in self.expected}
        of = len(self.expected) if self.expected is not None else sum(study.planned for study in now.studies)
        if self.told is None:  # attached to runs that began before
            self.told = ended
            for study in now.studies:
                self._print(head(study))
        for run in sorted(ended - self.told, key=lambda run: self.watched.ended[run].told):
            self.told.add(run)
            self._print(f"[{len(self.told)}/{of}] {self.watched.name(run)}: {describe(self.watched.ended[run].result)}")

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)


class _Live(_Log):
    """The display, kept up to date in place; whoever carries out the runs also sees a line of each that ends, above it."""

    def __init__(self, watched: StoreWatch, console: Console, expected: set[str] | None) -> None:
        super().__init__(watched, console, expected)
        self.live = Live(Text("looking ..."), console=console, auto_refresh=False)

    def __enter__(self) -> None:
        self.live.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.live.__exit__(*error)

    def update(self, now: StoreNow) -> None:
        if self.expected is not None:
            self._ended(now)
        self.live.update(Display(now), refresh=True)


@dataclass(frozen=True)
class Display:
    """A snapshot as lines that fit the width, and the height unless `whole`: heads of the studies under way, then arms."""

    now: StoreNow
    whole: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        heads = [Text(line, style="bold", overflow="fold") for line in self._heads()]
        yield from heads
        room = max(1, console.height - 2 - sum(len(text.wrap(console, width)) for text in heads))
        arms = self.now.arms if self.whole else self.now.arms[: room if len(self.now.arms) <= room else max(1, room - 1)]
        if arms:
            yield table([_named(arm) for arm in arms] if len({arm.study for arm in self.now.arms}) > 1 else arms, width)
        if hidden := len(self.now.arms) - len(arms):
            yield Text(f"… and {hidden:,} more", style="dim")

    def _heads(self) -> Iterator[str]:
        done = [study.name for study in self.now.studies if study.complete and study.name]
        shown = [study for study in self.now.studies if study.name not in done]
        if self.whole or not shown:
            shown, done = list(self.now.studies), []
        yield from map(head, shown if self.whole else shown[:HEADS])
        if done:
            yield f"done: {', '.join(done)}"
        yield from self.now.unread
        if not self.now.studies and not self.now.unread:
            yield "no runs yet"


def head(study: StudyNow) -> str:
    """A study in one line."""
    parts = [f"{study.title}: {study.done:,} of {study.planned:,} runs"]
    if study.running:
        parts.append(f"{study.running:,} under way")
    elif not study.complete:
        parts.append("none under way")
    parts.append(f"{clock(study.elapsed)} elapsed")
    if not study.complete:
        parts.append(f"{left(study.work)} left")
    parts += [f"{n:,} {what}" for n, what in ((study.diverged, "diverged"), (study.failed, "failed")) if n]
    return " · ".join(parts)


def table(arms: Sequence[ArmNow], width: int) -> Table:
    """A line for every arm; narrow terminals get short words, and names that are cut."""
    wide = width >= WIDE
    rows = [_row(arm, wide=wide) for arm in arms]
    longest = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    bar, gap = (12, 2) if wide else (5, 1)
    taken = bar + gap + sum(most + gap for most in longest[1:] if most)
    names = max(5, min(longest[0], width - taken - gap))
    grid = Table.grid(padding=(0, gap, 0, 0))
    grid.add_column(no_wrap=True, overflow="ellipsis", width=names)
    grid.add_column(no_wrap=True, width=longest[1])
    grid.add_column(no_wrap=True, width=bar)
    for most in longest[2:]:
        if most:
            grid.add_column(no_wrap=True, justify="right", overflow="ellipsis")
    for arm, (name, *rest) in zip(arms, rows, strict=True):
        row = [_cut(name, names), *rest]
        *cells, troubles = (Text(cell) for cell, most in zip(row, longest, strict=True) if most)
        cells[1].style = STYLES.get(arm.phase.kind, "")
        if arm.diverged or arm.failed:
            troubles.style = "red" if arm.failed else "yellow"
        progress: RenderableType = ProgressBar(total=1.0, completed=arm.share, width=bar)
        grid.add_row(*cells[:2], progress, *cells[2:], troubles)
    return grid


def _cut(name: str, width: int) -> str:
    """A name without its middle where it is too long: names of arms differ in how they begin and in how they end."""
    return name if cell_len(name) <= width else f"{name[: width // 2]}…{name[-((width - 1) // 2) :]}"


def _named(arm: ArmNow) -> ArmNow:
    """An arm of one of several studies, under a name that says which."""
    return replace(arm, name=f"{arm.study}: {arm.name}") if arm.study else arm


def _row(arm: ArmNow, *, wide: bool) -> list[str]:
    """Name, phase, best loss, rate, time left and troubles of an arm, as text."""
    best, ending = number(arm.best), "" if arm.phase.kind == "done" else left(arm.work)
    diverged = "diverged" if wide else "div"
    return [
        arm.name,
        phase(arm.phase, wide=wide),
        f"best {best}" if wide else best,
        "" if arm.rate is None else f"{rate(arm.rate)} steps/s" if wide else f"{rate(arm.rate)}/s",
        f"{ending} left" if wide and ending else ending,
        ", ".join(f"{n} {what}" for n, what in ((arm.diverged, diverged), (arm.failed, "failed")) if n),
    ]


def phase(now: Phase, *, wide: bool = True) -> str:
    if now.kind in ("done", "run") or not now.of:
        return now.kind
    return f"{now.kind} {now.at} of {now.of}" if wide else f"{now.kind} {now.at}/{now.of}"


def left(work: WorkLeft) -> str:
    """The time left, '≥' where the length of some runs is not known yet."""
    seconds = work.left
    return clock(seconds) if seconds is None or not work.partly else f"≥ {clock(seconds)}"


def clock(seconds: float | None) -> str:
    """Seconds as m:ss, h:mm:ss or days and h:mm.

    >>> clock(75.4), clock(3600), clock(200_000), clock(None)
    ('1:15', '1:00:00', '2 d 7:33', '–')
    """
    if seconds is None or not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rate(per_second: float | None) -> str:
    if per_second is None or not math.isfinite(per_second):
        return "–"
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"


def describe(result: dict[str, Any]) -> str:
    """A run that has ended in one line."""
    status, accuracy = result["status"], result["validation_accuracy"]
    outcome = status if status == "finished" else f"{status} at step {result['steps']}"
    line = outcome if status == "finished" else f"{outcome} ({result['reason']})"
    if status != "failed":
        line += (
            f", validation loss {number(result['validation_loss'])}{_perplexity(result.get('validation_perplexity'))}{_accuracy(accuracy)}"
        )
    if test := result["test"]:
        line += f"; test loss {number(test['loss'])}{_perplexity(test.get('perplexity'))}{_accuracy(test['accuracy'])}"
    used = "".join(f", {value:.4g} J {name}" for name, value in result.get("joules", {}).items())
    return f"{line}; {result['seconds']:.1f} s{used}"


def _perplexity(value: float | None) -> str:
    """Of runs that predict tokens."""
    return "" if value is None else f", perplexity {value:.4g}"


def _accuracy(value: float | None) -> str:
    """The part classified rightly, or nothing where targets are no classes."""
    return "" if value is None else f", accuracy {value:.2%}"


def number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:#.3g}"
