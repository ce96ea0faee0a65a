"""The part of a report on the cost of a step, and the same rows for a terminal. Loads without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from forwardgrad.lab.report.blocks import NONE, Block, Cell, Section, Table, number, percent, tables
from forwardgrad.lab.report.sections import bench_goals
from forwardgrad.lab.report.sections.bench_figures import DEEP, bars, batch_of, network_of, sweeps, title_of, update_of

Record = Mapping[str, Any]  # what is stored of one arm, or of one case
OTHERWISE = ", or that of the optimizer that a title names"
MEANING = (
    (
        "time",
        "of one whole step, gradient and SGD update{otherwise} (of the plain forward pass: the loss alone): median over the rounds, 95 % "
        "interval",
    ),
    (
        "/ backprop, / plain",
        "the time over that of backpropagation and of a plain forward pass: medians, paired by round, with 95 % intervals; – where the "
        "interval is wider than half of the value",
    ),
    ("examples/s", "of the batch, over the median time"),
    (
        "peak memory",
        "most bytes held during a step above parameters and input: gradients, activations, directions and an estimator's own memory. What "
        "the allocator gave out on a GPU, the tensors alive on a processor; below it, where that was measured, the peak of a process of "
        "its own, which has the scratch of kernels too",
    ),
    ("random numbers", "share of the time that the draws of a step take when they are made alone, in turn with everything else"),
    (
        "roofline",
        "the least time that the operations of the products and the bytes of all operators allow at the machine's measured limits, as a "
        "share of the time, and which of the two it is; over 100 % where bytes came from a cache",
    ),
    (
        "energy",
        "joules of a step: the median over blocks of half a second of steps in a row, 95 % interval, by the counters of all processor "
        "packages (cpu) and of the GPU (gpu); idle power and other programs are in it. Only where the machine tells",
    ),
    (
        "to cosine …",
        "time until the mean of enough estimates of this batch's gradient has that cosine with it; below it how many, with the interval "
        "that the estimator's measured variance leaves. 'never' where its bias keeps it from getting there",
    ),
)
BAYDIN = (
    "For comparison, Baydin et al. (2022, arXiv:2202.08587) publish 2.46 plain forward passes for a step of the forward gradient and 4.17 "
    "for one of backpropagation on the NN, measured on other hardware."
)
SEEN = 1_000_000  # bytes: a tally below them is lost among the pages of a process


def bench_text(case: Record) -> str:
    """The rows of one case, aligned, for a terminal."""
    heads = _heads(case)
    rows = [heads, *(_cells(arm, case) for arm in case["arms"])]
    widths = [max(len(row[i]) for row in rows if len(row) > 1) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    return "\n".join([title_of(case), *lines, *_notes([case])])


def _cells(arm: Record, case: Record) -> tuple[str, ...]:
    """The words of a row; of an arm that failed one alone, which is as long as its reason and widens no column."""
    if arm["failed"]:
        return (f"{arm['name']}: {arm['failed']}",)
    return str(arm["name"]), *map(_words, _row(arm, case)[1:])


def _words(cell: Cell) -> str:
    return f"{cell.text} ({cell.sub})" if cell.sub else cell.text


def bench_section(stored: Record) -> Section:
    """The section on every case that is stored."""
    cases = stored["cases"]
    return _section("bench", "The cost of one step", cases, "cost-of-one-step", [_goals_table(cases)])


def cost_section(stored: Record) -> Section:
    """The section on the time alone, which versions before 0.2 stored in cost.json."""
    cases = [_upgraded(network) for network in stored["networks"]]
    return _section("cost", "The time of a step, as measured earlier", cases, "cost-of-a-step", [])


def _upgraded(network: Record) -> Record:
    backprop = next((arm["seconds"] for arm in network["arms"] if arm["kind"] == "backprop"), None)
    arms = []
    for arm in network["arms"]:
        to_plain = {"value": arm["ratio"], "low": arm["ratio_low"], "high": arm["ratio_high"], "refused": None}
        to_backprop = backprop and {"value": arm["seconds"] / backprop, "low": None, "high": None, "refused": None}
        seconds = {"value": arm["seconds"], "low": arm["low"], "high": arm["high"], "refused": None}
        arms.append({"name": arm["kind"], "label": arm["name"], "kind": arm["kind"], "spec": None, "failed": None, "seconds": seconds,
                     "to_plain": to_plain, "to_backprop": to_backprop})  # fmt: skip
    rounds = max((arm["n"] for arm in network["arms"]), default=0)
    return {"model": network["model"], "data": network["data"], "batch": network["batch"], "parameters": network["parameters"],
            "layout": "contiguous", "rounds": rounds, "arms": arms}  # fmt: skip


def _section(name: str, title: str, cases: Sequence[Record], figure: str, further: Sequence[Table]) -> Section:
    groups = tuple((title_of(case), tuple(_full(_row(arm, case), case, cases) for arm in case["arms"])) for case in cases)
    verdict = _sentence(cases)
    blocks: list[Block] = [verdict, Table(_all_heads(cases), groups, title, _meaning(cases)), *_notes(cases), *further]
    blocks += [bars(figure, _usual(cases)), *sweeps(figure, cases)]
    return Section(name, title, verdict, tuple(blocks))


def _meaning(cases: Sequence[Record]) -> tuple[tuple[str, str], ...]:
    otherwise = OTHERWISE if any(update_of(case) for case in cases) else ""
    return tuple((head, words.format(otherwise=otherwise)) for head, words in MEANING)


def _cosines(case: Record) -> tuple[float, ...]:
    return next((tuple(entry["cosine"] for entry in arm["to_cosine"]) for arm in case["arms"] if arm.get("to_cosine")), ())


def _heads(case: Record) -> tuple[str, ...]:
    return _all_heads([case])


def _all_heads(cases: Sequence[Record]) -> tuple[str, ...]:
    told = sorted({cosine for case in cases for cosine in _cosines(case)})
    return (
        "arm", "time", "/ backprop", "/ plain", "examples/s", "peak memory", "random numbers", "roofline",
        *(["energy"] if any(_tells(case) for case in cases) else []),
        *(f"to cosine {cosine:g}" for cosine in told),
    )  # fmt: skip


def _row(arm: Record, case: Record) -> tuple[Cell, ...]:
    name = Cell(arm["label"], _spec(arm), arm["kind"])
    cosines = _cosines(case)
    if arm["failed"]:
        return (Cell(arm["label"], f"not measured: {arm['failed']}", "warn"), *[NONE] * (len(_heads(case)) - 1))
    seconds = arm["seconds"]
    return (
        name,
        Cell(tables.duration(seconds["value"]), f"{tables.duration(seconds['low'])} to {tables.duration(seconds['high'])}"),
        _measured(arm["to_backprop"]),
        _measured(arm["to_plain"]),
        Cell(number(arm["examples_per_second"] if "examples_per_second" in arm else case["batch"] / seconds["value"])),
        _memory(arm),
        _drawing(arm),
        _roofline(arm),
        *([_energy(arm)] if _tells(case) else []),
        *(_to_cosine(arm, cosine) for cosine in cosines),
    )


def _tells(case: Record) -> bool:
    """Whether the machine told the joules of a case."""
    return any(arm.get("joules") for arm in case["arms"])


def _energy(arm: Record) -> Cell:
    """The joules of a step, those of the GPU first where there are some: it is the device then."""
    told = sorted(arm.get("joules", {}).items(), reverse=True)
    if not told:
        return NONE
    words = [f"{number(found['value'])} J {where}" for where, found in told]
    (_, first), *_ = told
    return Cell(", ".join(words), f"{number(first['low'])} to {number(first['high'])}")


def _full(row: tuple[Cell, ...], case: Record, cases: Sequence[Record]) -> tuple[Cell, ...]:
    """The row under the columns of all cases. A cosine that this case was not asked for stays empty."""
    told = dict(zip(_heads(case), row, strict=True))
    return tuple(told.get(head, NONE) for head in _all_heads(cases))


def _spec(arm: Record) -> str:
    return str(arm["spec"]) if arm["spec"] and arm["spec"] != arm["label"] else ""


def _measured(found: Record | None, words: Callable[[float], str] = number) -> Cell:
    if found is None:
        return NONE
    if found["refused"]:
        return Cell("–", "too noisy", "warn")
    return Cell(words(found["value"]), "" if found["low"] is None else f"{words(found['low'])} to {words(found['high'])}")


def _memory(arm: Record) -> Cell:
    if arm.get("peak_bytes") is None:
        return NONE
    process = arm["process"] if arm["peak_bytes"] >= SEEN else None
    return Cell(tables.size(arm["peak_bytes"]), f"process {tables.size(process['process'])}" if process else "")


def _drawing(arm: Record) -> Cell:
    if "drawing" not in arm:
        return NONE
    return Cell("none", tone="quiet") if arm["drawing"] is None else _measured(arm["drawing"]["share"], percent)


def _roofline(arm: Record) -> Cell:
    if (found := arm.get("roofline")) is None:
        return NONE
    return Cell(f"{100 * found['reached']:.0f} %", f"{found['near']}, {tables.duration(found['seconds'])}")


def _to_cosine(arm: Record, cosine: float) -> Cell:
    found = next((entry for entry in arm["to_cosine"] if entry["cosine"] == cosine), None)
    if found is None:
        return Cell("–", f"not measured: {arm['worth_failed']}", "warn") if arm.get("worth_failed") else NONE
    if found["estimates"] is None:
        return Cell("never", f"tends to {number(arm['worth']['limit'])}", "quiet")
    between = "" if found["low"] == found["high"] else f" ({found['low']:,} to {found['high']:,})"
    return Cell(tables.duration(found["seconds"]), tables.count(found["estimates"], "estimate") + between)


def _notes(cases: Sequence[Record]) -> list[str]:
    """What the reader of a table has to know about the measurement."""
    notes = []
    refused = [found["refused"] for found in _ratios(cases) if found["refused"]]
    if refused:
        notes.append(f"{tables.count(len(refused), 'ratio')} shown as – (too noisy): {refused[0]}.")
    for case in cases:
        if case.get("tried"):
            both = ", ".join(f"{layout} {tables.duration(seconds)}" for layout, seconds in case["tried"].items())
            words = "all arms ran in the order in memory in which backpropagation is faster"
            notes.append(f"{case['model']}, {batch_of(case)}: {words} ({both}).")
    notes += [
        f"{network_of(case)}, {batch_of(case)}, {update_of(case)}: beside every peak the optimizer holds "
        f"{tables.size(case['optimizer_bytes'])} from step to step."
        for case in cases
        if case.get("optimizer_bytes")
    ]
    if any(case["model"] == "nn" for case in cases):
        notes.append(BAYDIN)
    limits = [case["ceilings"] for case in cases if case.get("ceilings")]
    if limits:
        flops = [found["flops_per_second"] / 1e9 for found in limits]
        traffic = [found["bytes_per_second"] / 1e9 for found in limits]
        notes.append(
            f"Limits of the machine, measured in the same run: {_span(flops)} GFLOP/s of a float32 matrix product, {_span(traffic)} GB/s "
            "of a large triad."
        )
    return notes + _memory_notes(cases)


def _ratios(cases: Sequence[Record]) -> list[Record]:
    found = []
    for arm in (arm for case in cases for arm in case["arms"] if not arm["failed"]):
        drawn = arm.get("drawing") or {}
        found += [value for value in (arm["to_backprop"], arm["to_plain"], drawn.get("share")) if value]
    return found


def _span(values: Sequence[float]) -> str:
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def _memory_notes(cases: Sequence[Record]) -> list[str]:
    """How the tally of tensors compares with the peak of a process, where that was measured."""
    both = [arm["process"] for case in cases for arm in case["arms"] if arm.get("process")]
    if not both:
        return []
    large = [found for found in both if found["tally"] >= SEEN]
    if not large:
        return [f"No step holds {tables.size(SEEN)}: the peak of a process says nothing of so little."]
    agreed = sum(found["agree"] for found in large)
    shares = _span([found["process"] / found["tally"] for found in large])
    return [
        f"The peak of a process of its own agrees with the tally of tensors (within 5 % and 1 MB) in {agreed} of "
        f"{tables.count(len(large), 'step')} that hold {tables.size(SEEN)} or more; it is {shares} times the tally, and above 1 is what "
        "kernels keep to themselves."
    ]


def _goals_table(cases: Sequence[Record]) -> Table:
    rows = tuple(_goal_row(outcome) for outcome in bench_goals.outcomes(cases))
    meaning = (
        ("goal", "set before the measurement; those in time hold for 2 processor cores"),
        ("measured", "on the machine of this table, with its 95 % interval where it is a ratio of times"),
    )
    return Table(("figure", "goal", "measured", "outcome"), (("Set beforehand", rows),), "Goals", meaning)


def _goal_row(outcome: bench_goals.GoalOutcome) -> tuple[Cell, ...]:
    between = "" if outcome.low is None or outcome.high is None else f"{number(outcome.low)} to {number(outcome.high)}"
    value = NONE if outcome.value is None else Cell(number(outcome.value), between)
    tone = {"met": "", "missed": "warn", "too noisy": "warn"}.get(outcome.verdict, "quiet")
    return Cell(outcome.goal.figure), Cell(outcome.goal.bound), value, Cell(outcome.verdict, tone=tone)


def _sentence(cases: Sequence[Record]) -> str:
    """What a step costs on the networks at the paper's batch, or on the first few cases where there are none of these."""
    spoken = (("forward", "the forward gradient"), ("low-rank", "rank 1"), ("low-rank-compiled", "rank 1 compiled"))
    parts = []
    for case in _usual(cases):
        told = {arm["name"]: arm["to_backprop"] for arm in case["arms"] if not arm["failed"]}
        shown = [(words, told.get(name)) for name, words in spoken]
        costs = [f"{number(found['value'])} ({words})" for words, found in shown if found and found["value"] is not None]
        parts += [f"{_listed(costs)} on {network_of(case)}, {batch_of(case)}"] if costs else []
    if not parts:
        return "No network has both arms timed well enough to compare them."
    return f"In steps of backpropagation, a step costs {'; '.join(parts)}."


def _usual(cases: Sequence[Record]) -> Sequence[Record]:
    """The networks at the paper's batch, each once, or the first few cases where there are none."""
    named = [case for case in cases if case["data"] and not DEEP.fullmatch(case["model"])]
    found = [case for case in named if case["batch"] == 64 and not update_of(case)]
    order = [model for model in tables.MODELS if any(case["model"] == model for case in found)]
    return [next(case for case in found if case["model"] == model) for model in order] or cases[:3]


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
