"""Which arm of a study is best, by how much and how sure: computed from its runs, with nothing decided beforehand. Loads without torch."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from forwardgrad.lab.report.blocks import lost, number
from forwardgrad.lab.statistics import LEVEL, ConfidenceInterval, Permutation, comparison, stats
from forwardgrad.lab.store import ArmResult, Done, StudyResult

MINUS = "\N{MINUS SIGN}"
UNDECIDED = "not decided by this budget"


@dataclass(frozen=True)
class Pair:
    """Two arms over the seeds that they share, the one of the lower mean test loss first.

    `losses` are their test losses, seed by seed, `corrected` is the p of `test` after Holm's correction for all `comparisons` of the group.
    """

    first: ArmResult
    second: ArmResult
    losses: tuple[tuple[float, ...], tuple[float, ...]]
    test: Permutation
    corrected: float
    comparisons: int

    @functools.cached_property
    def lead(self) -> ConfidenceInterval:
        """How much lower the first arm's test loss is."""
        mine, theirs = self.losses
        return comparison.difference(theirs, mine)

    @functools.cached_property
    def ahead(self) -> ConfidenceInterval:
        """The probability that a run of the first arm ends lower than one of the second."""
        return comparison.improvement(*self.losses)

    @property
    def lost(self) -> tuple[int, int]:
        """How many runs of each diverged or failed."""
        one, two = (sum(map(lost, arm.done)) for arm in (self.first, self.second))
        return one, two

    @property
    def undecided(self) -> str:
        """Why so few runs cannot tell which of the two is better; empty where they can.

        They can where the corrected p is at most 0.05 and the interval of the difference, if there is one, leaves out zero. So the chance
        of a false word anywhere in a group is at most 5 %, however its arms were picked, and few seeds decide nothing.
        """
        n, least = self.test.n, self.test.least * self.comparisons
        if n == 1:
            return "one seed says nothing of spread"
        if self.lead.low is not None and not self.lead.excludes_zero:
            return "the interval of the difference spans zero"
        if least > LEVEL:
            needed = comparison.pairs_needed(self.comparisons)
            among = f" in {self.comparisons} comparisons" if self.comparisons > 1 else ""
            return f"{n} shared seeds give no p below {p_value(min(1.0, least))}{among} and it takes {needed}"
        if self.corrected > LEVEL:
            return f"p = {p_value(self.corrected)}"
        return "" if self.ahead.value > 0.5 else "most pairs of runs speak for the other arm, which lost some"


def p_value(p: float) -> str:
    """A probability as a p is printed: 0.25, 0.031, 0.0002."""
    return f"{p:.2g}" if p < 0.995 else "1"


def loss(run: Done) -> float:
    return run.loss


def error(run: Done) -> float:
    """The share of the test split classified wrongly, infinite where there is none."""
    return math.inf if lost(run) or not math.isfinite(run.accuracy) else 1 - run.accuracy


def unequal(first: ArmResult, second: ArmResult) -> list[str]:
    """What two arms differ in though a fair comparison holds it equal.

    What was searched over may differ, and so may the model where it is the arm. Seeds are paired.
    """
    searched = {name.replace("_", " ") for arm in (first, second) for name in arm.record.get("space") or {}}
    mine, other = first.terms, second.terms
    return [what for what in mine if what not in {"seeds", "model", *searched} and mine[what] != other[what]]


def ranked(arms: Sequence[ArmResult]) -> list[ArmResult]:
    """The finished arms, lowest mean test loss first. Where runs were lost, their number decides first, and then the median."""

    def order(arm: ArmResult) -> tuple[float, float, float]:
        losses = [loss(run) for run in arm.done]
        return sum(losses) / len(losses), sum(map(math.isinf, losses)) / len(losses), stats.median(losses)

    return sorted((arm for arm in arms if arm.complete), key=order)


def pairs(arms: Sequence[ArmResult]) -> list[Pair]:
    """Every two finished arms of a group that can fairly be compared, best first, p corrected for their number."""
    found = []
    for first, second in itertools.combinations(ranked(arms), 2):
        one, two = first.by_seed, second.by_seed
        seeds = sorted(one.keys() & two.keys())
        if seeds and not unequal(first, second):
            found.append((first, second, (tuple(loss(one[seed]) for seed in seeds), tuple(loss(two[seed]) for seed in seeds))))
    tests = comparison.permutations([losses for _, _, losses in found])
    corrected = comparison.holm([test.p for test in tests])
    return [
        Pair(first, second, losses, test, p, len(found)) for (first, second, losses), test, p in zip(found, tests, corrected, strict=True)
    ]


def verdicts(study: StudyResult) -> list[str]:
    """A sentence or two for every group of arms: the best one, its lead over the runner-up and over backpropagation, and how sure."""
    return [verdict(title, arms, pairs(arms)) for title, arms in study.groups.items()]


def verdict(title: str, arms: Sequence[ArmResult], compared: Sequence[Pair]) -> str:
    """The sentence on one group, from its pairs."""
    order = ranked(arms)
    if len(order) < 2:
        return f"{title}: {'no arm is' if not order else 'only one arm is'} finished, so nothing is compared yet."
    best, *others = order
    rivals = [others[0], *(arm for arm in others[1:] if arm.kind == "backprop")]
    value = comparison.mean([loss(run) for run in best.done]).value
    met = {pair.second.name: pair for pair in compared if pair.first is best}
    against = " ".join(_against(rival, met.get(rival.name), best) for rival in rivals)
    if math.isfinite(value):
        return f"{title}: {best.label} has the lowest mean test loss, {number(value)}. {against}"
    middle = comparison.median([loss(run) for run in best.done]).value
    if math.isfinite(middle):
        return f"{title}: every arm lost runs; {best.label} lost the fewest, its median being {number(middle)}. {against}"
    return f"{title}: half of the runs or more of every arm diverged or failed, so none is best."


def _against(rival: ArmResult, pair: Pair | None, best: ArmResult) -> str:
    if pair is None:
        return f"It is not comparable with {rival.label} (different {', '.join(unequal(best, rival)) or 'seeds'})."
    sure = f"{UNDECIDED}, because {pair.undecided}" if pair.undecided else "decided"
    return f"{lead(pair)}{span(pair)}: {sure}{_sureness(pair)}."


def lead(pair: Pair) -> str:
    """By how much the first arm is lower, or what the other lost."""
    name = pair.second.label
    if any(pair.lost):
        mine, other = pair.lost
        return f"It lost {mine or 'no'} {'run' if mine <= 1 else 'runs'}, {name} {other} of {len(pair.second.done)}"
    if pair.lead.value == 0:
        return f"It is level with {name}"
    return f"It lies {number(abs(pair.lead.value))} {'above' if pair.lead.value < 0 else 'below'} {name}"


def span(pair: Pair) -> str:
    if pair.lead.low is None or pair.lead.high is None:
        return ""
    narrow = ", too narrow at so few seeds" if pair.lead.caution else ""
    return f" (95 % interval {signed(pair.lead.low)} to {signed(pair.lead.high)}{narrow})"


def signed(value: float) -> str:
    return number(value).replace("-", MINUS, 1) if value < 0 else number(value)


def _sureness(pair: Pair) -> str:
    if pair.test.n == 1:
        return ""
    p = f"p = {p_value(pair.corrected)}" + (" by Holm" if pair.comparisons > 1 else "")
    return f" ({p}, lower in {100 * pair.ahead.value:.0f} % of all pairs of runs)"
