"""Learning curves against optimizer steps, against seconds and against forward passes: one figure in as many views. No torch."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from forwardgrad.lab.report import figures
from forwardgrad.lab.report.blocks import Picture, Views, has_curve, lost
from forwardgrad.lab.statistics import stats
from forwardgrad.lab.store import ArmResult, Done, StudyResult

STEP = "optimizer step"
LINE = "Line: mean over the runs still training there; band: from the least to the greatest."
DRAWN, DRAWN_RUNS = 6, 1000  # comparisons of a study whose curves are drawn, and the runs in them: a page of hundreds is read by nobody
Series = Callable[[Done], Sequence[float]]  # a value for every evaluation of a run
PanelArms = tuple[str, Sequence[ArmResult]]  # a panel: its title and its arms


@dataclass(frozen=True)
class Against:
    """An axis: what it is called, and where each evaluation of a run lies on it; None for a run that did not count it."""

    name: str
    tab: str
    label: str
    place: Callable[[Done], Sequence[float] | None]


def _passes(run: Done) -> Sequence[float] | None:
    """Forward passes up to each evaluation: every step of a run takes the same number of them."""
    passes, steps = run.passes, int(run.result["steps"])
    return [step * passes / steps for step in run.evaluations["step"]] if passes and steps else None


AXES = (
    Against("", "steps", STEP, lambda run: run.evaluations["step"]),
    Against("-seconds", "seconds", "training time (seconds)", lambda run: run.evaluations["seconds"]),
    Against("-passes", "forward passes", "forward passes", _passes),
)


def drawn(study: StudyResult) -> int:
    """How many comparisons of a study have their curves drawn: the first, and no more than a reader looks at."""
    runs = list(itertools.accumulate(sum(len(arm.done) for arm in arms) for arms in study.groups.values()))
    return max(1, sum(total <= DRAWN_RUNS for total in runs[:DRAWN]))


def views(
    name: str,
    settings: Sequence[PanelArms],
    measured: Series,
    caption: str,
    *,
    ylabel: str,
    log: bool | None = None,
    end: Callable[[ArmResult], str | None] = lambda _: None,
) -> Views:
    """The same measurement in several views, one for each thing that all runs counted; in each, a panel for every setting."""
    runs = [run for _, arms in settings for arm in arms for run in arm.done if has_curve(run)]
    found = []
    for axis in AXES:
        if any(axis.place(run) is None for run in runs if run.result["status"] != "failed"):
            continue
        panels = [_panel(title, arms, axis, measured, end) for title, arms in settings]
        drawing = figures.curves(f"{name}{axis.name}", [panels], xlabel=axis.label, ylabel=ylabel, marks=True, log=log)
        found.append((axis.tab, Picture(f"{name}{axis.name}", drawing, f"{caption}, against {axis.label}. {LINE}{_shared(axis, runs)}")))
    return Views(name, "against", tuple(found))


def _shared(axis: Against, runs: Sequence[Done]) -> str:
    if axis.name == "-passes":
        return " A backward pass counts as two forward passes."
    if axis.name != "-seconds":
        return ""
    together = " Some runs were trained as one program and share their seconds." if any(run.replicas > 1 for run in runs) else ""
    return f" Runs trained at the same time slow one another.{together}"


def _panel(title: str, arms: Sequence[ArmResult], axis: Against, measured: Series, end: Callable[[ArmResult], str | None]) -> figures.Panel:
    lines = []
    for arm in arms:
        placed = [(axis.place(run), run) for run in arm.done if has_curve(run)]  # one that failed may have counted less than others
        curve = along([(at, run.evaluations["step"], measured(run)) for at, run in placed if at is not None])
        if curve.at:
            lines.append(figures.Line(arm.kind, curve, end(arm), all(map(lost, arm.done)), arm.label))
    return figures.Panel(title, tuple(lines), "" if lines else "not run" if not arms else "unfinished")


def along(curves: Sequence[tuple[Sequence[float], Sequence[float], Sequence[float]]]) -> stats.Curve:
    """Curves (place, step, value) pooled where they share a step; a step lies at the mean of its places.

    >>> along([([0.1, 0.3], [50, 100], [2.0, 1.0]), ([0.3, 0.5], [50, 100], [4.0, 1.0])]).at
    (0.2, 0.4)
    """
    pooled = stats.pooled([(steps, values) for _, steps, values in curves])
    places: dict[float, list[float]] = {}
    for at, steps, _ in curves:
        for place, step in zip(at, steps, strict=True):
            places.setdefault(float(step), []).append(float(place))
    return stats.Curve(tuple(statistics.fmean(places[step]) for step in pooled.at), pooled.mean, pooled.low, pooled.high)
