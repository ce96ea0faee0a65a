"""What newer papers claim of random directions, decided from the study `passes`: arms with equal forward passes. Loads without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from forwardgrad.lab.recipes import passes
from forwardgrad.lab.report.blocks import Judged, Observation, count, has_curve, lost, number, run_curves
from forwardgrad.lab.report.claims import evidence as known
from forwardgrad.lab.report.claims import findings, speed
from forwardgrad.lab.report.claims.evidence import OPEN, above, below, between, status
from forwardgrad.lab.report.claims.goals import MINUS
from forwardgrad.lab.statistics import stats
from forwardgrad.lab.store import ArmResult, Done, StudyResult

THIRD = 1 / 3  # of MeZO's forward passes: "3× fewer"
EQUAL = 1.05  # times another arm's test loss, within which it loses nothing
POINT = 1.0  # of test accuracy: an arm that is ahead by less does not beat the other
ELSEWHERE = "tested here on a small network trained from random weights; the paper fine-tunes large pretrained ones"


@dataclass(frozen=True)
class Paired:
    """An arm, and the one that it is set beside; a run of both for every seed that both have finished."""

    title: str
    one: ArmResult | None
    other: ArmResult | None

    @cached_property
    def missing(self) -> str:
        """Why the two cannot be compared, empty where they can."""
        if self.one is None or self.other is None or not (self.one.complete and self.other.complete):
            return "an arm is not there, or unfinished"
        if unequal := findings.unequal((self.one, self.other)):
            return f"different {', '.join(unequal)}"
        given = _given(self.one)
        if self.one.data != passes.FULL.data or given < passes.FULL.passes:
            return f"shortened: {given:,} forward passes on {self.one.data}, of {passes.FULL.passes:,} on {passes.FULL.data}"
        return ""

    @cached_property
    def runs(self) -> list[tuple[Done, Done]]:
        if self.one is None or self.other is None or findings.unequal((self.one, self.other)):
            return []
        mine, theirs = self.one.by_seed, self.other.by_seed
        return [(mine[seed], theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]

    @property
    def where(self) -> str:
        return f"{self.one.label} beside {self.other.label}" if self.one and self.other else ""

    @property
    def seeds(self) -> str:
        return count(len(self.runs), "seed")

    def over(self, values: Callable[[Done], float]) -> stats.MeanEstimate | None:
        """The geometric mean over seeds of the first arm's value over the other's; None where one has no finite positive value."""
        ratios = [known.ratio(values(one), values(other)) for one, other in self.runs]
        return known.over(ratios) if ratios and all(map(math.isfinite, ratios)) else None

    def ahead(self, one: Callable[[Done], float], other: Callable[[Done], float]) -> stats.MeanEstimate | None:
        """Points of accuracy that the first arm has more than the other, mean over seeds, from how each arm's runs are read."""
        pairs = [(100 * one(mine), 100 * other(theirs)) for mine, theirs in self.runs]
        return stats.difference([mine for mine, _ in pairs], [theirs for _, theirs in pairs]) if pairs else None


def paired(study: StudyResult, one: str, other: str) -> list[Paired]:
    """These two arms on every task of the study."""
    found = []
    for title, arms in study.groups.items():
        first = {name: next((arm for arm in arms if arm.name == f"mlp-{name}"), None) for name in (one, other)}
        found.append(Paired(title, first[one], first[other]))
    return found


def fullest(studies: Sequence[StudyResult]) -> StudyResult | None:
    """The record that can decide most, where this study is stored several times; None where it is not."""
    mine = [study for study in studies if study.family == "passes"]
    return max(mine, key=lambda study: sum(_given(arm) * len(arm.done) for arm in study.arms if arm.complete), default=None)


def _given(arm: ArmResult) -> int:
    """The forward passes that each run of an arm was given."""
    return int((arm.record.get("training") or {}).get("forward_passes") or 0)


def judge(study: StudyResult) -> tuple[Judged, ...]:
    """The claims on every task of the study."""
    return tuple(claim for place in range(len(study.groups)) for claim in _judged(study, place))


