"""The paper's claims, each decided from what is stored by a rule that the page prints. Loads without torch."""

from __future__ import annotations

import itertools
import math

from forwardgrad.lab.recipes import TITLES
from forwardgrad.lab.report.blocks import Judged, Observation, count, exact, number, percent, run_curves, study_tables, tables
from forwardgrad.lab.report.claims import evidence as known
from forwardgrad.lab.report.claims.evidence import (
    LEARNED,
    LN10,
    Decide,
    Evidence,
    above,
    accurate,
    below,
    between,
    losses_reading,
    ratio,
    rows,
    status,
)
from forwardgrad.lab.statistics import stats, walk
from forwardgrad.lab.store import ArmResult, Done
from forwardgrad.lab.studies import OptimizerName

ZERO = 0.0005  # what is printed as 0.000 lies below
FASTER = (2.0, 4.0)
EXPLODED = 40_000
INSIDE = 0.9  # of honest readings lie within their own 5-95 % range
SEEDS = "forwardgrad reproduce table1 --seeds 5"


def lower(model: str, title: str) -> Decide:
    def decide(evidence: Evidence) -> Judged:
        mine = rows(evidence, model=model, retuned=True)
        usable = [row for row in mine if not row.short]
        ratios = [ratio(*(known.mean(known.losses(arm)) for arm in row.pair)) for row in usable]
        found = known.over(ratios) if len(ratios) > 1 and all(map(math.isfinite, ratios)) else None
        readings = [losses_reading(row) for row in mine]
        if found:
            words = f"the forward gradient's loss is {between(found)} times backpropagation's"
            readings.append(Observation("Together", words, count(found.n, "optimizer")))
        every = bool(found) and len(usable) == len(mine)
        yes, no = every and bool(found and above(found, 1)), bool(found and below(found, 1))
        return Judged(
            f"lower-loss-{model}",
            "“when the learning rate for backpropagation and forward gradients is optimized separately, backpropagation achieves a "
            f"significantly lower loss on the MNIST data”: the {title}",
            "the paper, V", status(yes, no), tuple(readings),
            "ratio of test losses, forward gradient over backpropagation: the 95 % t interval of its mean logarithm over the optimizers, "
            "both arms of each trained equally long, lies above 0 (confirmed) or below it (refuted).",
            "" if yes or no else f"{len(usable)} of {count(len(mine), 'optimizer')} trained equally long in both arms.",
            "" if yes or no else f"forwardgrad reproduce table1 --rows {model}", known.section_of(mine),
        )  # fmt: skip

    return decide


def by_optimizer(optimizer: OptimizerName, said: str, source: str) -> Decide:
    def decide(evidence: Evidence) -> Judged:
        mine = rows(evidence, optimizer=optimizer, data="mnist", retuned=True)
        gaps = [known.gap(row) for row in mine if not row.short]
        yes = len(gaps) == len(mine) and all(above(found, 0) for found in gaps)
        no = any(below(found, 0) for found in gaps)
        short = [f"{row.title}: {row.short}" for row in mine if row.short]
        short += ["one seed gives no interval"] if any(found.low is None for found in gaps) else []
        names = ",".join(f"{model}-{optimizer}" for model in ("nn", "cnn"))
        return Judged(
            f"lower-{optimizer}", said, source, status(yes, no), tuple(map(losses_reading, mine)),
            "test loss, forward gradient less backpropagation, paired by seed: its 95 % t interval lies above 0 on both networks "
            f"trained equally long in both arms with {TITLES[optimizer]} (confirmed), or below 0 on one (refuted).",
            "" if yes or no else f"{'; '.join(short)}." if short else "An interval holds 0.",
            "" if yes or no else f"{SEEDS} --rows {names}", known.section_of(mine),
        )  # fmt: skip

    return decide


def zero(evidence: Evidence) -> Judged:
    mine = [(row, row.backprop) for row in rows(evidence, data="mnist") if row.backprop and not row.backprop.shortened]
    found = [(row, stats.estimate(known.losses(arm), 0.0)) for row, arm in mine]
    no = any((one.low if one.low is not None else one.mean) >= ZERO for _, one in found)
    yes = len(found) == 6 and all(below(one, ZERO) for _, one in found)
    readings = tuple(Observation(row.title, f"test loss {between(one)}", count(one.n, "seed")) for row, one in found)
    return Judged(
        "zero-loss",
        "“All networks trained with backpropagation on the MNIST dataset converge to zero loss regardless of the optimization methods "
        "used”",
        "the paper, IV",
        status(yes, no),
        readings,
        f"one network trained at full length whose loss over the whole test split is {ZERO} or more, with the whole interval where there "
        "are several seeds, refutes it; the intervals of all six below that confirm it. The paper's 0.000 is the loss of 16 images.",
        "" if yes or no else "Not every network is trained at full length.",
        "" if yes or no else "forwardgrad reproduce table1 --rows nn,cnn",
        "table1",
    )


