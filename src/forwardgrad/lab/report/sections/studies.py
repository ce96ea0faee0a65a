"""The sections of a report: for every study its findings, tables and figures, then functions and provenance. Loads without torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from forwardgrad.lab.report import figures
from forwardgrad.lab.report.blocks import (
    Block,
    Cell,
    Picture,
    Section,
    Table,
    Views,
    arm_cells,
    exact,
    failures,
    number,
    run_curves,
    study_tables,
    tables,
)
from forwardgrad.lab.report.claims import findings
from forwardgrad.lab.report.sections import comparison_verdict, learning
from forwardgrad.lab.report.sections.learning import STEP
from forwardgrad.lab.statistics import stats
from forwardgrad.lab.store import ArmResult, StudyResult, finite

TRAINING = "training loss (cross-entropy, nats)"
STEP_BINS = FIGURE_1_BINS, FIGURE_2_BINS = (400, 150)  # most bins of steps that a curve of training losses has
VALIDATION = "validation loss (cross-entropy, nats)"
READING = (
    "The published 'test loss' is no loss of the test set: it is that of the last mini-batch of 16 shuffled test images. Readings of 16 "
    "images scatter widely, so a published 0.000, or 0.270 beside 0.332, is noise and orders nothing. Our own reading of that kind stands "
    "beside it; the columns 'test loss' and 'test accuracy' cover the whole test split."
)
SETTINGS = {False: "one learning rate for both arms", True: "each arm tuned"}


def study_section(study: StudyResult) -> Section:
    published = any(arm.record.get("published") for arm in study.arms)
    of_the_paper = any({"forward", "backprop"} <= {arm.kind for arm in arms} for arms in study.groups.values())
    headlines = findings.headlines(study) if of_the_paper else comparison_verdict.verdicts(study)
    blocks: list[Block] = [
        (*headlines, *findings.details(study)),
        *([READING] if published else []),
        study_tables.results(study),
        *_pictures(study),
        *further_tables(study),
    ]
    return Section(study.name, study.title, " ".join(headlines), tuple(blocks))


def further_tables(study: StudyResult) -> list[Table]:
    """The tables that every study has: the time to a loss, the search, and the runs that were lost. An empty one is left out."""
    return [*study_tables.speed(study), *(table for table in (study_tables.tuning(study), failures.lost_runs(study)) if table)]


def _pictures(study: StudyResult) -> Iterable[str | Picture | Views]:
    if study.family == "baydin":
        yield from _baydin(study)
    elif not any(arm.record.get("published") for arm in study.arms):
        for index, (group, arms) in enumerate(list(study.groups.items())[: learning.drawn(study)]):
            name = f"{study.name}-{index}" if index else study.name
            yield _training(f"{name}-training", arms)
            yield _validation(f"{name}-validation", [("", arms)], f"Validation loss, {group}")
        if (rest := len(study.groups) - learning.drawn(study)) > 0:
            yield f"The curves of {tables.count(rest, 'further comparison')} are not drawn: their numbers stand in the tables and in runs/."
    else:
        if cifar := [arm for arm in study.arms if arm.data == "cifar10"]:
            yield _training(f"{study.name}-figure-1", cifar, "Figure 1. ")
        if any(arm.data == "mnist" for arm in study.arms):
            yield _figure_2(study)


def _training(name: str, arms: Sequence[ArmResult], heading: str = "") -> Picture:
    """Both arms' training loss in one panel: the paper's Figure 1."""
    title = " and ".join(dict.fromkeys(str(arm.record["group"]) for arm in arms))
    panel = figures.Panel(title, _lines(arms, FIGURE_1_BINS), _notes(arms))
    drawing = figures.curves(name, [[panel]], xlabel=STEP, ylabel=TRAINING)
    return Picture(name, drawing, f"{heading}Training loss per optimizer step, {title}. {_bins(FIGURE_1_BINS)}{_note_sentence(arms)}")


def _figure_2(study: StudyResult) -> Picture:
    """The paper's Figure 2: dense and convolutional network × SGD, Nesterov, Adam."""
    rows = []
    shown: list[ArmResult] = []
    for model, shape in (("nn", "dense"), ("cnn", "convolutional")):
        row = []
        for optimizer, words in (("sgd", "SGD"), ("nesterov", "Nesterov"), ("adam", "Adam")):
            mnist = [arm for arm in study.arms if arm.data == "mnist" and arm.run["model"] == model]
            arms = [arm for arm in mnist if arm.run["optimizer"]["name"] == optimizer]
            lines = _lines(arms, FIGURE_2_BINS)
            shown += arms
            row.append(figures.Panel(f"{shape} · {words}", lines, _notes(arms) if lines else "unfinished" if arms else "not run"))
        rows.append(row)
    name = f"{study.name}-figure-2"
    drawing = figures.curves(name, rows, xlabel=STEP, ylabel=TRAINING)
    caption = "Figure 2. Training loss per optimizer step on MNIST, both arms (Nesterov's at its look-ahead point)."
    return Picture(name, drawing, f"{caption} {_bins(FIGURE_2_BINS)}{_note_sentence(shown)}")


