"""The measurement of `forwardgrad bench`: a whole step of every arm on one machine in one run, stored in OUT/bench.json.

Of each arm it measures the time, in turn with all other arms. It measures the most bytes that a step holds, and how long its random
numbers take. It counts operations and bytes, and compares them with the most that the machine gives. It finds how many estimates an arm
needs until their mean has a given cosine with the gradient.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from forwardgrad.diagnostics import LEAST
from forwardgrad.estimators import Backprop, Estimator, FixedFeedback, LearnedFeedback, LocalLosses
from forwardgrad.gradient import estimate_grad_
from forwardgrad.lab import environment
from forwardgrad.lab.bench import joules, optimizers, process_peak, random_numbers, roofline, timing, worth_of_a_step
from forwardgrad.lab.bench.arms import BACKPROP, CAPTURED, COMPILED, PLAIN, TABLE_1, ArmStep, BenchArm
from forwardgrad.lab.bench.cases import BenchCase, BuiltCase, build_case, layouts
from forwardgrad.lab.bench.records import ArmRecord, CaseRecord, MemoryRecord, PeakRecord, ValueWithInterval, Worth
from forwardgrad.lab.energy import energy_meter
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store import Store, check, read_json, write_json
from forwardgrad.lab.studies import SCHEMA
from forwardgrad.lab.training import allocation

CaseKey = Literal["model", "batch", "layout", "accelerator", "optimizer", "sequence", "loss"]
SAME_CASE: tuple[CaseKey, ...] = (
    "model",
    "batch",
    "layout",
    "accelerator",
    "optimizer",
    "sequence",
    "loss",
)
"""What makes two cases the same."""
SGD = "sgd"  # the optimizer of what was stored without one
OLDER = {"optimizer": SGD, "sequence": None, "loss": "whole"}  # what cases were that were stored without saying so
ONE_ROW_AN_OUTPUT = (FixedFeedback, LearnedFeedback, LocalLosses)  # estimators that keep numbers for every output and unit
IN_A_ROW = {"cpu": 1, "cuda": 20}  # steps that are timed together: a GPU is asked for the next one while it is at work
_STEPS, _MEMORY = "bench.json", "memory.json"
TRIED = 5  # rounds of backpropagation in each order in memory


@dataclass(frozen=True)
class BenchOptions:
    """How a case is measured.

    `rounds` are timed, but none begins after `seconds`. `repeats` estimates tell the noise of an arm; 0 leaves that out.

    Raises UserError for a cosine outside (0, 1), and for a number of repeats that is odd or too small.
    """

    rounds: int = 30
    seconds: float | None = None
    seed: int = 0
    repeats: int = 0
    cosines: tuple[float, ...] = (0.1, 0.5)
    verify_memory: bool = False

    def __post_init__(self) -> None:
        if not all(0 < cosine < 1 for cosine in self.cosines):
            raise UserError("--cosine takes numbers between 0 and 1")
        if self.repeats and (self.repeats < LEAST or self.repeats % 2):
            raise UserError(f"--repeats must be 0, or an even number of at least {LEAST}, not {self.repeats}")


def measure_steps(
    store: Store, cases: Sequence[BenchCase], arms: Sequence[BenchArm], options: BenchOptions, *, device: str, say: Callable[[str], None]
) -> list[CaseRecord]:
    """Measure the cases, and return what is stored of each.

    A case is stored as soon as it is done, beside the cases that were measured on the same machine. `say` gets a line about each stage.
    """
    on = environment.device(device)
    where, found = environment.describe(on), []
    allocation.keep()
    say("the machine's own limits")
    limits = roofline.ceilings(on)
    for index, case in enumerate(cases, 1):
        with torch.random.fork_rng([on.index or 0] if on.type == "cuda" else []):
            torch.manual_seed(options.seed)
            chosen, tried = _laid_out(case, on)
            stepping = "" if chosen.optimizer == SGD else f", {chosen.optimizer}"
            tokens = f" of {chosen.sequence:,} tokens" if chosen.sequence else ""
            parts = ", loss in parts" if chosen.loss == "parts" else ""
            say(f"[{index}/{len(cases)}] {chosen.model}, batch {chosen.batch}{tokens}, {chosen.layout}{stepping}{parts}")
            new = _case_record(chosen, arms, options, limits, on, say)
        new["tried"] = tried
        _store(store, where, new)
        found.append(new)
    return found


def measure_memory(store: Store, cases: Sequence[BenchCase], arms: Sequence[BenchArm], *, say: Callable[[str], None]) -> list[MemoryRecord]:
    """Measure the most bytes that one step of each arm holds, each in a process of its own, one after the other; kept in OUT/memory.json.

    Every arm is stored as soon as it is done, since a step may take minutes, beside the cases that were measured on the same machine.
    """
    where, found = environment.describe(torch.device("cpu")), []
    for index, case in enumerate(cases, 1):
        with torch.device("meta"):  # made there, not moved there, which would part tied weights
            parameters = build_case(case, torch.device("meta")).parameters
        new: MemoryRecord = {
            **{key: getattr(case, key) for key in ("model", "data", "batch", "layout", "optimizer", "sequence", "loss")},  # type: ignore[typeddict-item]
            "accelerator": "cpu",
            "parameters": parameters,
            "threads": torch.get_num_threads(),
            "arms": [],
            "command": environment.command(),
        }
        for arm in arms:
            say(f"[{index}/{len(cases)}] {case.model}, batch {case.batch}: {arm.label}")
            new["arms"].append(_peak_record(case, arm))
            _store(store, where, new, _MEMORY)
        found.append(new)
    return found


def _peak_record(case: BenchCase, arm: BenchArm) -> PeakRecord:
    head: PeakRecord = {"name": arm.name, "label": arm.label, "kind": arm.kind, "spec": arm.estimator_text, "failed": None}
    if case.too_wide and isinstance(arm.estimator, ONE_ROW_AN_OUTPUT):
        return {**head, "failed": case.too_wide}
    try:
        peak = process_peak.process_peak(case, arm, "--memory-only", few_steps=True)
    except UserError as error:
        return {**head, "failed": str(error)}
    return {**head, "peak_bytes": peak["tally"], "process_bytes": peak["process"]}


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Inside, torch has this many threads; None leaves its own choice."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def timed_networks(store: Store, device: str) -> set[str]:
    """The networks that were timed on this kind of device, with Table I's arms at the paper's batch."""
    stored, on = _stored(store), environment.device(device)
    if stored["environment"].get("device") != environment.describe(on)["device"]:
        return set()
    wanted = {arm.name for arm in TABLE_1}
    at = [case for case in stored["cases"] if case["batch"] == 64 and case.get("optimizer", SGD) == SGD]
    return {case["model"] for case in at if wanted <= {arm["name"] for arm in case["arms"]}}


def would_replace(store: Store, device: str) -> bool:
    """Whether a measurement made here would take the place of stored ones, because another machine or commit made them."""
    stored, where = _stored(store), environment.describe(environment.device(device))
    return bool(stored["cases"]) and not _same_machine(stored, where)


def _same_machine(stored: dict[str, Any], where: dict[str, Any]) -> bool:
    return all(stored["environment"].get(key) == where[key] for key in environment.SAME_MACHINE)


def _stored(store: Store, file: str = _STEPS) -> dict[str, Any]:
    path = store.root / file
    if (stored := read_json(path)) is None or stored.get("schema") != SCHEMA:
        return {"environment": {}, "cases": []}
    for case in check(path, stored, {"environment": dict, "cases": list})["cases"]:
        check(path, case, {"model": str, "batch": int, "layout": str, "accelerator": str, "arms": list})
    return stored


def _store(store: Store, where: dict[str, Any], new: CaseRecord | MemoryRecord, file: str = _STEPS) -> None:
    """Store a case beside those that were measured on the same machine. It replaces an earlier measurement of itself."""
    with store.changing():
        stored = _stored(store, file)
        others = [case for case in stored["cases"] if any({**OLDER, **case}[key] != new[key] for key in SAME_CASE)]
        kept = others if _same_machine(stored, where) else []
        write_json(store.root / file, {"schema": SCHEMA, "environment": where, "cases": [*kept, new]}, depth=4)


def _laid_out(case: BenchCase, on: torch.device) -> tuple[BenchCase, dict[str, float]]:
    """The case in the order in memory in which backpropagation is fastest, and the seconds it takes in each order.

    There are no seconds where there is no choice.
    """
    orders = layouts(case, on)
    if len(orders) == 1:
        return orders[0], {}
    steps: dict[str, timing.TimedWork] = {option.layout: ArmStep(BACKPROP, build_case(option, on)) for option in orders}
    found = timing.interleaved(steps, rounds=TRIED, times=IN_A_ROW[on.type], now=lambda: roofline.now(on))
    tried = {layout: float(np.median(times)) for layout, times in found.items()}
    return min(orders, key=lambda option: tried[option.layout]), tried


def _case_record(
    case: BenchCase,
    arms: Sequence[BenchArm],
    options: BenchOptions,
    limits: roofline.Ceilings,
    on: torch.device,
    say: Callable[[str], None],
) -> CaseRecord:
    built = build_case(case, on)
    steps, failed = _first_steps(arms, built)
    drawn = {arm.name: _redraws(arm, built) for arm in steps}
    works: dict[str, timing.TimedWork] = {arm.name: step for arm, step in steps.items()}
    works.update({f"draws of {name}": random_numbers.total(made) for name, made in drawn.items() if made})
    how: dict[str, Any] = {"rounds": options.rounds, "seconds": options.seconds, "seed": options.seed}
    times = timing.interleaved(works, **how, times=IN_A_ROW[on.type], now=lambda: roofline.now(on))
    say(f"    {len(next(iter(times.values()))) if times else 0} rounds")
    used = joules.joules_of_steps(
        {arm.name: step for arm, step in steps.items()}, energy_meter(on), seed=options.seed, now=lambda: roofline.now(on)
    )
    found = [_arm_record(arm, steps.get(arm), failed.get(arm.name), times, case, built, limits, options) for arm in arms]
    for record in found:
        if record["name"] in used:
            record["joules"] = used[record["name"]]
    if options.repeats:
        _add_worth(found, arms, steps, built, options, say)
    return {
        "layout": case.layout,
        "tried": {},
        "model": case.model,
        "data": case.data,
        "batch": case.batch,
        "sequence": case.sequence,
        "loss": case.loss,
        "accelerator": on.type,
        "optimizer": case.optimizer,
        "optimizer_bytes": optimizers.state_bytes(built.optimizer()),
        "parameters": built.parameters,
        "rounds": len(next(iter(times.values()), ())),
        "seed": options.seed,
        "repeats": options.repeats,
        "arms": found,
        "command": environment.command(),
        "ceilings": limits._asdict(),
    }


def _redraws(arm: BenchArm, built: BuiltCase) -> list[random_numbers.Redraw]:
    """The draws of an arm's step. They are read off a second, eager step, so that the timed step keeps its generators to itself."""
    step = ArmStep(dataclasses.replace(arm, engine="eager"), built)
    step()  # an estimator's memory is drawn in the first step alone
    if arm.engine != "eager":
        return random_numbers.of_a_graph(step, captured=arm.engine == "graph")
    return random_numbers.of_an_eager_step(step)


