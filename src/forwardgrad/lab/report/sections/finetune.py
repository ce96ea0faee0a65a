"""The part of a report on fine-tuning: every way to a gradient in equal seconds, and the memory that each takes. Loads without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from forwardgrad.lab.report.blocks import (
    NONE,
    Block,
    Cell,
    Section,
    Table,
    Views,
    arm_cells,
    failures,
    number,
    percent,
    study_tables,
    tables,
)
from forwardgrad.lab.report.claims import MINUS, fine_tuning
from forwardgrad.lab.report.sections import learning
from forwardgrad.lab.store import ArmResult, Done, StudyResult
from forwardgrad.lab.studies import format_estimator

MEANING = (
    ("arm", "what supplies the gradient; below it the estimator as the command line takes it, and the network. Most accurate first"),
    ("learning rate", "annealed to zero along a cosine; the best of as many trials in every arm on the validation split"),
    ("balanced accuracy", "the mean over classes of the share of test texts that is classified rightly: a guess at one of two has 50 %"),
    ("test accuracy, test loss", "over the whole test split, like the column before: mean over seeds and its 95 % t interval"),
    ("gap", "points of balanced accuracy above or below backpropagation: mean over shared seeds, 95 % t interval"),
    ("steps", "optimizer steps in the same seconds; below it the forward passes they took; a backward pass is not among them"),
    ("training time", "without evaluations; below it that of one step. Runs trained at the same time slow one another"),
    (
        "peak memory",
        "most bytes that training held at once: parameters, state of optimizer and estimator, and the tensors of a step; below it the "
        "share of what backpropagation holds",
    ),
    ("backward pass", "whether there is one"),
)
HEADS = (
    "arm", "learning rate", "balanced accuracy", "test accuracy", "test loss", "gap", "steps", "training time", "peak memory",
    "backward pass", "outcome",
)  # fmt: skip
WORDS = {
    "balanced accuracy": (
        "perplexity",
        "the exponential of the mean test loss: a guess among so many equally likely words would be as good",
    ),
    "test accuracy, test loss": (
        "token accuracy, test loss",
        "of the tokens of the test split the share that was held for the likeliest, and their mean loss in nats: mean over seeds, interval",
    ),
    "test accuracy": ("token accuracy", ""),
    "gap": ("gap", "nats a token that the test loss is better or worse than backpropagation's: mean over shared seeds, 95 % t interval"),
}  # what stands in place of a column, and what it means, where the next word is predicted
NOTE = (
    "Every arm trains for as many seconds, on one thread and with the same batches; its steps follow from the pace of a warm-up. The "
    "network has no dropout. Peaks have all parameters in them, the frozen ones too."
)


def finetune_section(study: StudyResult) -> Section:
    """Opens with what it comes to; then a table and a figure for each set of texts, and how the arms were tuned."""
    said = fine_tuning.verdicts(study)
    blocks: list[Block] = [tuple(said), NOTE]
    for index, (title, arms) in enumerate(study.groups.items()):
        blocks.append(_table(title, arms))
        if any(arm.done for arm in arms):
            blocks.append(_learning(f"{study.name}-{index}", title, arms))
    blocks += [table for table in (study_tables.tuning(study), failures.lost_runs(study)) if table]
    return Section(study.name, study.title, " ".join(said), tuple(blocks))


def _table(title: str, arms: Sequence[ArmResult]) -> Table:
    ordered = sorted(arms, key=lambda arm: (not arm.done, -fine_tuning.score(arm)))
    words = WORDS if any(map(fine_tuning.writes, arms)) else {}
    heads = tuple(words.get(head, (head, ""))[0] for head in HEADS)
    meaning = tuple(words.get(head, (head, means)) for head, means in MEANING)
    backprop = next((arm for arm in arms if arm.kind == "backprop" and arm.done), None)
    rows = tuple(tuple(make(arm) for make in _makers(backprop)) for arm in ordered)
    return Table(heads, ((title, rows),), f"{title}: every arm", meaning)


def _makers(backprop: ArmResult | None) -> list[Callable[[ArmResult], Cell]]:
    """One for each of HEADS."""
    return [
        _named,
        arm_cells.rate,
        _quality,
        arm_cells.accuracy,
        arm_cells.test_loss,
        lambda arm: _gap(arm, backprop),
        arm_cells.steps,
        lambda arm: arm_cells.training_time(arm, name_device=False),
        lambda arm: _memory(arm, backprop),
        lambda arm: Cell("no") if fine_tuning.forward_only(arm) else Cell("yes", tone="quiet"),
        arm_cells.outcome,
    ]


def _named(arm: ArmResult) -> Cell:
    words = f"{format_estimator(arm.run['estimator'])}, {arm.run['model']}" if arm.run else ""
    return Cell(arm.label, words, arm.kind, arm_cells.source(arm))


def _quality(arm: ArmResult) -> Cell:
    if not fine_tuning.writes(arm):
        return arm_cells.estimated([run.balanced_accuracy for run in arm.done], percent, 0.0, 1.0)
    found = arm_cells.test_loss(arm)
    return found if found.tone or not arm.done else Cell(number(fine_tuning.perplexity(arm)))


def _gap(arm: ArmResult, backprop: ArmResult | None) -> Cell:
    if backprop is None or arm is backprop or not arm.done:
        return NONE
    if (found := fine_tuning.gap(arm, backprop)) is None:
        return Cell("not comparable", "", "warn")
    ends = "no interval" if found.low is None or found.high is None else f"{found.low:+.2f} to {found.high:+.2f}"
    return Cell(f"{found.mean:+.2f}".replace("-", MINUS), f"{ends}, n = {found.n}".replace("-", MINUS))


def _memory(arm: ArmResult, backprop: ArmResult | None) -> Cell:
    peak, whole = fine_tuning.peak(arm), backprop and fine_tuning.peak(backprop)
    if peak is None:
        return NONE
    return Cell(tables.size(peak), f"{peak / whole:.2f} × backpropagation's" if whole and arm is not backprop else "")


def _learning(name: str, title: str, arms: Sequence[ArmResult]) -> Views:
    """Balanced accuracy or loss on the validation split against steps, seconds and forward passes."""
    ordered = sorted(arms, key=lambda arm: -fine_tuning.score(arm))
    if any(map(fine_tuning.writes, arms)):
        caption = f"Validation loss of a token of every arm, {title}"
        return learning.views(name, [(title, ordered)], _losses, caption, ylabel="validation loss (nats a token)", log=False)
    caption = f"Balanced validation accuracy of every arm, {title}"
    return learning.views(name, [(title, ordered)], _accuracies, caption, ylabel="balanced validation accuracy (%)")


def _losses(run: Done) -> list[float]:
    return run.evaluations["validation_loss"]


def _accuracies(run: Done) -> list[float]:
    return [100 * accuracy for accuracy in run.evaluations["validation_balanced_accuracy"]]