def _common(forward: ArmResult, backprop: ArmResult) -> tuple[float, float, float] | None:
    """The lowest target that both arms reach, and the median steps that each takes to it."""
    for target in sorted(study_tables.TARGETS.get(str(forward.data), study_tables.TARGETS_ELSEWHERE)):
        steps = [stats.median([run_curves.reached(run, "step", target) for run in arm.done]) for arm in (forward, backprop)]
        if all(map(math.isfinite, steps)):
            return target, steps[0], steps[1]
    return None


def faster(evidence: Evidence) -> Judged:
    readings, ratios, missed = [], [], 0
    compared = rows(evidence, data="mnist", retuned=True)
    for row in compared:
        reached = None if row.short else _common(*row.pair)
        if reached is None:
            missed += not row.short
            readings.append(Observation(row.title, row.short or "no validation loss is reached by both", "left out"))
            continue
        target, forward, backprop = reached
        ratios.append(forward / backprop)
        steps = f"{forward:,.0f} steps to a validation loss of {exact(target)}, {backprop:,.0f} with backpropagation"
        length = f" ({row.length})" if row.length else ""
        readings.append(Observation(row.title, f"{steps}: {number(ratios[-1])} times{length}", count(len(row.pair[0].done), "seed")))
    found = known.over(ratios) if len(ratios) > 1 else None
    if found:
        readings.append(Observation("All of these together", f"{between(found)} times as many steps", count(found.n, "configuration")))
    yes = not missed and bool(found and above(found, FASTER[0]) and below(found, FASTER[1]))
    no = bool(found and (above(found, FASTER[1]) or below(found, FASTER[0])))
    return Judged(
        "faster",
        "“backpropagation converges 2-4 times faster”",
        "the paper, V",
        status(yes, no),
        tuple(readings),
        "steps to the lowest validation loss that both arms reach, forward gradient over backpropagation: the 95 % t interval of the "
        "mean logarithm over the configurations lies within 2 to 4 (confirmed) or wholly outside (refuted); one in "
        "which the two reach no loss in common rules out the first.",
        f"From {len(ratios)} of 6 configurations; in the others an arm is missing, or the two reach no loss in common.",
        "" if yes or no else "forwardgrad reproduce table1 --rows nn,cnn",
        known.section_of(compared),
    )


def rates(evidence: Evidence) -> Judged:
    readings, verdicts = [], []
    for model in ("logistic", "nn"):
        forward, backprop = (evidence.arm("baydin", f"{model}-tuned-{kind}") for kind in ("forward", "backprop"))
        if forward is None or backprop is None:
            continue
        factor = ratio(*(float(arm.run["optimizer"]["lr"]) for arm in (backprop, forward)))
        steps = _grid_step(forward) * _grid_step(backprop)
        edge = any("lr" in arm.record["chosen"]["at_edge"] for arm in (forward, backprop))
        verdicts.append((factor > steps and not edge, factor < 1 / steps and not edge))
        best, other = (exact(float(arm.run["optimizer"]["lr"])) for arm in (backprop, forward))
        words = f"learning rate {best} for backpropagation, {other} for the forward gradient: {number(factor)} times"
        span = f"; {number(factor / steps)} to {number(factor * steps)} within one grid point on either side"
        trials = f"{count(len(forward.trials), 'trial')} an arm, 1 seed"
        readings.append(Observation(tables.MODELS[model], words + span + ("; on the edge of its grid" if edge else ""), trials))
    yes, no = len(verdicts) == 2 and all(one for one, _ in verdicts), any(one for _, one in verdicts)
    return Judged(
        "rates",
        "“When we optimize the learning rates, backpropagation can use a much higher learning rate than the forward gradient”",
        "the paper, V",
        status(yes, no),
        tuple(readings),
        "the best learning rate of backpropagation is larger than the forward gradient's by more than one grid point of either search "
        "can explain, on both networks, no winner on the edge of what was tried (confirmed); it is smaller by more than that on one "
        "(refuted).",
        "" if yes or no else "Not both networks are tuned, or a winner lies on the edge of its grid.",
        "" if yes or no else "forwardgrad reproduce baydin",
        "baydin",
    )