def _first_steps(arms: Sequence[BenchArm], built: BuiltCase) -> tuple[dict[BenchArm, ArmStep], dict[str, str]]:
    """Every arm after its first step, and why the others could not take one."""
    steps, failed = {}, {}
    for arm in arms:
        if built.case.too_wide and isinstance(arm.estimator, ONE_ROW_AN_OUTPUT):
            failed[arm.name] = built.case.too_wide
            continue
        try:
            step = ArmStep(arm, built)
            step.begin()
            steps[arm] = step
        except (RuntimeError, ValueError, TypeError, OSError, UserWarning) as error:
            failed[arm.name] = (str(error).strip() or type(error).__name__).partition("\n")[0]
    return steps, failed


def _arm_record(
    arm: BenchArm,
    step: ArmStep | None,
    failed: str | None,
    times: dict[str, timing.Samples],
    case: BenchCase,
    built: BuiltCase,
    limits: roofline.Ceilings,
    options: BenchOptions,
) -> ArmRecord:
    head: ArmRecord = {
        "name": arm.name,
        "label": arm.label,
        "kind": arm.kind,
        "spec": arm.estimator_text,
        "engine": arm.engine,
        "failed": failed,
    }
    if step is None:
        return head
    mine, plain, backprop = times[arm.name], times.get(PLAIN.name), times.get(BACKPROP.name)
    exact = [times[name] for name in (BACKPROP.name, BACKPROP.name + COMPILED, BACKPROP.name + CAPTURED) if name in times]
    middle = float(np.median(mine))
    one = times.get(arm.name.rpartition("-k")[0]) if arm.tangents > 1 else None
    return {
        **head,
        "times": mine.tolist(),
        "seconds": timing.median(mine),
        "to_backprop": None if backprop is None else timing.ratio(mine, backprop),
        "to_best_backprop": timing.ratio(mine, min(exact, key=lambda one: float(np.median(one)))) if exact else None,
        "to_plain": None if plain is None else timing.ratio(mine, plain),
        "further": None if one is None or plain is None else timing.further(mine, one, plain, arm.tangents),
        "examples_per_second": case.batch / middle,
        "peak_bytes": None if arm.engine == "graph" else process_peak.tally(step, built),  # a graph's memory is its own from its capture on
        "process": _process(arm, case, built, options),
        "drawing": _drawing(arm, times),
        "roofline": _roofline(arm, step, limits, middle),
        "worth": None,
        "worth_failed": None,
        "to_cosine": [],
    }


