"""What Baydin et al. (2022, arXiv:2202.08587) claim of the forward gradient, decided from what is stored. Loads without torch."""

from __future__ import annotations

import math
from typing import Any

from forwardgrad.lab.report.blocks import Judged, Observation, count, number, run_curves, tables
from forwardgrad.lab.report.claims import evidence as known
from forwardgrad.lab.report.claims import findings
from forwardgrad.lab.report.claims.evidence import GUESSING, LEARNED, Decide, Evidence, above, accurate, below, between, rows, status
from forwardgrad.lab.statistics import stats
from forwardgrad.lab.store import ArmResult, Done, finite

BAYDIN = "Baydin et al. 2022"
PUBLISHED = 0.59  # R_f / R_b of the NN: 2.46 over 4.17
MARGIN = 0.01  # nats of test loss within which two arms are as good
BIASED = 0.05
NEAR = 0.1  # how far from 1 the length may be for all that the narrowest interval says: wide ones hold 1 in any case
MODELS = ("logistic", "nn")


def cost(evidence: Evidence) -> Judged:
    stored = evidence.measured.get("bench.json") or {"cases": [], "environment": {}}
    plain = [case for case in stored["cases"] if case.get("optimizer", "sgd") == "sgd"]  # the paper's steps
    cases = [case for case in plain if case["batch"] == 64 and case["model"] in ("nn", "logistic", "cnn")]
    told = [(case, found) for case in cases if (found := _to_backprop(case, "forward"))]
    nn = next((found for case, found in told if case["model"] == "nn"), None)
    readings = tuple(_cost_reading(case, found) for case, found in sorted(told, key=lambda one: one[0]["model"] != "nn"))
    machine = stored["environment"].get("device", "an unknown machine")
    yes, no = bool(nn and nn.high is not None and nn.high <= 1 and not above(nn, PUBLISHED)), bool(nn and above(nn, PUBLISHED))
    return Judged(
        "twice-as-fast",
        "“training up to twice as fast in some cases”; on the NN a step costs 2.46 plain forward passes, that of backpropagation 4.17: "
        "0.59",
        f"{BAYDIN}, abstract and 5.1; the paper, V: “around two times faster to compute”",
        status(yes, no),
        readings,
        "time of a step with a dense Gaussian direction over that of backpropagation, on the NN at batch 64, paired by round: its 95 % "
        "interval holds 0.59 or lies below it, and not above 1 (confirmed), or lies wholly above 0.59 (refuted).",
        f"Measured on {machine}; theirs was a GPU." if nn else "The cost of a step on the NN was not measured, or was too noisy.",
        "" if yes or no else "forwardgrad bench --models nn",
        "bench",
    )  # fmt: skip


def _to_backprop(case: dict[str, Any], name: str) -> stats.MeanEstimate | None:
    arm = next((arm for arm in case["arms"] if arm["name"] == name and not arm["failed"]), None)
    found = (arm or {}).get("to_backprop") or {}
    if found.get("value") is None:
        return None
    return stats.MeanEstimate(found["value"], found["low"], found["high"], int(case["rounds"]))


def _cost_reading(case: dict[str, Any], found: stats.MeanEstimate) -> Observation:
    words = f"a step takes {between(found)} times as long as one of backpropagation"
    cheap = _to_backprop(case, "low-rank")
    rank = f"; with directions of rank 1, {number(cheap.mean)} times" if cheap else ""
    where = f"{tables.MODELS.get(case['model'], case['model'])} · {tables.DATA.get(str(case['data']), str(case['data']))}"
    return Observation(where, words + rank, count(found.n, "round"))


def trains(evidence: Evidence) -> Judged:
    mine = [(row.title, row.forward) for row in rows(evidence, model="nn") if row.forward and not row.forward.shortened]
    mine += [(_title(arm), arm) for model in MODELS if (arm := evidence.arm("baydin", f"{model}-tuned-forward"))]
    found = [(title, *known.accuracy(arm)) for title, arm in mine]
    yes = bool(found) and all(above(one, GUESSING) for _, one, _ in found)
    no = any(below(one, GUESSING) or one.mean <= GUESSING for _, one, _ in found)
    return Judged(
        "trains",
        "Forward gradients alone train networks on MNIST",
        f"{BAYDIN}, 5",
        status(yes and not no, no),
        tuple(Observation(title, f"test accuracy {accurate(one)}", n) for title, one, n in found),
        "the 95 % interval of the test accuracy of every forward arm with tuned hyperparameters lies above guessing, 10 % (confirmed); "
        "one arm is at guessing or below (refuted). With one seed the interval is Wilson's over the test images: it holds for that "
        "network.",
        "" if found else "No such arm has finished.",
        "" if yes or no else "forwardgrad reproduce baydin",
        "table1" if "table1" in evidence.studies else "baydin",
    )


