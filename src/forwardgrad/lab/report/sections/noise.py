"""The part of a report on the paper's explosion: its walk predicted and measured, and what holds it back. Loads without torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from forwardgrad.lab.recipes import EXPLODED, LEFT, PAPER
from forwardgrad.lab.report import figures
from forwardgrad.lab.report.blocks import (
    NONE,
    Block,
    Cell,
    Picture,
    Section,
    Table,
    arm_cells,
    count,
    hyperparameters,
    number,
    run_curves,
    tables,
)
from forwardgrad.lab.report.claims import findings
from forwardgrad.lab.report.sections.studies import TRAINING
from forwardgrad.lab.statistics import stats, walk
from forwardgrad.lab.store import ArmResult, Done, StudyResult
from forwardgrad.lab.studies import Optimizer

GUESSING = math.log(10)
MARGIN, TIMES = 0.05, 2  # how far from guessing a loss has left it, and how many times guessing it has exploded
BINS = 120
EQUIVALENT = "steps at the paper's learning rate with as large a sum of squared rates"
MEANING = (
    ("arm", "the paper's forward row with its learning rate times a factor, alone or with one remedy"),
    (
        "left 2.3",
        f"first step at which the mean training loss of 20 steps lies more than {MARGIN:g} from that of guessing; median over seeds",
    ),
    (
        "exploded",
        f"first step at which that mean is above {TIMES * GUESSING:.1f}, twice guessing, or the loss is not finite; median over seeds",
    ),
    ("expected", f"the paper's {EXPLODED:,} steps, divided by the square of the factor: when a random walk has got as far"),
    ("norm, measured", "‖θ‖ over that before the first step, at the last step looked at; mean over seeds"),
    (
        "norm, a random walk's",
        "the same if every step of length γ·|clip(d)|·√n were at right angles to θ: nothing of the data is in it but |d| of every step",
    ),
    ("validation loss", "at the end; mean over seeds and its 95 % t interval. Guessing has 2.303"),
)
HEADS = (
    "arm", "hyperparameters", "steps", "left 2.3", "exploded", "expected", "norm, measured", "norm, a random walk's", "validation loss",
)  # fmt: skip


def noise_section(study: StudyResult) -> Section:
    verdicts = _verdicts(study)
    blocks: list[Block] = [(*verdicts, *findings.details(study))]
    rows = tuple(tuple(make(arm) for make in MAKERS) for arm in study.arms)
    blocks.append(Table(HEADS, ((study.arms[0].record["group"], rows),) if rows else (), "The walk of the parameters", MEANING))
    if any(arm.done for arm in study.arms):
        blocks += [_norms(study), _losses(study)]
    return Section(study.name, study.title, " ".join(verdicts), tuple(blocks))


def factor(arm: ArmResult) -> float:
    """What the paper's learning rate is multiplied by."""
    return round(float(arm.run["optimizer"]["lr"]) / PAPER.optimizer.lr, 3)


def predicted(arm: ArmResult, run: Done) -> list[float]:
    """The growth of a random walk after every step, empty for a run that did not keep what it takes."""
    derivatives, norm = run.derivatives(), run.result.get("initial_norm")
    if not derivatives or not all(map(math.isfinite, derivatives)) or not norm:
        return []
    found = walk.growth(
        derivatives,
        Optimizer(**arm.run["optimizer"]),
        clip=arm.run["estimator"].get("clip"),
        parameters=int(run.result["parameters"]),
        norm=float(norm),
        planned=_planned(arm, run),
    )
    return found


def _planned(arm: ArmResult, run: Done) -> int:
    """The steps of a run that ends as planned."""
    return round(int(arm.run["epochs"]) * int(run.result["steps"]) / float(run.result["epochs"]))


def left(run: Done) -> float:
    return walk.first_outside(run_curves.training_losses(run), GUESSING - MARGIN, GUESSING + MARGIN)


def exploded(run: Done) -> float:
    return walk.first_outside(run_curves.training_losses(run), -math.inf, TIMES * GUESSING)


def _when(find: Callable[[Done], float]) -> Callable[[ArmResult], Cell]:
    def make(arm: ArmResult) -> Cell:
        if not arm.done:
            return NONE
        steps = [find(run) for run in arm.done]
        hits = sum(map(math.isfinite, steps))
        among = f"in {hits} of {count(len(steps), 'run')}" if 0 < hits < len(steps) else ""
        middle = stats.median(steps)
        return Cell(f"{middle:,.0f}" if math.isfinite(middle) else "never", among, "" if math.isfinite(middle) else "quiet")

    return make


def _expected(arm: ArmResult) -> Cell:
    if not arm.run:
        return NONE
    return Cell(f"{EXPLODED / factor(arm) ** 2:,.0f}", f"1/{factor(arm) ** 2:,.0f} of the paper's" if factor(arm) != 1 else "the paper's")


def _ends(arm: ArmResult) -> tuple[list[float], list[float]]:
    """The growth of every run at the last step that was looked at: measured, and predicted. Runs that did not keep it are left out."""
    measured, told = [], []
    for run in arm.done:
        table, curve = run.walk, predicted(arm, run)
        if table and curve:
            step = int(table["step"][-1])
            measured.append(table["norm_growth"][-1])
            told.append(curve[step - 1])
    return measured, told


def _mean(values: Sequence[float]) -> Cell:
    return Cell(number(sum(values) / len(values))) if values else NONE


