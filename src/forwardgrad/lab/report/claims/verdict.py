"""The result of a whole store in a few sentences: which arm is better, by how much, how sure. Loads without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from forwardgrad.lab.recipes import NETWORKS
from forwardgrad.lab.report.blocks import count, number
from forwardgrad.lab.report.claims import evidence, findings, goals
from forwardgrad.lab.report.claims.findings import ArmPair
from forwardgrad.lab.statistics import stats
from forwardgrad.lab.store import ArmResult, StudyResult

BATCH = 64
DECIDING = 6  # shared seeds: the least p of so many pairs, 2/2⁶, is below 0.05
TITLES = [network.title for network in NETWORKS.values()]


def verdict(studies: Sequence[StudyResult], bench: dict[str, Any] | None) -> list[str]:
    """The forward gradient against backpropagation, the best arm without a backward pass, and the cost of a step.

    What was not measured is left out.
    """
    said = [_quality(studies), *_beyond(studies), _cost(bench)]
    return [sentence for sentence in said if sentence] or [_others(studies)]


def _others(studies: Sequence[StudyResult]) -> str:
    """Of comparisons between other arms than the paper's two: each has its own verdict in its section."""
    done = sum(sum(arm.complete for arm in arms) > 1 for study in studies for arms in study.groups.values())
    return f"{count(done, 'comparison')} finished: the verdict stands below." if done else "No comparison is finished yet."


def _fair(studies: Sequence[StudyResult]) -> list[tuple[ArmPair, bool]]:
    """Every fair comparison with hyperparameters chosen for each arm, and whether it was trained at full length."""
    found = []
    for study in studies:
        if study.family in ("beyond", "faster", "noise", "finetune", "passes"):
            continue
        for pair in findings.pairs(study):
            tuned = all(arm.record.get("space") or arm.record.get("published") for arm in pair)
            if tuned:
                found.append((pair, not any(arm.shortened for arm in pair)))
    return found


def _quality(studies: Sequence[StudyResult]) -> str:
    fair = _fair(studies)
    full = [pair for pair, whole in fair if whole] or [pair for pair, _ in fair]
    if not full:
        return ""
    gaps = [stats.difference(*map(evidence.losses, pair)) for pair in full]
    ahead = [gap.mean > 0 for gap in gaps]
    backprop, forward = sum(ahead), sum(gap.mean < 0 for gap in gaps)
    among = count(len(full), "comparison")
    start = "with hyperparameters chosen for each"
    if backprop == forward:
        return f"Neither arm is ahead: {start}, either has the lower test loss in {forward} of {among}. {_sure(gaps)}"
    names = ["Backpropagation", "the forward gradient"] if backprop > forward else ["The forward gradient", "backpropagation"]
    wins = f"the lower test loss in {max(backprop, forward)} of {among}{_length(fair)}{_factor(full)}"
    return f"{' is ahead of '.join(names)}: {start}, {wins}. {_sure(gaps)}"


def _length(fair: Sequence[tuple[ArmPair, bool]]) -> str:
    whole = [full for _, full in fair]
    if all(whole):
        return ""
    return f" trained at full length ({sum(not full for full in whole)} more are shortened)" if any(whole) else ", all of them shortened"


def _factor(pairs: Sequence[ArmPair]) -> str:
    """By how much: the loss of the arm that is mostly worse over the other's."""
    ratios = [evidence.ratio(*(evidence.mean(evidence.losses(arm)) for arm in pair)) for pair in pairs]
    known = sorted(one for one in ratios if math.isfinite(one) and one > 0)
    if known and stats.median(known) < 1:
        known = sorted(1 / one for one in known)
    if not known:
        return ""
    middle = stats.median(known)
    if len(known) == 1:
        return f", by a factor of {number(middle)}"
    return f", by a factor of {number(middle)} in the median ({number(known[0])} to {number(known[-1])})"


def _sure(gaps: Sequence[stats.MeanEstimate]) -> str:
    with_interval = [gap for gap in gaps if gap.low is not None and gap.high is not None]
    if not with_interval:
        several = any(gap.n > 1 for gap in gaps)
        why = (
            "no loss of every seed is finite in both arms" if several else "each arm has one seed, which says nothing of how seeds scatter"
        )
        return f"How sure: there is no interval, because {why}."
    apart = sum((gap.low or 0) > 0 or (gap.high or 0) < 0 for gap in with_interval)
    among = count(len(with_interval), "comparison")
    said = f"How sure: the 95 % interval of the difference over seeds excludes zero in {apart} of {among} with several seeds."
    most = max(gap.n for gap in with_interval)
    few = f" The permutation test, which makes no assumption on how losses scatter, needs {DECIDING} shared seeds: here are {most}."
    return said + few if most < DECIDING else said


def _beyond(studies: Sequence[StudyResult]) -> list[str]:
    """The best arm without a backward pass on every network of the study beyond the paper."""
    study = next((study for study in studies if study.family == "beyond"), None)
    groups = study.groups if study else {}
    titles = [title for title in TITLES if title in groups]
    best = [(title, found) for title in titles if (found := _best(groups[title]))]
    if not best:
        return []
    labels = dict.fromkeys(label for _, (label, _) in best)
    if len(labels) == 1:
        places = "; ".join(f"{words} on {title}" for title, (_, words) in best)
        return [f"Without a backward pass, {next(iter(labels))} comes closest to backpropagation in test accuracy: {places}."]
    places = "; ".join(f"{label} on {title}, {words}" for title, (label, words) in best)
    return [f"Without a backward pass, closest to backpropagation in test accuracy come {places}."]


def _best(arms: Sequence[ArmResult]) -> tuple[str, str] | None:
    """The label of the best arm, and how far it is from backpropagation."""
    finished = [arm for arm in arms if arm.complete]
    best = max((arm for arm in finished if goals.forward_only(arm)), key=goals.accuracy, default=None)
    backprop = goals.yardstick(finished)
    apart = goals.gap(best, backprop) if best and backprop else None
    if best is None or apart is None:
        return None
    sure = "one seed" if apart.low is None else f"95 % interval {apart.low:+.2f} to {apart.high:+.2f}, n = {apart.n}"
    return best.label, f"{apart.mean:+.2f} points ({sure})".replace("-", goals.MINUS)


def _cost(bench: dict[str, Any] | None) -> str:
    """Time of a step over that of backpropagation, on each of the paper's networks at its batch."""
    stored = [case for case in (bench or {"cases": []})["cases"] if case.get("optimizer", "sgd") == "sgd"]
    cases = {case["model"]: case for case in stored if case["batch"] == BATCH}
    parts = []
    for model, network in NETWORKS.items():
        told = {arm["name"]: arm["to_backprop"] for arm in cases[model]["arms"] if not arm["failed"]} if model in cases else {}
        dense, rank = (told.get(name) or {"value": None} for name in ("forward", "low-rank"))
        if dense["value"] is not None:
            sure = f" (95 % interval {number(dense['low'])} to {number(dense['high'])})" if dense["low"] is not None else ""
            cheap = f", {number(rank['value'])} with directions of rank 1" if rank["value"] is not None else ""
            parts.append(f"{number(dense['value'])}{sure} on {network.title}{cheap}")
    return f"A step of the forward gradient takes, in steps of backpropagation, {'; '.join(parts)}." if parts else ""