def _bins(bins: int) -> str:
    return f"Line: mean of each of at most {bins} bins of steps, over the runs still training there; band: least to greatest."


def _lines(arms: Sequence[ArmResult], bins: int) -> tuple[figures.Line, ...]:
    lines = []
    for arm in arms:
        curve = stats.binned([run_curves.training_losses(run) for run in arm.done if run.has_losses], bins)
        if curve.at:
            lines.append(figures.Line(arm.kind, curve, _end(arm), all(map(run_curves.lost, arm.done)), arm.label))
    return tuple(lines)


def _end(arm: ArmResult) -> str | None:
    """Which runs of an arm ended early, and where the first of them did."""
    steps = {status: [int(run.result["steps"]) for run in arm.done if run.result["status"] == status] for status in ("diverged", "failed")}
    if len(arm.done) == 1:
        return next((f"{status} at step {ended[0]:,}" for status, ended in steps.items() if ended), None)
    said = [f"{len(ended)} of {len(arm.done)} {status}, first at step {min(ended):,}" for status, ended in steps.items() if ended]
    return "; ".join(said) or None


def _notes(arms: Sequence[ArmResult]) -> str:
    return "; ".join(dict.fromkeys(arm.shortened for arm in arms if arm.shortened))


def _note_sentence(arms: Sequence[ArmResult]) -> str:
    notes = _notes(arms)
    return f" {notes[0].upper()}{notes[1:]}." if notes else ""


def _validation(name: str, settings: Sequence[learning.PanelArms], caption: str) -> Views:
    """Validation loss, one panel for each setting, on the same axes."""
    return learning.views(name, settings, lambda run: run.evaluations["validation_loss"], caption, ylabel=VALIDATION, end=_end)


def _baydin(study: StudyResult) -> Iterable[str | Picture | Views]:
    models = dict.fromkeys(arm.run["model"] for arm in study.arms if arm.run)
    for model in models:
        title = f"{tables.MODELS.get(model, model)} on {tables.DATA['mnist']}"
        mine = [arm for arm in study.arms if arm.name.startswith(f"{model}-")]
        settings = {tuned: {arm.kind: arm for arm in mine if bool(arm.record.get("space")) == tuned} for tuned in (False, True)}
        panels = [(_setting(tuned, list(arms.values())), list(arms.values())) for tuned, arms in settings.items()]
        yield findings.two_settings(title, settings[False], settings[True])
        caption = f"{title[:1].upper()}{title[1:]}: the same comparison at one learning rate (left) and with each arm tuned (right)"
        yield _validation(f"{study.name}-{model}", panels, caption)


def _setting(tuned: bool, arms: Sequence[ArmResult]) -> str:
    begun = [arm for arm in arms if arm.run]
    rates = dict.fromkeys(exact(arm.run["optimizer"]["lr"]) + (f" ({arm.kind})" if tuned else "") for arm in begun)
    return SETTINGS[tuned] + (f"\nlr {', '.join(rates)}" if rates else "")


def functions_section(stored: dict[str, Any]) -> Section:
    """Beale's and Rosenbrock's functions: paths at one learning rate and with each arm tuned."""
    groups, pictures = [], []
    for function in stored["functions"]:
        groups.append((str(function["name"]), tuple(_descent_row(arm, function) for arm in function["arms"])))
        if function.get("grid"):
            pictures.append(_contours(function))
    meaning = (
        ("setting", "both arms are tuned over the same learning rates"),
        ("value at the end", "the function at the last point; both functions are 0 at their minimum"),
    )
    table = Table(("arm", "setting", "learning rate", "steps", "value at the end"), tuple(groups), "Descents", meaning)
    verdict = _descent_sentence(stored["functions"])
    return Section("functions", "Two test functions", verdict, (verdict, table, *pictures))


def _descent_sentence(functions: Sequence[dict[str, Any]]) -> str:
    """Who ended lower, at one learning rate and tuned, on each function."""
    parts = []
    for function in functions:
        for tuned in (False, True):
            ends = {arm["kind"]: finite(arm.get("final_median"))
                    for arm in function["arms"] if bool(arm["tuned"]) == tuned}  # fmt: skip
            if len(ends) == 2:
                forward, backprop = number(ends["forward"]), number(ends["backprop"])
                parts.append(f"{function['name']}, {SETTINGS[tuned]}: {forward} with the forward gradient, {backprop} with backpropagation")
    return f"Values at the end of the descents. {'; '.join(parts)}." if parts else "No function has both arms."