def _title(arm: ArmResult) -> str:
    return str(arm.record["group"])


def as_good(name: str, tuned: bool, said: str, source: str) -> Decide:
    def decide(evidence: Evidence) -> Judged:
        found = [_gap(evidence, f"{model}-{'tuned' if tuned else 'same'}") for model in MODELS]
        gaps = [one for _, one in found if one]
        pairs = [_pair(evidence, f"{model}-{'tuned' if tuned else 'same'}") for model in MODELS]
        learned = all(pair and known.mean(known.losses(pair[1])) < LEARNED for pair in pairs)
        whole = all(pair and not any(arm.shortened for arm in pair) for pair in pairs)
        yes = learned and whole and len(gaps) == len(MODELS) and all(below(one, MARGIN) for one in gaps)
        no = any(above(one, MARGIN) for one in gaps)
        one_seed = any(one.low is None for one in gaps)
        return Judged(
            name, said, source, status(yes, no), tuple(reading for reading, _ in found if reading),
            f"test loss, forward gradient less backpropagation, {'each arm tuned' if tuned else 'at one learning rate for both'}, paired "
            f"by seed: the 95 % t interval lies below {MARGIN:g} on logistic regression and on the NN, both trained at full length and "
            f"backpropagation having left the loss of guessing, {LEARNED:.2f} (confirmed), or above {MARGIN:g} on one (refuted).",
            "" if yes or no else "One seed gives no interval." if one_seed else "Not run, shortened, not learned, or within the margin.",
            "" if yes or no else "forwardgrad reproduce baydin --seeds 5", "baydin",
        )  # fmt: skip

    return decide


def _gap(evidence: Evidence, start: str) -> tuple[Observation | None, stats.MeanEstimate | None]:
    pair = _pair(evidence, start)
    if pair is None:
        return None, None
    forward, backprop = map(known.losses, pair)
    found = stats.difference(forward, backprop)
    ends = f"test loss {number(known.mean(forward))} with the forward gradient, {number(known.mean(backprop))} with backpropagation"
    apart = "" if found.low is None else f"; difference {between(found)}"
    return Observation(_title(pair[0]), ends + apart, count(found.n, "seed")), found


def _pair(evidence: Evidence, start: str) -> findings.ArmPair | None:
    forward, backprop = (evidence.arm("baydin", f"{start}-{kind}") for kind in ("forward", "backprop"))
    return None if forward is None or backprop is None or findings.unequal((forward, backprop)) else (forward, backprop)


def sooner(evidence: Evidence) -> Judged:
    pair = _pair(evidence, "nn-same")
    ratios = _times(pair) if pair else []
    finite = len(ratios) > 0 and all(map(math.isfinite, ratios))
    found = known.over(ratios) if finite else None
    misses = sum(not math.isfinite(one) for one in ratios)
    words = f"{between(found)} times backpropagation's time" if found else f"not reached in {misses} of {count(len(ratios), 'run')}"
    whole = bool(pair) and not any(arm.shortened for arm in pair or ())
    yes = whole and bool(found and below(found, 1))
    no = whole and (bool(found and above(found, 1)) or (len(ratios) > 1 and misses == len(ratios)))
    return Judged(
        "sooner",
        "At one learning rate for both, forward gradients reach a loss in less time (as the paper reports it: “significant speedup”)",
        f"{BAYDIN}, 5; the paper, I",
        status(yes, no),
        (Observation("NN · MNIST · one learning rate", words, count(len(ratios), "seed")),) if ratios else (),
        "training time until the validation loss that backpropagation ends with, forward gradient over backpropagation, paired by seed: "
        "the 95 % t interval of the mean logarithm lies below 0 (confirmed) or above it, or no run of several gets there (refuted).",
        "" if yes or no else "One seed gives no interval." if len(ratios) == 1 else "Not run, or the interval holds 1.",
        "" if yes or no else "forwardgrad reproduce baydin --rows nn --seeds 5",
        "baydin",
    )


def _times(pair: findings.ArmPair) -> list[float]:
    forward, backprop = (arm.by_seed for arm in pair)
    return [_time(forward[seed], other) for seed, other in sorted(backprop.items())]


def _time(run: Done, other: Done) -> float:
    target = other.validation_loss
    return known.ratio(run_curves.reached(run, "seconds", target), run_curves.reached(other, "seconds", target))