def _judged(study: StudyResult, place: int) -> list[Judged]:
    def pair(one: str, other: str) -> Paired:
        return paired(study, one, other)[place]

    singly, severally = pair("forward", "mezo"), pair("forward-8", "mezo-8")
    return [
        _third(study, pair("fzoo", "mezo")),
        _as_good(
            study, pair("rank-one", "mezo-8"), "rank",
            "Directions of rank one lose nothing against whole ones, at an equal population and equally many steps",
            "Sarkar et al. 2025 (EGGROLL), arXiv:2511.16652, abstract",
            "tested here on a classifier, with losses as they are for fitness and a population of 8 antithetic pairs; theirs are policies "
            "and language models, and populations up to hundreds of thousands",
        ),
        _beats(
            study, severally, singly, "forward", "Forward-mode AD beats zeroth order at equal forward passes", _at_the_end,
            "test accuracy after equal forward passes, a step of forward mode along K directions counting as K + 1",
        ),
        _beats(
            study, severally, singly, "forward-seconds", "Forward-mode AD beats zeroth order in equal time", _in_time,
            "validation accuracy at the last evaluation in equal time, that in which the faster arm takes all of its passes, a step taking "
            "what it took in the run of its arm that other programs disturbed least",
        ),
        _as_good(
            study, pair("mezo", "mezo-8"), "directions",
            "One direction a step does as well as several at as many forward passes",
            "Malladi et al. 2023 (MeZO), 2 and appendix A", ELSEWHERE,
        ),
    ]  # fmt: skip


def _third(study: StudyResult, pair: Paired) -> Judged:
    ratios = [_passes_ratio(one, other) for one, other in pair.runs]
    misses = sum(not math.isfinite(ratio) for ratio in ratios)
    found = known.over(ratios) if ratios and not misses else None
    decides = not pair.missing
    yes = decides and bool(found and found.high is not None and found.high <= THIRD)
    no = decides and (bool(found and above(found, THIRD)) or (len(ratios) > 1 and misses == len(ratios)))
    words = f"{between(found)} times MeZO's passes" if found else f"not reached in {misses} of {count(len(ratios), 'run')}"
    return _claim(
        study, pair.title, "fzoo",
        "One-sided differences divided by the spread of the losses (FZOO) need a third of MeZO's forward passes",
        "Dang et al. 2025 (FZOO), arXiv:2506.09034, abstract: “3× fewer forward passes”",
        (yes, no), (Observation(f"{pair.where}, to MeZO's loss", words, pair.seeds), *_losses(pair)) if ratios else (),
        "forward passes until the validation loss that MeZO's run of the same seed ends with, FZOO over MeZO, at the first evaluation "
        "there: the 95 % t interval of the mean logarithm lies at or below that of a third (confirmed) or above it, or no run of several "
        f"gets there (refuted). It is {ELSEWHERE}.",
        _why([pair], [found], "the interval holds a third"),
    )  # fmt: skip


def _passes_ratio(one: Done, other: Done) -> float:
    target = math.inf if lost(other) else other.validation_loss
    return known.ratio(passes_to(one, target), passes_to(other, target)) if math.isfinite(target) else math.inf


def passes_to(run: Done, target: float) -> float:
    """Forward passes to the first evaluation at or below a validation loss: all steps of a run take equally many."""
    if not run.passes:
        return math.inf
    return run_curves.reached(run, "step", target) * run.passes / max(1, int(run.result["steps"]))


def _as_good(study: StudyResult, pair: Paired, name: str, said: str, source: str, unlike: str) -> Judged:
    found = pair.over(lambda run: run.loss)
    decides = not pair.missing
    yes, no = decides and bool(found and below(found, EQUAL)), decides and bool(found and above(found, EQUAL))
    return _claim(
        study, pair.title, name, said, source, (yes, no), _losses(pair),
        "test loss after equal forward passes, the first arm over the second, paired by seed: the 95 % t interval of the mean logarithm "
        f"lies below that of {EQUAL:g} (confirmed) or above it (refuted). It is {unlike}.",
        _why([pair], [found], f"the interval holds {EQUAL:g}"),
    )  # fmt: skip


def _losses(pair: Paired) -> tuple[Observation, ...]:
    if not pair.runs:
        return ()
    found = pair.over(lambda run: run.loss)
    ends = [known.mean([run.loss for run in arm]) for arm in zip(*pair.runs, strict=True)]
    ratio = f"; {between(found)} times" if found else ""
    return (Observation(f"{pair.where}, at the end", f"test loss {number(ends[0])} and {number(ends[1])}{ratio}", pair.seeds),)


Ahead = Callable[[Paired], stats.MeanEstimate | None]


