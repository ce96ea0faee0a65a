"""What the stored results say, as sentences computed from them; nothing here is decided beforehand. Loads without torch."""

from __future__ import annotations

from collections.abc import Sequence

from forwardgrad.lab.report.blocks import count, exact, number
from forwardgrad.lab.statistics import stats
from forwardgrad.lab.store import ArmResult, StudyResult

ArmPair = tuple[ArmResult, ArmResult]  # the forward and the backprop arm of one comparison, all runs of both finished


def pairs(study: StudyResult) -> list[ArmPair]:
    """The comparisons that are finished and fair."""
    return [pair for pair in _finished(study) if not unequal(pair)]


def _finished(study: StudyResult) -> list[ArmPair]:
    found = []
    for arms in study.groups.values():
        first = {kind: next((arm for arm in arms if arm.kind == kind and arm.complete), None) for kind in ("forward", "backprop")}
        if first["forward"] and first["backprop"]:
            found.append((first["forward"], first["backprop"]))
    return found


def unequal(pair: ArmPair) -> list[str]:
    """What two arms of a group differ in though a fair comparison holds it equal. What was searched over may differ."""
    forward, backprop = ({**arm.terms} for arm in pair)
    searched = {name.replace("_", " ") for arm in pair for name in arm.record.get("space") or {}}
    return [what for what in forward if what not in searched and forward[what] != backprop[what]]


def _unfair(study: StudyResult) -> str:
    parts = [f"{pair[0].record['group']} (different {', '.join(what)})" for pair in _finished(study) if (what := unequal(pair))]
    return f"Not comparable, and left out of the count: {'; '.join(parts)}." if parts else ""


def headlines(study: StudyResult) -> list[str]:
    """Who reached the lower test loss, how often, and whether seeds allow to say so; apart for arms as given and arms tuned."""
    everything = pairs(study)
    if not everything:
        return ["No fair comparison is finished yet."]
    given = [pair for pair in everything if not any(arm.record.get("space") for arm in pair)]
    tuned = [pair for pair in everything if pair not in given]
    if not (given and tuned):
        return [_winner(everything), _spread(everything)]
    return ["At one learning rate: " + _lower_first(_winner(given)), "Each arm tuned: " + _lower_first(_winner(tuned)), _spread(everything)]


def _winner(compared: Sequence[ArmPair]) -> str:
    gaps = [_gap(pair).mean for pair in compared]
    forward, level = sum(gap < 0 for gap in gaps), sum(gap == 0 for gap in gaps)
    backprop = len(gaps) - forward - level
    rest = f", and {level} {'was' if level == 1 else 'were'} level" if level else ""
    if forward == backprop:
        return f"Neither arm is ahead: each reached the lower test loss in {forward} of {count(len(gaps), 'comparison')}{rest}."
    name, wins = ("Backpropagation", backprop) if backprop > forward else ("The forward gradient", forward)
    return f"{name} reached the lower test loss in {wins} of {count(len(gaps), 'comparison')}{rest}{_sizes(compared)}."


def _sizes(compared: Sequence[ArmPair]) -> str:
    """How large the test losses are: both where there is one comparison, their ranges where there are several."""
    losses = [[stats.estimate([run.loss for run in arm.done]).mean for arm in arms] for arms in zip(*compared, strict=True)]
    forward, backprop = (number(min(arm)) if min(arm) == max(arm) else f"{number(min(arm))} to {number(max(arm))}" for arm in losses)
    return f": {backprop} with backpropagation, {forward} with the forward gradient"


def _gap(pair: ArmPair) -> stats.MeanEstimate:
    forward, backprop = ([run.loss for run in arm.done] for arm in pair)
    return stats.difference(forward, backprop)


def _spread(compared: Sequence[ArmPair]) -> str:
    gaps = [_gap(pair) for pair in compared]
    known = [gap for gap in gaps if gap.low is not None and gap.high is not None]
    if all(gap.n == 1 for gap in gaps):
        return "Each arm has one seed, which decides nothing about spread: no interval can be given."
    apart = sum(1 for gap in known if (gap.low or 0.0) > 0 or (gap.high or 0.0) < 0)
    without = len(gaps) - len(known)
    rest = f"; {without} had too few seeds or losses that are not finite for an interval" if without else ""
    each = ", each taken by itself" if len(known) > 1 else ""
    return f"Over the seeds, the 95 % interval of the paired difference excludes zero in {apart} of {len(known)}{each}{rest}."