def minimises(name: str) -> Decide:
    def decide(evidence: Evidence) -> Judged:
        function = next((f for f in (evidence.measured.get("functions.json") or {"functions": []})["functions"] if f["name"] == name), None)
        arms = function["arms"] if function else []
        start = next((finite(arm["values"][0]) for arm in arms if arm["values"]), math.inf)
        forward = next((arm for arm in arms if arm["kind"] == "forward" and not arm["tuned"]), None)
        end = finite(forward.get("final_median")) if forward else math.inf
        yes = forward is not None and math.isfinite(start) and end <= start / 100
        return Judged(
            f"minimises-{name.lower()}", f"Forward gradient descent minimises {name}'s function, at the learning rate of gradient descent",
            f"{BAYDIN}, 5", status(yes, forward is not None and not yes), tuple(_descent(arm, start) for arm in arms),
            "at one learning rate for both, the median value at the end is at most a hundredth of that at the start (confirmed), or "
            "more (refuted); the minimum is 0. Medians are stored, so there is no interval.",
            "" if forward else "Not run.", "" if forward else "forwardgrad reproduce baydin", "functions",
        )  # fmt: skip

    return decide


def _descent(arm: dict[str, Any], start: float) -> Observation:
    kind = {"forward": "forward gradient", "backprop": "backpropagation"}.get(arm["kind"], arm["kind"])
    setting = "tuned" if arm["tuned"] else "one learning rate"
    seeds = count(int(arm.get("seeds") or 1), "seed")
    return Observation(f"{kind}, {setting}", f"from {number(start)} to {number(finite(arm.get('final_median')))}", f"median of {seeds}")


def unbiased(evidence: Evidence) -> Judged:
    settings = (evidence.measured.get("quality.json") or {"settings": []})["settings"]
    told = [
        (setting, one) for setting in settings for one in setting["estimates"] if one["quality"] is not None and _dense(one["estimator"])
    ]
    no = any(one["quality"]["total"]["p"] < BIASED / len(told) for _, one in told)
    lengths = [_length(one["quality"]["total"]["length"], setting["repeats"], len(told)) for setting, one in told]
    sharp = any(low >= 1 - NEAR and high <= 1 + NEAR for _, low, high in lengths)
    yes = sharp and not no and all(low <= 1 <= high for _, low, high in lengths)
    readings = tuple(
        Observation(
            _measured_on(setting, one),
            f"length along g {number(length)} ({number(low)} to {number(high)}), p = {one['quality']['total']['p']:.2g}",
            f"{setting['repeats']} estimates",
        )
        for (setting, one), (length, low, high) in zip(told, lengths, strict=True)
    )
    return Judged(
        "unbiased",
        "“an unbiased estimate of the gradient that can be evaluated in a single forward run of the function”",
        f"{BAYDIN}, abstract",
        status(yes, no),
        readings,
        f"the test that the mean estimate is the gradient has p below {BIASED} over the number of settings (refuted); or it has not, all "
        "intervals of the length along the gradient, which hold at once with 95 % (Bonferroni's), hold 1, and one of them lies within "
        f"{NEAR:g} of it (confirmed).",
        "" if told else "No estimate was measured against the exact gradient.",
        "" if yes or no else "forwardgrad quality",
        "quality",
    )  # fmt: skip


def _dense(config: dict[str, Any]) -> bool:
    return (
        config["name"] == "forward" and config.get("clip") is None and config.get("law", "gaussian") in ("gaussian", {"name": "gaussian"})
    )


def _measured_on(setting: dict[str, Any], one: dict[str, Any]) -> str:
    k = f", K = {one['tangents']}" if one["tangents"] else ""
    return f"{tables.MODELS.get(setting['model'], setting['model'])} · {tables.DATA.get(setting['data'], setting['data'])}{k}"


def _length(found: dict[str, float], repeats: int, settings: int) -> tuple[float, float, float]:
    """The length along the gradient, with one of as many intervals that hold at once as there are settings."""
    low, high = stats.at_once(found["value"], found["low"], found["high"], repeats, settings)
    return found["value"], low, high


BY_BAYDIN: tuple[Decide, ...] = (
    cost,
    trains,
    as_good("as-good-same", False, "At one learning rate for both, forward gradients reach at least as low a loss: “in the case of dense "
            "neural networks, even decreased loss”", f"{BAYDIN}, 5, as the paper reports it, I"),
    as_good("as-good-tuned", True, "“cuts the training time in half without sacrificing the quality of their model”, with each arm tuned",
            f"{BAYDIN}, as the paper reports it, I"),
    sooner,
    unbiased,
    minimises("Beale"),
    minimises("Rosenbrock"),
)  # fmt: skip