def _descent_row(arm: dict[str, Any], function: dict[str, Any]) -> tuple[Cell, ...]:
    searched = function.get("searched") or []
    edge = bool(arm["tuned"] and searched and arm["lr"] in (min(searched), max(searched)))
    below = f"median of {tables.count(arm['seeds'], 'seed')}" if arm.get("seeds") and arm["kind"] == "forward" else ""
    lost = "the path shown diverged" if arm.get("diverged") else ""
    return (
        _arm(arm["kind"]),
        Cell(SETTINGS[bool(arm["tuned"])]),
        Cell(exact(arm["lr"]), "on the edge of its grid" if edge else "", "warn" if edge else ""),
        Cell(f"{function.get('steps') or len(arm['path']) - 1:,}"),
        Cell(number(arm.get("final_median")), ", ".join(part for part in (below, lost) if part), "warn" if lost else ""),
    )


def _arm(kind: str) -> Cell:
    names = {"forward": "forward gradient", "backprop": "backpropagation"}
    return Cell(names.get(kind, kind), tone=kind)


def _contours(function: dict[str, Any]) -> Picture:
    grid = function["grid"]
    heights = [[math.nan if value is None else value for value in row] for row in grid["z"]]
    x, y = function["minimum"]
    surface = figures.Surface(grid["x"], grid["y"], heights, (x, y), (function["start"][0], function["start"][1]))
    panels = []
    for tuned in (False, True):
        arms = [(arm, stats.thinned(arm["path"])) for arm in function["arms"] if bool(arm["tuned"]) == tuned]
        panels.append((SETTINGS[tuned], [figures.DescentPath(arm["kind"], _descent_label(arm), path) for arm, path in arms if path]))
    name = f"function-{str(function['name']).lower()}"
    caption = f"{function['name']}'s function: paths of both arms (forward: first seed); levels are evenly spaced in the logarithm."
    return Picture(name, figures.contours(name, surface, panels), caption)


def _descent_label(arm: dict[str, Any]) -> str:
    return f"{_arm(arm['kind']).text}, lr {exact(arm['lr'])}{' (diverged)' if arm.get('diverged') else ''}"


def provenance_section(studies: Sequence[StudyResult], others: Sequence[tuple[str, dict[str, Any]]]) -> Section:
    """The command, machine, versions and runs behind every number."""
    groups = [(study.title, tuple(_provenance(arm) for arm in study.arms)) for study in studies]
    extra = []
    for title, environment in others:
        command = Cell(str(environment.get("command", "–")), tone="code")
        extra.append((Cell(title, anchor=tables.place("source", title)), command, NOT_RUNS, *_machine([environment])))
    if extra:
        groups.append(("Measurements outside the studies", tuple(extra)))
    table = Table(("arm", "command", "runs", "hardware", "software"), tuple(groups), "Where every number comes from")
    note = "A run's identity is the name of its folder under runs/ and the hash of its complete description."
    return Section("provenance", "Provenance", "", (note, table))


NOT_RUNS = Cell("–", tone="quiet")


def _provenance(arm: ArmResult) -> tuple[Cell, ...]:
    group = str(arm.record["group"])
    runs = f"n = {len(arm.done)}" + ("" if arm.complete else f" of {arm.planned}")
    environments = [run.environment for run in arm.done]
    return (
        Cell(arm.label, group, arm.kind, anchor=arm_cells.source(arm)),
        Cell(str(arm.record["command"]), tone="code"),
        Cell(runs, " ".join(arm.record["runs"]), "ids"),
        *_machine(environments),
    )


def _machine(environments: Sequence[dict[str, Any]]) -> tuple[Cell, Cell]:
    if not any(environments):
        return NOT_RUNS, NOT_RUNS
    hardware, software = [], []
    for stored in environments:
        known = _Unknown({key: value for key, value in stored.items() if value is not None})
        hardware.append("{device}, {threads} of {cores} cores, {platform}".format_map(known))
        software.append("forwardgrad {forwardgrad}, commit {commit}, torch {torch}, Python {python}".format_map(known))
    return Cell("; ".join(dict.fromkeys(hardware))), Cell("; ".join(dict.fromkeys(software)))


class _Unknown(dict[str, Any]):
    """An environment in which every missing entry reads as unknown."""

    def __missing__(self, key: str) -> str:
        return "unknown"