def _grid_step(arm: ArmResult) -> float:
    """The largest factor between neighbouring learning rates that were tried."""
    values = sorted({float(trial["values"]["lr"]) for trial in arm.record["trials"] if "lr" in trial["values"]})
    return max((b / a for a, b in itertools.pairwise(values)), default=math.inf)


def simple(evidence: Evidence) -> Judged:
    linear = evidence.arm("beyond", "nn-linear")
    mine = [(row, row.forward) for row in rows(evidence, model="nn") if row.forward and not row.forward.shortened]
    found = [(row, *known.accuracy(arm)) for row, arm in mine]
    readings = [Observation(row.title, f"test accuracy {accurate(one)}", n) for row, one, n in found]
    yes = no = False
    if linear is not None:
        line, n = known.accuracy(linear)
        readings.append(Observation("Linear classifier on the pixels", f"test accuracy {accurate(line)}", n))
        decided = bool(found) and line.low is not None and line.high is not None
        yes = decided and all(above(one, line.high or 0) for _, one, _ in found)
        no = decided and all(below(one, line.low or 0) for _, one, _ in found)
    return Judged(
        "simple-tasks",
        "“forward gradient descent performs well on simpler tasks”",
        "the paper, I",
        status(yes, no),
        tuple(readings),
        "well means better than a linear classifier on the pixels: on the NN trained at full length the 95 % interval of the test "
        "accuracy lies above that classifier's with every optimizer (confirmed), or below it with every one (refuted).",
        "" if yes or no else "The NN or the linear classifier is not trained at full length, or the optimizers disagree.",
        "" if yes or no else "forwardgrad reproduce table1 --rows nn && forwardgrad reproduce beyond --rows nn-linear",
        "table1",
    )


def _cifar(evidence: Evidence) -> tuple[ArmResult | None, str]:
    row = rows(evidence, data="cifar10")[0]
    return (row.forward, "") if row.forward and not row.forward.shortened else (None, row.short or row.length or "shortened")


def fails(evidence: Evidence) -> Judged:
    arm, short = _cifar(evidence)
    ends = [run.validation_loss for run in arm.done] if arm else []
    yes, no = bool(ends) and min(ends) >= LEARNED, bool(ends) and max(ends) < LEARNED
    found = known.between(stats.estimate(ends, 0.0)) if ends else ""
    readings = (Observation("CNN · CIFAR-10 · SGD", f"validation loss at the end {found}", count(len(ends), "run")),) if ends else ()
    return Judged(
        "cifar-fails",
        "“the algorithm fails to learn” on CIFAR-10",
        "the paper, V",
        status(yes, no),
        readings,
        f"the validation loss at the end of every full-length run of row 13 is {LEARNED:.2f} or more, that of guessing being {LN10:.2f} "
        "(confirmed), or below it in every run (refuted).",
        "" if yes or no else f"CNN · CIFAR-10 · SGD: {short}." if short else "The runs disagree.",
        "" if yes or no else "forwardgrad reproduce table1 --rows cifar-cnn --device cuda",
        "table1",
    )


def _exploded(run: Done) -> float:
    return walk.first_outside(run_curves.training_losses(run), -math.inf, 2 * LN10) if run.has_losses else math.nan


def explodes(evidence: Evidence) -> Judged:
    arm, short = _cifar(evidence)
    steps = [step for run in (arm.done if arm else ()) if not math.isnan(step := _exploded(run))]
    middle = stats.median(steps) if steps else math.nan
    yes = EXPLODED / 2 <= middle <= EXPLODED * 2
    words = f"exploded at step {middle:,.0f}" if math.isfinite(middle) else "did not explode"
    readings = (Observation("CNN · CIFAR-10 · SGD, median", words, count(len(steps), "run")),) if steps else ()
    return Judged(
        "cifar-explodes",
        "“the loss explodes after about 40 000 iterations” on CIFAR-10",
        "the paper, IV",
        status(yes, bool(steps) and not yes),
        readings,
        f"the median step at which the mean training loss of 20 steps passes {2 * LN10:.1f}, twice that of guessing, in full-length runs "
        "of row 13, is 40,000 within a factor of two (confirmed), or is not (refuted).",
        "" if steps else f"CNN · CIFAR-10 · SGD: {short}. The noise study takes the same walk at larger learning rates.",
        "" if steps else "forwardgrad reproduce table1 --rows cifar-cnn --device cuda",
        "table1",
    )


