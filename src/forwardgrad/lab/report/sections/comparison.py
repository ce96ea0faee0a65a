"""The part of a report that compares a study's arms over seeds, trials and tasks, and says how sure it is. Loads without torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from forwardgrad.lab.report.blocks import (
    NONE,
    TARGETS,
    TARGETS_ELSEWHERE,
    Block,
    Cell,
    Picture,
    Table,
    arm_cells,
    duration,
    lost,
    number,
    percent,
    tables,
)
from forwardgrad.lab.report.sections import comparison_figures, learning
from forwardgrad.lab.report.sections import comparison_verdict as verdict
from forwardgrad.lab.report.sections.comparison_figures import BANDS, Searched
from forwardgrad.lab.report.sections.comparison_verdict import Pair, error, signed
from forwardgrad.lab.statistics import TOLERANCE, WITHIN, BestOf, ConfidenceInterval, Profile, budget, comparison, stats
from forwardgrad.lab.store import ArmResult, Done, StudyResult, finite

PER_DECADE = 4  # classes of a decade in which rates that were drawn compete, those of a grid being compared as they are
MOST_PAIRS = 10  # rows of pairs shown in full; of more, those with the best arm or with backpropagation
FEWEST_TASKS = 3  # for a profile over tasks
TYPICAL = (
    ("lost", "runs that diverged or failed, of all; each counts as infinitely bad, so that a mean over them is not finite"),
    ("mean, median", "over seeds, with the 95 % BCa bootstrap interval (Efron 1987); where runs were lost, a median's of order statistics"),
    ("IQM", "the interquartile mean: without the ⌊n/4⌋ best and worst seeds (Agarwal et al. 2021)"),
    ("interval", "in brackets; below five seeds it is marked, being too narrow: of three normal values it holds the mean in 72 % of cases"),
)  # fmt: skip
PAIRED = (
    ("lower by", "mean difference in test loss over shared seeds, 95 % BCa bootstrap interval"),
    ("p", "of the paired permutation test, exact up to 13 pairs; n pairs give no p below 2/2ⁿ. By signed ranks where runs were lost"),
    ("p by Holm", "corrected for all comparisons within the group, the ones not shown included"),
    ("lower in", "pairs of runs, of all that there are, in which the first arm's loss is lower, ties counting half; percentile bootstrap"),
    ("decided", "where p by Holm is at most 0.05 and the interval leaves out zero: wrong anywhere in a group with a chance of at most 5 %"),
)
REACHED = (
    ("to loss …", "step of the first evaluation with at most this validation loss, median over seeds, a miss being infinite, and below it "
     "the training time; in brackets the 95 % interval between order statistics, which six seeds are needed for"),
)  # fmt: skip
SEARCHED = (
    ("lost", "trials that diverged or failed"),
    ("best of 1, of all", "validation loss that the best of so many trials is expected to have (Dodge et al. 2019), the median where "
     "trials were lost; in brackets the middle 95 % over resampled trials"),
    ("good rates", f"learning rates around the best one within {TOLERANCE:g} times its loss"),
    ("width", "of that range, in powers of ten, as fine as the rates that were tried; 'at least' where it ends where they do"),
)  # fmt: skip


def blocks(study: StudyResult) -> list[Block]:
    """Verdicts, tables and figures, each where there is something to say: spread needs two seeds, a budget two trials."""
    pairs = {title: verdict.pairs(arms) for title, arms in study.groups.items()}
    tuned = {title: searches(arms) for title, arms in study.groups.items()}
    found: list[Block] = [tuple(verdict.verdict(title, arms, pairs[title]) for title, arms in study.groups.items())]
    found += [table for table in (typical(study), paired(pairs), *times_to_targets(study), searched(tuned)) if table is not None]
    for index, (title, tried) in enumerate(list(tuned.items())[: learning.drawn(study)]):
        found += _search_pictures(f"{study.name}-{index}", title, [search for _, search in tried])
    return [*found, *_profiles(study)]


def typical(study: StudyResult) -> Table | None:
    """Mean, median and interquartile mean of every arm's test loss and accuracy; None where no arm has two runs."""
    rows = []
    for title, arms in study.groups.items():
        shown = [arm for arm in arms if arm.done]
        if any(len(arm.done) > 1 for arm in shown):
            rows.append((title, tuple((arm_cells.arm_cell(arm), _lost_cell(arm), *_losses(arm), *_accuracies(arm)) for arm in shown)))
    heads = ("mean", "median", "IQM")
    columns = ("arm", "lost", *(f"{what}, {head}" for what in ("loss", "accuracy") for head in heads))
    return Table(columns, tuple(rows), "Test loss and accuracy over seeds", TYPICAL) if rows else None