MAKERS: tuple[Callable[[ArmResult], Cell], ...] = (
    arm_cells.arm_cell,
    lambda arm: Cell(hyperparameters(arm)),
    lambda arm: Cell(", ".join(dict.fromkeys(f"{run.result['steps']:,}" for run in arm.done)) or arm.progress, arm.shortened or ""),
    _when(left),
    _when(exploded),
    _expected,
    lambda arm: _mean(_ends(arm)[0]),
    lambda arm: _mean(_ends(arm)[1]),
    lambda arm: arm_cells.estimated([run.validation_loss for run in arm.done], number, 0.0, math.inf),
)


def _equivalent(arm: ArmResult, run: Done) -> list[float]:
    """The sum of squared learning rates after 0, 1, 2, … steps, in units of the paper's learning rate squared."""
    rates = walk.rates(Optimizer(**arm.run["optimizer"]), int(run.result["steps"]), _planned(arm, run))
    return list(itertools.accumulate(((rate / PAPER.optimizer.lr) ** 2 for rate in rates), initial=0.0))


def _norms(study: StudyResult) -> Picture:
    """Measured growth of every arm's first run as a line, the walk's as dots."""
    lines = []
    for arm in study.arms:
        for run in arm.done[:1]:
            at, curve = _equivalent(arm, run), predicted(arm, run)
            steps = [int(step) for step in run.walk.get("step", [])]
            measured = run.walk.get("norm_growth", [])
            lines.append(figures.Line(arm.kind, _curve([at[step] for step in steps], measured), label=arm.label))
            told = [curve[step - 1] for step in steps] if curve else []
            lines.append(figures.Line(arm.kind, _curve([at[step] for step in steps], told), label=arm.label, computed=True))
    panel = figures.Panel("norm of the parameters over that before the first step", tuple(line for line in lines if line.curve.at))
    drawing = figures.curves(f"{study.name}-norm", [[panel]], xlabel=EQUIVALENT, ylabel="‖θ‖ / ‖θ₀‖", marks=True)
    caption = (
        "Growth of the parameters' norm, seed 0, against the sum of squared learning rates. Line: measured; dotted: a random walk with "
        f"steps as long. The paper's loss leaves 2.3 after about {LEFT:,} steps and explodes after about {EXPLODED:,}."
    )
    return Picture(f"{study.name}-norm", drawing, caption)


def _losses(study: StudyResult) -> Picture:
    lines = []
    for arm in study.arms:
        for run in arm.done[:1]:
            at, curve = _equivalent(arm, run), stats.binned([run_curves.training_losses(run)], BINS)
            places = tuple(at[min(round(step), len(at) - 1)] for step in curve.at)
            shown = stats.Curve(places, curve.mean, curve.low, curve.high)
            lines.append(figures.Line(arm.kind, shown, stopped=run_curves.lost(run), label=arm.label))
    drawing = figures.curves(f"{study.name}-loss", [[figures.Panel("training loss", tuple(lines))]], xlabel=EQUIVALENT, ylabel=TRAINING)
    caption = f"Training loss, seed 0, on the same axis. Line: mean of each of at most {BINS} bins of steps; band: least to greatest."
    return Picture(f"{study.name}-loss", drawing, caption)


def _curve(at: Sequence[float], values: Sequence[float]) -> stats.Curve:
    pairs = [(x, y) for x, y in zip(at, values, strict=False) if math.isfinite(y)]
    mean = tuple(y for _, y in pairs)
    return stats.Curve(tuple(x for x, _ in pairs), mean, mean, mean)


def _verdicts(study: StudyResult) -> list[str]:
    """When the paper's row exploded and when a walk says so, how well the walk tells the norm, and what each remedy did."""
    done = [arm for arm in study.arms if arm.complete]
    bare = [arm for arm in done if arm.name.startswith("paper-")]
    said = [_explosion(arm) for arm in bare]
    if measured := [(one, told) for arm in bare for one, told in zip(*_ends(arm), strict=True)]:
        apart = max(abs(one / told - 1) for one, told in measured if told > 0)
        said.append(
            f"There the norm of the parameters grew to {_range([one for one, _ in measured])} times its first value; a random walk with "
            f"steps as long grows to {_range([told for _, told in measured])} times (at most {tables.percent(apart)} apart)."
        )
    said += _remedies([arm for arm in done if arm not in bare])
    return said or ["No arm is finished yet."]


def _explosion(arm: ArmResult) -> str:
    step, expected = stats.median([exploded(run) for run in arm.done]), EXPLODED / factor(arm) ** 2
    gone = stats.median([left(run) for run in arm.done])
    when = f"left 2.3 at step {gone:,.0f} and exploded at step {step:,.0f}" if math.isfinite(step) else "did not explode"
    rate = f"{factor(arm):g} times the paper's learning rate" if factor(arm) != 1 else "the paper's learning rate"
    return f"At {rate} the loss {when}; a random walk that explodes after the paper's {EXPLODED:,} steps does so after {expected:,.0f}."


def _range(values: Sequence[float]) -> str:
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def _remedies(arms: Sequence[ArmResult]) -> list[str]:
    said = []
    for removed, words in ((True, "Without an explosion"), (False, "Exploded all the same")):
        parts = [_ended(arm) for arm in arms if any(math.isfinite(exploded(run)) for run in arm.done) != removed]
        said += [f"{words}: {'; '.join(parts)}."] if parts else []
    return said


def _ended(arm: ArmResult) -> str:
    measured, _ = _ends(arm)
    norm = f"norm × {number(sum(measured) / len(measured))}, " if measured else ""
    loss = stats.estimate([run.validation_loss for run in arm.done]).mean
    learned = "" if loss < GUESSING - MARGIN else ", no better than guessing"
    return f"{arm.label} ({norm}validation loss {number(loss)}{learned})"
