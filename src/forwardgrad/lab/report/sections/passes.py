"""The part of a report on equal forward passes: what became of the loss, and of the newer papers' claims. Loads without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from forwardgrad.lab.report.blocks import NONE, Block, Cell, Section, Table, Views, arm_cells, count, failures, study_tables
from forwardgrad.lab.report.claims import newer
from forwardgrad.lab.report.sections import learning
from forwardgrad.lab.store import ArmResult, Done, StudyResult
from forwardgrad.lab.studies import format_estimator

MEANING = (
    ("arm", "what supplies the gradient; below it the estimator as the command line takes it"),
    ("learning rate", "of plain SGD, constant; the best of as many trials in every arm by the validation loss at their end"),
    ("a step", "forward passes of a step; below it the directions that these are spent on"),
    ("steps", "optimizer steps; below it the forward passes they took, which every arm has alike up to one step's"),
    ("test loss, test accuracy", "over the whole test split at the end: mean over seeds and its 95 % t interval"),
    ("training time", "without evaluations and compiling; below it that of one step"),
)
HEADS = ("arm", "learning rate", "a step", "steps", "test loss", "test accuracy", "training time", "outcome")
NOTE = (
    "A step along K directions takes 2K forward passes with differences on two sides, and K + 1 on one side. Forward-mode AD carries K "
    "tangents beside the values of one pass, each of which costs about one pass more: its step counts as K + 1. The papers fine-tune large "
    "pretrained networks, or train policies by their rewards; here a small network learns from random weights. A verdict is one on this "
    "task alone. Rates are chosen by a single trial each, and no interval over seeds contains the chance of that. With one direction a "
    "step the estimates of forward mode and of MeZO are alike up to the order of ε²: what lies between these two arms is what tuning "
    "leaves to chance."
)
SHOWN = {"forward passes": 0, "seconds": 1}  # views of the figure, and their order


def passes_section(study: StudyResult) -> Section:
    """Opens with the figure; then what became of each claim, the table, and how the arms were tuned."""
    said = newer.verdicts(study)
    blocks: list[Block] = []
    if any(arm.done for arm in study.arms):
        blocks.append(_learning(study))
    rows = tuple((title, tuple(tuple(make(arm) for make in MAKERS) for arm in arms)) for title, arms in study.groups.items())
    blocks += [tuple(said), NOTE, Table(HEADS, rows, "At equal forward passes", MEANING)]
    blocks += [table for table in (study_tables.tuning(study), failures.lost_runs(study)) if table]
    return Section(study.name, study.title, " ".join(said), tuple(blocks))


def _learning(study: StudyResult) -> Views:
    """The validation loss of every arm against forward passes and against seconds."""
    caption = f"Validation loss of every arm, {', '.join(study.groups)}"
    found = learning.views(study.name, list(study.groups.items()), _losses, caption, ylabel="validation loss (nats)")
    kept = sorted((view for view in found.views if view[0] in SHOWN), key=lambda view: SHOWN[view[0]])
    return dataclasses.replace(found, views=tuple(kept))


def _losses(run: Done) -> Sequence[float]:
    return run.evaluations["validation_loss"]


def _named(arm: ArmResult) -> Cell:
    return Cell(arm.label, format_estimator(arm.run["estimator"]) if arm.run else "", arm.kind, arm_cells.source(arm))


def _step(arm: ArmResult) -> Cell:
    steps, made = arm_cells.mean_of(arm, "steps"), arm_cells.mean_of(arm, "forward_passes")
    if not steps or made is None:
        return NONE
    return Cell(f"{made / steps:.0f} passes", count(int(arm.run["estimator"].get("tangents", 1)), "direction"))


MAKERS: tuple[Callable[[ArmResult], Cell], ...] = (
    _named,
    arm_cells.rate,
    _step,
    arm_cells.steps,
    arm_cells.test_loss,
    arm_cells.accuracy,
    lambda arm: arm_cells.training_time(arm, name_device=False),
    arm_cells.outcome,
)  # one for each of HEADS