def _process(arm: BenchArm, case: BenchCase, built: BuiltCase, options: BenchOptions) -> dict[str, Any] | None:
    """The tally beside the peak of a process of its own; None where that is not asked for, or cannot be had."""
    if not options.verify_memory or built.inputs.device.type != "cpu":
        return None
    found = process_peak.process_peak(case, arm)
    return {**found, "agree": process_peak.within_tolerance(found["tally"], found["process"])}


def _drawing(arm: BenchArm, times: dict[str, timing.Samples]) -> dict[str, ValueWithInterval] | None:
    """How long the random numbers of a step take alone, and which share of the step that is; None for an arm that draws none."""
    if (alone := times.get(f"draws of {arm.name}")) is None:
        return None
    return {"seconds": timing.median(alone), "share": timing.ratio(alone, times[arm.name])}


def _roofline(arm: BenchArm, step: ArmStep, limits: roofline.Ceilings, seconds: float) -> dict[str, Any] | None:
    if arm.engine != "eager":  # under a count it would run as it is written
        return None
    needed = roofline.count(step)
    bound, near = limits.bound(needed)
    return {**needed._asdict(), "seconds": bound, "near": near, "reached": bound / seconds}


def _add_worth(
    found: list[ArmRecord],
    arms: Sequence[BenchArm],
    steps: dict[BenchArm, ArmStep],
    built: BuiltCase,
    options: BenchOptions,
    say: Callable[[str], None],
) -> None:
    """Add to the records what a step of each arm is worth. Arms of equal noise share one measurement."""

    def of(model: torch.nn.Module) -> torch.Tensor:
        return built.loss(model, built.inputs, built.labels)

    twin = copy.deepcopy(built.model)
    twin.zero_grad()
    estimate_grad_(of, twin, Backprop())
    exact = {name: p.grad for name, p in twin.named_parameters()}
    known: dict[Estimator, Worth | str] = {}
    for record, arm in zip(found, arms, strict=True):
        if arm.noise_estimator is None or arm not in steps:
            continue
        one, averaged = worth_of_a_step.one_direction(arm.noise_estimator)
        if one not in known:
            say(f"    the noise of {arm.label}")
            try:
                known[one] = worth_of_a_step.worth(one, of, built.model, repeats=options.repeats, exact=exact, state=steps[arm].state)
            except (RuntimeError, ValueError) as error:
                known[one] = str(error).partition("\n")[0]
        if isinstance(worth := known[one], str):
            record["worth_failed"] = worth
        else:
            record["worth"] = mine = worth_of_a_step.averaged(worth, averaged)
            record["to_cosine"] = worth_of_a_step.cosine_prices(mine, float(np.median(record["times"])), options.cosines)