def _lost_cell(arm: ArmResult) -> Cell:
    runs = sum(map(lost, arm.done))
    waiting = "" if arm.complete else arm.progress
    return Cell(f"{runs} of {len(arm.done)}", waiting, "warn" if runs or waiting else "quiet")


STATISTICS = (comparison.mean, comparison.median, comparison.interquartile_mean)


def _losses(arm: ArmResult) -> list[Cell]:
    values = [verdict.loss(run) for run in arm.done]
    return [interval_cell(statistic(values), number) for statistic in STATISTICS]


def _accuracies(arm: ArmResult) -> list[Cell]:
    """An interval of errors as one of accuracies, none of them below 0."""
    values = [error(run) for run in arm.done]
    return [interval_cell(_turned(statistic(values)), percent) for statistic in STATISTICS]


def _turned(found: ConfidenceInterval) -> ConfidenceInterval:
    low, high = (None if end is None else max(0.0, 1 - end) for end in (found.high, found.low))
    return dataclasses.replace(found, value=1 - found.value, low=low, high=high)


def interval_cell(found: ConfidenceInterval, words: Callable[[float], str]) -> Cell:
    """A value with its interval below it, or why there is none; an end may be infinite."""
    tone = "" if math.isfinite(found.value) else "warn"
    if found.low is None or found.high is None:
        return Cell(words(found.value), found.caution, tone)
    return Cell(words(found.value), f"{_to(found, words)}, {found.caution or f'n = {found.n}'}", tone)


def _to(found: ConfidenceInterval, words: Callable[[float], str]) -> str:
    """Both ends, the unit named once."""
    assert found.low is not None
    assert found.high is not None
    low, high = (words(end) if math.isfinite(end) else "∞" for end in (found.low, found.high))
    unit = high[high.index(" ") :] if " " in high and math.isfinite(found.high) else ""
    return f"{low.removesuffix(unit) if unit else low} to {high}"


def paired(pairs: dict[str, list[Pair]]) -> Table | None:
    """Every two arms of a group, over at least two shared seeds; None where there are none."""
    rows = []
    for title, found in pairs.items():
        shown = [pair for pair in found if pair.test.n > 1]
        if len(shown) > MOST_PAIRS:
            best = shown[0].first.name
            shown = [pair for pair in shown if best == pair.first.name or "backprop" in (pair.first.kind, pair.second.kind)]
        if shown:
            rows.append((title, tuple(map(_pair_row, shown))))
    columns = ("arm", "below", "lower by", "p", "p by Holm", "lower in", "decided")
    return Table(columns, tuple(rows), "Arms beside one another, over shared seeds", PAIRED) if rows else None


def _pair_row(pair: Pair) -> tuple[Cell, ...]:
    test, (one, two) = pair.test, pair.lost
    ranks = ", signed ranks" if test.statistic == "signed ranks" else ""
    return (
        arm_cells.arm_cell(pair.first),
        arm_cells.arm_cell(pair.second),
        Cell("lost runs", f"{one} and {two}", "warn") if one or two else interval_cell(pair.lead, signed),
        Cell(verdict.p_value(test.p), f"n = {test.n}, least {verdict.p_value(test.least)}{ranks}"),
        Cell(verdict.p_value(pair.corrected), tables.count(pair.comparisons, "comparison")),
        interval_cell(pair.ahead, lambda share: f"{100 * share:.0f} %"),
        Cell("not decided", pair.undecided, "quiet") if pair.undecided else Cell("decided"),
    )


def times_to_targets(study: StudyResult) -> list[Table]:
    """Steps and seconds to every target that an arm reached, one table for each data set; none where every arm has one run."""
    found = []
    for data in dict.fromkeys(arm.data for arm in study.arms if len(arm.done) > 1):
        arms = tuple(arm for arm in study.arms if arm.data == data and arm.done)
        targets = [target for target in targets_of(data) if any(_hits(arm, target) for arm in arms)]
        rows = []
        for title, group in StudyResult(study.name, study.title, arms).groups.items():
            rows.append((title, tuple((arm_cells.arm_cell(arm), *(_time(arm, target) for target in targets)) for arm in group)))
        if targets:
            caption = f"Steps and seconds to a loss on {tables.DATA.get(str(data), str(data))}"
            found.append(Table(("arm", *(f"to loss {target}" for target in targets)), tuple(rows), caption, REACHED))
    return found