def details(study: StudyResult) -> list[str]:
    """Divergence and failure, unfinished and shortened arms, the published readings: each where there is something to say."""
    lost = (_lost(study, status) for status in ("diverged", "failed"))
    said = (_unfair(study), *lost, _unfinished(study), _shortened(study), _published(study))
    return [sentence for sentence in said if sentence]


def _lost(study: StudyResult, status: str) -> str:
    parts = []
    names = {"forward": "the forward gradient", "backprop": "backpropagation"}
    for kind, name in (names | {arm.kind: arm.label for arm in study.arms if arm.kind not in names}).items():
        runs = [run for arm in study.arms if arm.kind == kind for run in arm.done]
        if lost := sum(run.result["status"] == status for run in runs):
            parts.append(f"{lost} of {count(len(runs), 'run')} of {name}")
    return f"{status.capitalize()}: {' and '.join(parts)}." if parts else ""


def _unfinished(study: StudyResult) -> str:
    waiting = sum(not arm.complete for arm in study.arms)
    return f"{waiting} of {count(len(study.arms), 'arm')} {_is(waiting)} unfinished and left out of the count." if waiting else ""


def _shortened(study: StudyResult) -> str:
    labels = [arm.shortened for arm in study.arms if arm.shortened]
    if not labels:
        return ""
    which = "Every arm" if len(labels) == len(study.arms) else f"{len(labels)} of {count(len(study.arms), 'arm')}"
    published = any(arm.record.get("published") for arm in study.arms)
    whose, column = ("the paper's", "with the published column") if published else ("the full study's", "with what is longer")
    return (
        f"{which} trained for fewer epochs than {whose} ({'; '.join(dict.fromkeys(labels))}): "
        f"such arms compare with one another, not {column}."
    )


def _published(study: StudyResult) -> str:
    inside, asked = 0, 0
    for arm in study.arms:
        published = arm.record.get("published")
        test = next((run.result["test"] for run in arm.done if run.result.get("test")), None)
        if not published or arm.shortened or test is None:
            continue
        asked += 1
        low, high = test.get("last16_low"), test.get("last16_high")
        # Compared as printed, with three decimals: a published 0.000 may stand for anything below 0.0005.
        inside += low is not None and high is not None and round(low, 3) <= published["test_loss"] <= round(high, 3)
    if not asked:
        return ""
    return (
        f"Of {count(asked, 'arm')} trained as long as the paper's, {inside} {'has' if inside == 1 else 'have'} "
        "the published reading within the 5–95 % range of our own."
    )


def two_settings(name: str, same: dict[str, ArmResult], tuned: dict[str, ArmResult]) -> str:
    """What changes for one model between one learning rate for both arms and each arm tuned."""
    name = name[:1].upper() + name[1:]
    arms = [setting.get(kind) for setting in (same, tuned) for kind in ("forward", "backprop")]
    there = [arm for arm in arms if arm is not None and arm.complete]
    if len(there) < 4:
        return f"{name}: not all four arms are finished, so the two settings cannot be compared yet."
    ends = [number(stats.estimate([run.validation_loss for run in arm.done]).mean) for arm in there]
    rates = [float(arm.run["optimizer"]["lr"]) for arm in there]
    shared = exact(rates[0]) if rates[0] == rates[1] else f"{exact(rates[0])} and {exact(rates[1])}"
    return (
        f"{name}: at one learning rate ({shared}) the validation loss ends at {ends[0]} with the forward gradient and {ends[1]} with "
        f"backpropagation; each tuned, at {ends[2]} and {ends[3]}. {_times('Backpropagation', rates[3], rates[1])}; "
        f"{_lower_first(_times('The forward gradient', rates[2], rates[0]))}."
    )


def _times(name: str, tuned: float, shared: float) -> str:
    return f"{name}'s tuned learning rate, {exact(tuned)}, is {number(tuned / shared)} times the shared one"


def _is(n: int) -> str:
    return "is" if n == 1 else "are"


def _lower_first(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