def _beats(study: StudyResult, decisive: Paired, alike: Paired, name: str, said: str, ahead: Ahead, measured: str) -> Judged:
    """`alike` is shown and decides nothing: along one direction both arms have the same estimate, and equally many passes a step."""
    gap = ahead(decisive)
    untimed = _untimed(decisive) if ahead is _in_time else ""
    decides = not untimed and not decisive.missing
    yes, no = decides and bool(gap and above(gap, 0)), decides and bool(gap and below(gap, POINT))
    readings = [Observation(pair.where, _points(found), pair.seeds) for pair in (decisive, alike) if (found := ahead(pair))]
    return _claim(
        study, decisive.title, name, said,
        "Panchal et al. 2024 (SPRY), arXiv:2405.15551, abstract: “5.2–13.5% higher accuracy” and convergence in less time",
        (yes, no), tuple(readings),
        f"{measured}; forward mode less zeroth order on two sides, with eight directions a step, paired by seed: the 95 % t interval of "
        f"the difference lies above 0 (confirmed), or below {POINT:g} point (refuted). It is {ELSEWHERE}, by many clients. With one "
        "direction both estimates are alike up to the order of ε², in as many passes. So the difference of those two arms decides nothing: "
        "it shows what the choice of a rate by one trial leaves to chance.",
        f"Seconds are not comparable: {untimed}." if untimed else _why([decisive], [gap], f"the interval holds 0 or {POINT:g}"),
    )  # fmt: skip


def _points(gap: stats.MeanEstimate) -> str:
    ends = "no interval" if gap.low is None or gap.high is None else f"95 % interval {gap.low:+.2f} to {gap.high:+.2f}"
    return f"{gap.mean:+.2f} points of accuracy ({ends})".replace("-", MINUS)


def _at_the_end(pair: Paired) -> stats.MeanEstimate | None:
    return pair.ahead(_at_end, _at_end)


def _in_time(pair: Paired) -> stats.MeanEstimate | None:
    """Accuracy when the arm that is through its passes first is so: a step takes what it took in the arm's least disturbed run."""
    if pair.one is None or pair.other is None or not pair.runs:
        return None
    paces = [min(run.seconds_per_step for run in arm.done) for arm in (pair.one, pair.other)]
    steps = [max(int(run.result["steps"]) for run in arm.done) for arm in (pair.one, pair.other)]
    seconds = min(count * pace for count, pace in zip(steps, paces, strict=True))
    one, other = (seconds / pace if pace else math.inf for pace in paces)
    return pair.ahead(lambda run: _by_step(run, one), lambda run: _by_step(run, other))


def _at_end(run: Done) -> float:
    return 0.0 if lost(run) or not math.isfinite(run.accuracy) else run.accuracy  # a run that was lost got nothing right


def _by_step(run: Done, step: float) -> float:
    """The validation accuracy at the last evaluation up to a step, nothing right before the first; to half a step, as steps are whole."""
    table = run.evaluations if has_curve(run) and not lost(run) else {}
    seen = [each for at, each in zip(table.get("step", []), table.get("validation_accuracy", []), strict=True) if at <= step + 0.5]
    return seen[-1] if seen else 0.0


def _untimed(pair: Paired) -> str:
    """Why seconds of the two arms cannot be compared, empty where they can."""
    arms = [arm for arm in (pair.one, pair.other) if arm]
    runs = [run for arm in arms for run in arm.done]
    unequal = [what for what in speed.EQUAL_PLACES if len({str(run.environment.get(what)) for run in runs}) > 1]
    reasons = [f"different {', '.join(unequal)}"] if unequal else []
    reasons += [f"{arm.label}: {arm.shared}" for arm in arms if arm.shared]
    reasons += [f"{arm.label}: steps were not compiled ({why})" for arm in arms if (why := speed.fallback(arm))]
    return "; ".join(reasons)


def _why(pairs: Sequence[Paired], found: Sequence[stats.MeanEstimate | None], holds: str) -> str:
    if missing := next((pair.missing for pair in pairs if pair.missing), ""):
        return f"{missing[0].upper()}{missing[1:]}."
    if any(one is None for one in found):
        return "A run was lost, or did not get there."
    if any(one.low is None for one in found if one):
        return "One seed gives no interval."
    return f"{holds[0].upper()}{holds[1:]}."


def _claim(
    study: StudyResult, title: str, name: str, said: str, source: str, decided: tuple[bool, bool], readings: tuple[Observation, ...],
    rule: str, why: str,
) -> Judged:  # fmt: skip
    word = status(*decided)
    row = name.partition("-")[0]
    open_ = word == OPEN
    return Judged(
        f"{study.name}-{name}", f"{said}: {title}", source, word, readings, rule,
        why if open_ else "", f"forwardgrad reproduce passes --rows {row} --seeds {2 * passes.FULL.seeds}" if open_ else "", study.name,
    )  # fmt: skip


def verdicts(study: StudyResult) -> list[str]:
    """A sentence for every claim: its outcome, and the first thing that was measured of it."""
    said = []
    for claim in judge(study):
        seen = f": {claim.readings[0].value} ({claim.readings[0].n})" if claim.readings else ""
        said.append(f"{claim.said} – {claim.status}{seen}.")
    return said
