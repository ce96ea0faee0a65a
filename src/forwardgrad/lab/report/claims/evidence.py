"""What claims are decided from: the rows of Table I, pairs of arms, intervals in words. Loads without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import ndtri

from forwardgrad.lab.recipes import TABLE1
from forwardgrad.lab.report.blocks import Judged, Observation, count, number, percent
from forwardgrad.lab.report.claims import findings
from forwardgrad.lab.statistics import stats
from forwardgrad.lab.store import ArmResult, StudyResult

CONFIRMED, REFUTED, OPEN = "confirmed", "refuted", "not decided by this budget"
IMAGES = 10_000  # of either test split
LN10 = math.log(10)  # the loss of guessing one of ten classes
LEARNED = LN10 - 0.05  # a loss that has left it
GUESSING = 0.1  # the accuracy of guessing one of ten classes
Decide = Callable[["Evidence"], Judged]


@dataclass(frozen=True)
class Evidence:
    """Everything stored that a claim may be decided from, by the name of its file."""

    studies: dict[str, StudyResult]
    measured: dict[str, dict[str, Any]]

    def arm(self, study: str, name: str) -> ArmResult | None:
        """An arm whose runs have all ended, None where there is none."""
        arms = self.studies[study].arms if study in self.studies else ()
        return next((arm for arm in arms if arm.name == name and arm.complete), None)


@dataclass(frozen=True)
class PaperRow:
    """A forward and a backprop arm of Table I; `short` says why they cannot decide anything, empty where they can.

    `length` says by how much both are shorter than the paper's, empty where they are not.
    """

    title: str
    forward: ArmResult | None
    backprop: ArmResult | None
    short: str
    length: str = ""
    study: str = "table1"

    @property
    def pair(self) -> findings.ArmPair:
        assert self.forward is not None
        assert self.backprop is not None
        return self.forward, self.backprop


def rows(evidence: Evidence, model: str = "", optimizer: str = "", data: str = "", *, retuned: bool = False) -> list[PaperRow]:
    """The comparisons of Table I with this network, optimizer and data set.

    With `retuned` the arms are those of our own search where they are there: at full length, else where the published ones are no longer.
    """
    found = []
    for arm in TABLE1:
        run = arm.run
        wanted = (model in ("", run.model), optimizer in ("", run.optimizer.name), data in ("", run.data), arm.kind == "forward")
        if all(wanted):
            studies = ("table1-retuned", "table1") if retuned else ("table1",)
            made = [_row(evidence, study, arm.group, arm.name, arm.name.replace("-forward", "-backprop")) for study in studies]
            found.append(min(made, key=lambda row: (bool(row.short), bool(row.length))))
    return found


def _row(evidence: Evidence, study: str, title: str, forward: str, backprop: str) -> PaperRow:
    one, other = evidence.arm(study, forward), evidence.arm(study, backprop)
    if one is None or other is None:
        return PaperRow(title, one, other, "not run, or unfinished", study=study)
    unequal = findings.unequal((one, other))
    short = f"different {', '.join(unequal)}" if unequal else ""
    return PaperRow(title, one, other, short, one.shortened or other.shortened or "", study)


def section_of(rows: Sequence[PaperRow]) -> str:
    """The section of the page that most of the deciding rows come from."""
    names = [row.study for row in rows if not row.short]
    return max(set(names), key=names.count) if names else "table1"


def losses(arm: ArmResult) -> list[float]:
    """Test losses by seed; one that is not finite, or of a run that failed, is infinite."""
    return [run.loss for _, run in sorted(arm.by_seed.items())]


def gap(row: PaperRow) -> stats.MeanEstimate:
    """Forward gradient less backpropagation in test loss, paired by seed."""
    return stats.difference(*map(losses, row.pair))


def mean(values: Sequence[float]) -> float:
    return stats.estimate(values).mean


def ratio(forward: float, backprop: float) -> float:
    """How many times as large the first is; infinite where either is not a positive number."""
    return forward / backprop if 0 < backprop < math.inf and forward > 0 else math.inf


def over(ratios: Sequence[float]) -> stats.MeanEstimate:
    """The geometric mean of ratios with its 95 % t interval: that of their logarithms.

    >>> over([2.0, 8.0]).mean
    4.0
    """
    found = stats.estimate([math.log(value) for value in ratios])
    low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
    return stats.MeanEstimate(math.exp(found.mean), low, high, found.n)


def wilson(hits: float, n: int) -> stats.MeanEstimate:
    """A share with its 95 % interval after Wilson, which stays within 0 and 1.

    >>> found = wilson(6, 6)
    >>> found.mean, round(found.low, 3), found.high
    (1.0, 0.61, 1.0)
    """
    z, share = float(ndtri((1 + stats.CONFIDENCE) / 2)), hits / n
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return stats.MeanEstimate(share, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale), n)


def accuracy(arm: ArmResult) -> tuple[stats.MeanEstimate, str]:
    """Test accuracy: over seeds where there are several, else of the one network over the images of the test split; and n in words."""
    values = [run.accuracy if math.isfinite(run.accuracy) else 0.0 for run in arm.done]
    if len(values) > 1:
        return stats.estimate(values, 0.0, 1.0), count(len(values), "seed")
    images = int((arm.done[0].result["test"] or {}).get("examples", IMAGES))
    return wilson(values[0] * images, images), f"1 seed, {images:,} test images"


def between(found: stats.MeanEstimate, words: Callable[[float], str] = number) -> str:
    """A mean and its interval in words."""
    if found.low is None or found.high is None:
        return f"{words(found.mean)} (no interval)"
    return f"{words(found.mean)} (95 % interval {words(found.low)} to {words(found.high)})"


def accurate(found: stats.MeanEstimate) -> str:
    return between(found, percent)


def losses_reading(row: PaperRow) -> Observation:
    """Both losses of a row, and how much larger that of the forward gradient is; or why there is nothing to compare."""
    if row.short:
        return Observation(row.title, row.short, "left out")
    forward, backprop = map(losses, row.pair)
    both = f"{number(mean(forward))} with the forward gradient, {number(mean(backprop))} with backpropagation"
    found = gap(row)
    apart = "" if found.low is None else f"; difference {between(found)}"
    return Observation(row.title, f"test loss {both}{apart}{f' ({row.length})' if row.length else ''}", count(found.n, "seed"))


def above(found: stats.MeanEstimate, limit: float) -> bool:
    return found.low is not None and found.low > limit


def below(found: stats.MeanEstimate, limit: float) -> bool:
    return found.high is not None and found.high < limit


def status(yes: bool, no: bool) -> str:
    return CONFIRMED if yes else REFUTED if no else OPEN