def targets_of(data: str | None) -> tuple[float, ...]:
    return TARGETS.get(str(data), TARGETS_ELSEWHERE)


def _place(run: Done, column: str, target: float) -> float:
    """Where a run first reached a target, infinite where it never did. A run that failed may have no evaluations."""
    table = run.evaluations if run.result["status"] != "failed" else {}
    return stats.first_at_or_below(table.get(column, []), table.get("validation_loss", []), target)


def _hits(arm: ArmResult, target: float) -> int:
    return sum(math.isfinite(_place(run, "step", target)) for run in arm.done)


def to_target(arm: ArmResult, column: str, target: float) -> ConfidenceInterval:
    """Steps ("step") or seconds ("seconds") until an arm's runs were first at a validation loss: the median, misses infinite."""
    return comparison.between_order_statistics([_place(run, column, target) for run in arm.done])


def _time(arm: ArmResult, target: float) -> Cell:
    steps, seconds = (to_target(arm, column, target) for column in ("step", "seconds"))
    hits = _hits(arm, target)
    among = f"by {hits} of {tables.count(len(arm.done), 'run')}" if hits < len(arm.done) else ""
    if not math.isfinite(steps.value):
        return Cell("not reached", f"except {among}" if hits else "", "quiet")
    took = f"{duration(seconds.value)}{_range(seconds, duration)}"
    return Cell(f"{steps.value:,.0f} steps{_range(steps, lambda at: f'{at:,.0f}')}", ", ".join(filter(None, (took, arm.shared, among))))


def _range(found: ConfidenceInterval, words: Callable[[float], str]) -> str:
    return "" if found.low is None else f" [{_to(found, words)}]"


def searched(tuned: Mapping[str, Sequence[tuple[ArmResult, Searched]]]) -> Table | None:
    """What the trials of every arm say about its budget and its learning rate. None where no arm has two trials."""
    rows = [(title, tuple(_search_row(arm, found) for arm, found in tried)) for title, tried in tuned.items() if tried]
    columns = ("arm", "trials", "lost", "best of 1", "best of all", "good rates", "width")
    return Table(columns, tuple(rows), "What the search bought", SEARCHED) if rows else None


def _search_row(arm: ArmResult, found: Searched) -> tuple[Cell, ...]:
    results = [trial for trial in arm.trials if trial]
    gone = sum(trial["status"] != "finished" for trial in results)
    waiting = f"{len(arm.trials) - len(results)} unfinished" if len(results) < len(arm.trials) else ""
    first, last = (_best_cell(found.best, place) for place in (0, -1))
    counts = Cell(str(len(arm.trials)), waiting), Cell(str(gone), "", "warn" if gone else "quiet")
    if found.rates is None:
        return (arm_cells.arm_cell(arm), *counts, first, last, NONE, NONE)
    rates = found.rates
    bound = "at least, " if rates.below or rates.above else ""
    alone = rates.low == rates.high
    good = Cell(number(rates.best)) if alone else Cell(f"{number(rates.low)} to {number(rates.high)}", f"best {number(rates.best)}")
    width = Cell("no other rate" if alone else number(rates.decades), f"{bound}of {tables.count(len(rates.rates), 'rate')}")
    return (arm_cells.arm_cell(arm), *counts, first, last, good, width)


def _best_cell(best: BestOf, place: int) -> Cell:
    value = ConfidenceInterval(best.value[place], best.low[place], best.high[place], best.trials[-1])
    return Cell(number(value.value), _to(value, number), "" if math.isfinite(value.value) else "warn")


def _trials(arm: ArmResult) -> list[tuple[dict[str, object], float]]:
    """The values and validation losses of the trials that have a result; those that were lost are infinite."""
    return [
        (planned["values"], finite(trial["validation_loss"]) if trial["status"] == "finished" else math.inf)
        for planned, trial in zip(arm.record["trials"], arm.trials, strict=True)
        if trial
    ]


def searches(arms: Sequence[ArmResult]) -> list[tuple[ArmResult, Searched]]:
    """The arms with two trials or more. Where one of them lost a trial, all are shown by their medians, so that they compare."""
    tuned = [arm for arm in arms if len(_trials(arm)) > 1]
    expected = all(math.isfinite(loss) for arm in tuned for _, loss in _trials(arm))
    return [(arm, _search(arm, expected)) for arm in tuned]