def clipping(evidence: Evidence) -> Judged:
    found: dict[bool, list[bool]] = {True: [], False: []}
    for alike in _alike(evidence).values():
        if len(alike) == 2:
            for clipped, arm in alike.items():
                found[clipped] += map(run_curves.lost, arm.done)
    shares = {clipped: known.wilson(sum(lost), len(lost)) for clipped, lost in found.items() if lost}
    names = {True: "Clipped", False: "Not clipped"}
    readings = tuple(Observation(names[c], f"lost {between(share, percent)}", count(share.n, "run")) for c, share in shares.items())
    yes = len(shares) == 2 and above(shares[False], shares[True].high or 0)
    no = len(shares) == 2 and below(shares[False], shares[True].low or 0)
    return Judged(
        "clipping",
        "“we implemented gradient clipping … This stabilized the training process”",
        "the paper, V",
        status(yes, no),
        readings,
        "among arms of the forward gradient that differ in the clip alone, the 95 % interval (Wilson) of the share of runs that "
        "diverged or failed lies higher without the clip (confirmed) or with it (refuted).",
        "" if yes or no else "No two arms differ in the clip alone." if not shares else "The intervals overlap.",
        "" if yes or no else "forwardgrad study FILE.py, with arms forward and forward(clip=1) at the same learning rates",
    )


def _alike(evidence: Evidence) -> dict[str, dict[bool, ArmResult]]:
    """Finished arms of the forward gradient by everything but the clip."""
    found: dict[str, dict[bool, ArmResult]] = {}
    for arm in (arm for study in evidence.studies.values() for arm in study.arms if arm.complete):
        if arm.run["estimator"]["name"] == "forward":
            rest = {name: value for name, value in arm.run["estimator"].items() if name != "clip"}
            key = {**arm.run, "seed": None, "estimator": rest}
            found.setdefault(repr(sorted(key.items(), key=str)), {})[bool(arm.run["estimator"].get("clip"))] = arm
    return found


def published(model: str, title: str, command: str) -> Decide:
    def decide(evidence: Evidence) -> Judged:
        arms = [arm for row in rows(evidence, model=model) for arm in (row.forward, row.backprop)]
        told = [arm for arm in arms if arm and not arm.shortened and (arm.done[0].result["test"] or {}).get("last16_high") is not None]
        hits = [_inside(arm) for arm in told]
        share = known.wilson(sum(hits), len(hits)) if hits else None
        no = bool(share and below(share, INSIDE))
        yes = bool(share and share.mean >= INSIDE) and len(hits) == len(arms) and not no
        words = f"{sum(hits)} of {len(hits)} published values lie within the 5–95 % range of our readings"
        readings = (Observation(title, f"{words}: {between(share, percent)}", count(len(hits), "arm")),) if share else ()
        return Judged(
            f"published-{model}", f"Table I, {title}: the published test losses", "the paper, Table I", status(yes, no), readings,
            "a published value is the loss of 16 images. All arms are trained at full length, at least "
            f"{percent(INSIDE)} of the values lie within the 5–95 % range of such readings of our networks, and the 95 % interval "
            f"(Wilson) of that share holds {percent(INSIDE)} (confirmed), or lies below it (refuted).",
            "" if yes or no else f"{len(arms) - len(hits)} of {count(len(arms), 'arm')} are missing or shortened.",
            "" if yes or no else command, "table1",
        )  # fmt: skip

    return decide


def _inside(arm: ArmResult) -> bool:
    """Compared as printed, with three decimals: a published 0.000 may stand for anything below 0.0005."""
    test = arm.done[0].result["test"]
    return bool(round(test["last16_low"], 3) <= arm.record["published"]["test_loss"] <= round(test["last16_high"], 3))


ALSO = "“This also holds for SGD with Nesterov momentum and the Adam optimization algorithm”:"
PAPER: tuple[Decide, ...] = (
    lower("nn", "NN"),
    lower("cnn", "CNN"),
    by_optimizer("sgd", "“the forward gradient performs weaker … when training on the MNIST dataset with SGD”", "the paper, VI"),
    by_optimizer("nesterov", f"{ALSO} Nesterov", "the paper, VI"),
    by_optimizer("adam", f"{ALSO} Adam", "the paper, VI"),
    rates,
    faster,
    zero,
    simple,
    fails,
    explodes,
    clipping,
    published("nn", "NN on MNIST", "forwardgrad reproduce table1 --rows nn"),
    published("cnn", "CNN on MNIST", "forwardgrad reproduce table1 --rows cnn --device cuda"),
    published("cifar-cnn", "CNN on CIFAR-10", "forwardgrad reproduce table1 --rows cifar-cnn --device cuda"),
)
