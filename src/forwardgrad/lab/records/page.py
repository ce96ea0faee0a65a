"""The table of records as Markdown: every task, its best forward-only result, and backpropagation's beside it. Loads without torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from forwardgrad.lab.records.candidates import Candidate, Machine, best, candidates, machines
from forwardgrad.lab.records.claim import RecordClaim
from forwardgrad.lab.records.tasks import LEAST_SEEDS, TASKS, Measure, RecordTask
from forwardgrad.lab.records.wording import RULE, TEST
from forwardgrad.lab.report.blocks import count, duration, percent, tables
from forwardgrad.lab.statistics import stats
from forwardgrad.lab.studies import format_estimator, format_value, to_json

UNKNOWN = "not measured"
TITLES: dict[Measure, str] = {
    "accuracy": "Highest test accuracy",
    "seconds": "Fewest seconds of training to an accuracy",
    "passes": "Fewest forward passes to an accuracy",
}
WORDS: dict[Measure, str] = {
    "accuracy": "The mean over seeds decides. Seconds are those of the run, on whatever shared the machine: they compare nothing here.",
    "seconds": "Times of one machine alone are compared, and only of runs that were made to be timed: a row for each machine. The "
    "making of compiled steps and graphs does not count, nor do evaluations. Every run has to come to the accuracy.",
    "passes": "A backward pass counts as two forward passes. Every run has to come to the accuracy.",
}
_SHOWN: dict[Measure, Callable[[float], str]] = {"accuracy": percent, "seconds": duration, "passes": "{:,.0f}".format}
HEAD = ("task", "", "the figure (95 % interval)", "seeds", "test accuracy", "seconds of a run", "passes of a run", "peak bytes", "how")


class Sources:
    """The list below the tables, numbered in the order in which it is asked for."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def number(self, candidate: Candidate) -> str:
        line = described(candidate)
        if line not in self.lines:
            self.lines.append(line)
        return str(self.lines.index(line) + 1)


def records_page(folder: Path) -> str:
    """The page of a folder of results: of its output folders, and of the claims in its folder `records`."""
    found, sources = candidates(folder), Sources()
    parts = [part for measure in TITLES for part in _part(measure, found, sources)]
    numbered = [f"{i}. {line}" for i, line in enumerate(sources.lines, 1)]
    return "\n".join([*_opening(), *parts, "", "## How", "", *numbered]) + "\n"


def _opening() -> list[str]:
    return [
        "# Records",
        "",
        "The best that training without a backward pass has reached on fixed tasks, and backpropagation beside it. Written by",
        "`forwardgrad record list --out results/records.md` from the results and claims in this folder.",
        "[How to beat one](../docs/records.md).",
        "",
        f"The rule is {RULE}",
        "",
        TEST,
        "",
        f"A record has {LEAST_SEEDS} seeds or more. Where no result has, the best there is stands here as open.",
    ]


def _part(measure: Measure, found: list[Candidate], sources: Sources) -> Iterable[str]:
    yield from ("", f"## {TITLES[measure]}", "", WORDS[measure], "", _row(HEAD), _row(["---"] * len(HEAD)))
    for task in (task for task in TASKS.values() if task.measure == measure):
        mine = [candidate for candidate in found if candidate.claim.task == task.name]
        title = f"`{task.name}`: {_plain(task.title)}" + (f", to {100 * task.target:g} % of the validation split" if task.target else "")
        for where in machines(task, mine):
            yield _row([title, "**forward-only**", *_cells(task, mine, where, sources, reverse=False)])
            yield _row(["", "backpropagation", *_cells(task, mine, where, sources, reverse=True)])


def _cells(task: RecordTask, found: list[Candidate], where: Machine | None, sources: Sources, *, reverse: bool) -> list[str]:
    if (candidate := best(task, found, where, reverse=reverse)) is None:
        return [UNKNOWN if reverse else "none yet", *["–"] * (len(HEAD) - 3)]
    runs = candidate.claim.runs
    few = f" (open: {LEAST_SEEDS} seeds make a record)" if len(runs) < LEAST_SEEDS and not reverse else ""
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return [
        _estimated(_SHOWN[task.measure], [run.figure(task) for run in runs], 1.0 if task.measure == "accuracy" else math.inf),
        f"{len(runs)}{few}",
        _mean(percent, [run.accuracy for run in runs]),
        _mean(duration, [run.seconds for run in runs]),
        _mean("{:,.0f}".format, [run.passes for run in runs]),
        tables.size(max(peaks)) if len(peaks) == len(runs) else UNKNOWN,
        sources.number(candidate),
    ]


def _estimated(shown: Callable[[float], str], values: Sequence[float | None], most: float) -> str:
    """A mean with its interval, where there is one."""
    found = stats.estimate([value for value in values if value is not None], 0.0, most)
    return shown(found.mean) + ("" if found.low is None or found.high is None else f" ({shown(found.low)} to {shown(found.high)})")


def _mean(shown: Callable[[float], str], values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    return shown(sum(there) / len(there)) if len(there) == len(values) else UNKNOWN


def described(candidate: Candidate) -> str:
    """What was trained, by whom, where, at which commit and by which commands, in one line."""
    claim, where = candidate.claim, candidate.claim.environment
    hardware = f"{where.get('device', UNKNOWN)}, {count(int(where.get('threads', 1)), 'thread')}, torch {where.get('torch', UNKNOWN)}"
    commands = "; ".join(_code(command) for command in claim.commands)
    return (
        f"{_plain(candidate.source)}: {_code(format_estimator(claim.run.estimator))}, {_plain(settings(claim))}. {_plain(hardware)}, "
        f"commit {_plain(str(where.get('commit') or UNKNOWN))}. {commands}"
    )


def settings(claim: RecordClaim) -> str:
    """The optimizer and everything else of a run that is not as usual."""
    run = claim.run
    rate = to_json(run)["optimizer"]
    parts = [f"{rate.pop('name')} with lr {rate.pop('lr'):g}"]
    usual = {"decay": 0.0, "momentum": 0.0, "beta1": 0.9, "beta2": 0.999}
    parts += [f"{name} {format_value(value)}" for name, value in rate.items() if usual.get(name) != value]
    parts.append(count(run.steps, "step") if run.steps else count(run.epochs, "epoch"))
    parts.append(f"batches of {run.batch_size}")
    shown = ("precision", "engine", "augment", "label_smoothing", "code")
    plain = {field.name: field.default for field in dataclasses.fields(run)}
    parts += [f"{name.replace('_', ' ')} {getattr(run, name)}" for name in shown if getattr(run, name) != plain[name]]
    return ", ".join(parts)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _code(text: str) -> str:
    return "`" + _line(text).replace("`", "'").replace("|", "\\|") + "`"


def _plain(text: str) -> str:
    """Text that Markdown and its tables take literally."""
    text = _line(text)
    for sign, literal in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), ("[", "\\["), ("|", "\\|"), ("*", "\\*"), ("`", "\\`")):
        text = text.replace(sign, literal)
    return text


def _line(text: str) -> str:
    """Text of a claim without line breaks, nor anything else that a terminal would obey."""
    return "".join(sign if sign.isprintable() else " " for sign in text)