def _search(arm: ArmResult, expected: bool) -> Searched:
    """An arm's trials as figures and tables need them."""
    trials = _trials(arm)
    rated = [(float(rate), loss) for values, loss in trials if _positive(rate := values.get("lr"))]  # type: ignore[arg-type]
    drawn = not isinstance(arm.record["space"].get("lr"), list)
    rates = budget.sensitivity(rated, PER_DECADE if drawn else None) if rated else None
    best = budget.best_of([loss for _, loss in trials], expected)
    return Searched(arm.kind, arm.label, best, rates, tuple(rate for rate, loss in rated if math.isinf(loss)))


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _search_pictures(name: str, title: str, found: Sequence[Searched]) -> list[Picture]:
    pictures = []
    if found:
        band = "band: the middle 95 % over resampled trials" if len(found) <= BANDS else "bands are in the table, being too many to draw"
        what = "expectation" if found[0].best.expected else "median, because trials were lost"
        caption = f"The best validation loss of so many trials, {title}. Line: {what}; {band}."
        pictures.append(Picture(f"{name}-budget", comparison_figures.budget(f"{name}-budget", title, found), caption))
    rated = [arm for arm in found if len({*arm.lost, *(arm.rates.rates if arm.rates else ())}) > 1]
    if rated:
        caption = (
            f"Validation loss of trials against learning rate, at the best of the other hyperparameters, {title}. Wide line: within "
            f"{TOLERANCE:g} times the best; crosses at the upper edge: trials that diverged or failed."
        )
        pictures.append(Picture(f"{name}-rates", comparison_figures.sensitivity(f"{name}-rates", title, rated), caption))
    return pictures


def _profiles(study: StudyResult) -> list[Block]:
    """Shares of tasks against time, where at least three groups have the same kinds of arms."""
    found = profiles(study)
    if not found:
        return []
    labels = {arm.kind: arm.label for arm in reversed(study.arms)}
    panels = [(f"in {what}", [(kind, labels[kind], profile) for kind, profile in arms.items()]) for what, arms in found.items()]
    scores = [f"{title}: {', '.join(f'{label} {number(profile.score)}' for _, label, profile in arms)}" for title, arms in panels]
    caption = (
        f"Performance profile over {panels[0][1][0][2].tasks} tasks: the share of them where an arm is at the target within so many times "
        "the fastest arm's steps or seconds (Dahl et al. 2023). A task's target is the lowest of its validation losses that an arm reached."
    )
    sentence = f"Area under the profile up to {WITHIN:g} times the fastest, 1 being the fastest everywhere: {'; '.join(scores)}."
    name = f"{study.name}-profile"
    return [sentence, Picture(name, comparison_figures.profile(name, panels), caption)]


def profiles(study: StudyResult) -> dict[str, dict[str, Profile]]:
    """By "steps" and "seconds", the profile of every kind of arm that all groups have; empty where they are fewer than three tasks, or
    two kinds. Seconds are left out where runs shared them.
    """
    groups = [group for arms in study.groups.values() if len(group := _first_of_each(arms)) > 1]
    shared = [kind for kind in (groups[0] if groups else {}) if all(kind in group for group in groups)]
    if len(groups) < FEWEST_TASKS or len(shared) < 2:
        return {}
    columns = {"steps": "step", "seconds": "seconds"}
    if any(group[kind].shared for group in groups for kind in shared):
        del columns["seconds"]
    tasks = [[group[kind] for kind in shared] for group in groups]
    targets = [_hardest(arms) for arms in tasks]
    return {
        what: budget.profiles(
            {kind: [to_target(arms[i], column, target).value for arms, target in zip(tasks, targets, strict=True)]
             for i, kind in enumerate(shared)}
        )
        for what, column in columns.items()
    }  # fmt: skip


def _first_of_each(arms: Sequence[ArmResult]) -> dict[str, ArmResult]:
    """The first finished arm of every kind, in the order stored."""
    found: dict[str, ArmResult] = {}
    for arm in arms:
        if arm.complete:
            found.setdefault(arm.kind, arm)
    return found


def _hardest(arms: Sequence[ArmResult]) -> float:
    """The lowest target that one of these arms reached in the median, the highest one where none was."""
    targets = sorted(targets_of(arms[0].data))
    return next((target for target in targets if any(math.isfinite(to_target(arm, "step", target).value) for arm in arms)), targets[-1])
