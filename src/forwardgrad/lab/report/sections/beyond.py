"""The part of a report on what goes beyond the paper: one table and one plot for each of its networks. Loads without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from forwardgrad.lab.recipes import TABLE1, TITLES
from forwardgrad.lab.report.blocks import NONE, Block, Cell, Section, Table, Views, arm_cells, exact, tables
from forwardgrad.lab.report.claims import MINUS, MODELS, findings, goals
from forwardgrad.lab.report.sections import learning
from forwardgrad.lab.report.sections.studies import further_tables
from forwardgrad.lab.store import ArmResult, Done, StudyResult
from forwardgrad.lab.studies import Arm, format_estimator

MEANING = (
    ("arm", "what supplies the gradient; below it the estimator as the command line takes it. Best test accuracy first"),
    (
        "learning rate",
        "of Adam, annealed to zero along a cosine; the best of four on the validation split. Table I's rows: as published. Below it what "
        "layers compute in where that is not float32",
    ),
    ("epochs", "epochs really run; 'shortened' where the full study, or the paper, trains longer"),
    (
        "test accuracy, test loss",
        "over the whole test split: mean over seeds and its 95 % t interval; the published loss is that of 16 images",
    ),
    ("gap", "points of test accuracy above or below backpropagation: mean of the differences of runs that share a seed, 95 % t interval"),
    ("steps", "optimizer steps; below it the forward passes they took, tangent passes included; a backward pass is not among them"),
    ("training time", "without evaluations; below it that of one step. Runs trained at the same time slow one another"),
    (
        "peak memory",
        "most bytes that training held at once: parameters, state of optimizer and estimator, and the tensors of a step, "
        "on the processor; what the allocator gave out, on a GPU",
    ),
    ("forward-only", "yes: no reverse pass and no transposed forward weights"),
)
HEADS = (
    "arm", "learning rate", "epochs", "test accuracy", "test loss", "gap", "steps", "training time", "peak memory", "forward-only",
    "outcome",
)  # fmt: skip
NOTE = (
    "A gap is judged by its mean over seeds; its interval says how sure that is. Table I's rows stand below the arms of this study: as "
    "published (the loss of the last 16 shuffled test images, one seed, no accuracy), and as trained here where the folder has such runs."
)


def beyond_section(study: StudyResult, others: Sequence[StudyResult]) -> Section:
    """Every network's arms beside the paper's rows; `others` are the studies of the same store."""
    verdicts = goals.verdicts(study)
    blocks: list[Block] = [(*verdicts, *findings.details(study)), NOTE]
    for index, (title, arms) in enumerate(study.groups.items()):
        blocks.append(_table(title, arms, others))
        if any(arm.done for arm in arms):
            blocks.append(_learning(f"{study.name}-{index}", title, arms))
    return Section(study.name, study.title, " ".join(verdicts), (*blocks, *further_tables(study)))


def _table(title: str, arms: Sequence[ArmResult], others: Sequence[StudyResult]) -> Table:
    ordered = sorted(arms, key=lambda arm: (not arm.done, -goals.accuracy(arm)))
    backprop = goals.yardstick(arms)
    groups = [(title, tuple(tuple(make(arm) for make in _makers(arms, backprop)) for arm in ordered))]
    paper = [row for row in TABLE1 if row.run.model == MODELS.get(title)]
    if paper:
        groups.append(("Table I as published", tuple(map(_published, paper))))
    names = {row.name: row for row in paper}
    ours = [arm for study in others if study.family == "table1" for arm in study.arms if arm.name in names and arm.done]
    if ours:
        groups.append(("Table I as trained here", tuple(_trained(arm, names[arm.name]) for arm in ours)))
    return Table(HEADS, tuple(groups), f"{title}: every arm", MEANING)


def _makers(arms: Sequence[ArmResult], backprop: ArmResult | None) -> list[Callable[[ArmResult], Cell]]:
    devices = {run.environment.get("device") for arm in arms for run in arm.done}
    return [
        lambda arm: Cell(arm.label, format_estimator(arm.run["estimator"]) if arm.run else "", arm.kind, arm_cells.source(arm)),
        arm_cells.rate,
        arm_cells.epochs,
        arm_cells.accuracy,
        arm_cells.test_loss,
        lambda arm: _gap(arm, backprop),
        arm_cells.steps,
        lambda arm: arm_cells.training_time(arm, name_device=len(devices) > 1),
        _memory,
        _forward_only,
        arm_cells.outcome,
    ]


def _published(row: Arm) -> tuple[Cell, ...]:
    assert row.published is not None
    optimizer = row.run.optimizer
    loss = Cell(f"{row.published.test_loss:.3f}", "last 16 images")
    words = Cell(exact(optimizer.lr), f"decay {exact(optimizer.decay)}" if optimizer.decay else "")
    epochs = Cell(str(row.published.epochs))
    return (_paper_arm(row), words, epochs, NONE, loss, NONE, NONE, NONE, NONE, _yes(row.kind == "forward"), NONE)


def _trained(arm: ArmResult, row: Arm) -> tuple[Cell, ...]:
    """A row of Table I from runs of ours."""
    _, rate, *_, only, _ = _published(row)
    cells = (arm_cells.epochs(arm), arm_cells.accuracy(arm), arm_cells.test_loss(arm), NONE, arm_cells.steps(arm))
    cost = (arm_cells.training_time(arm, name_device=False), _memory(arm))
    return (dataclasses.replace(_paper_arm(row), link=arm_cells.source(arm)), rate, *cells, *cost, only, arm_cells.outcome(arm))


def _paper_arm(row: Arm) -> Cell:
    return Cell(f"{row.label}, {TITLES[row.run.optimizer.name]}", format_estimator(row.run.estimator), row.kind)


def _gap(arm: ArmResult, backprop: ArmResult | None) -> Cell:
    if backprop is None or arm is backprop or not arm.done:
        return NONE
    found = goals.gap(arm, backprop)
    if found is None:
        return Cell("not comparable", f"different {', '.join(goals.unequal(arm, backprop)) or 'seeds'}", "warn")
    if found.low is None or found.high is None:
        return Cell(_signed(found.mean), f"n = {found.n}, no interval")
    return Cell(_signed(found.mean), f"{_signed(found.low)} to {_signed(found.high)}, n = {found.n}")


def _signed(points: float) -> str:
    return f"{points:+.2f}".replace("-", MINUS)


def _memory(arm: ArmResult) -> Cell:
    peak = arm_cells.mean_of(arm, "peak_bytes")
    return NONE if peak is None else Cell(tables.size(peak))


def _forward_only(arm: ArmResult) -> Cell:
    if arm.kind == "linear":
        return Cell("yardstick", "one layer: nothing to pass back", "quiet")
    return _yes(goals.forward_only(arm))


def _yes(yes: bool) -> Cell:
    return Cell("yes" if yes else "no", tone="" if yes else "quiet")


def _learning(name: str, title: str, arms: Sequence[ArmResult]) -> Views:
    """Validation errors on a logarithmic axis: accuracies close to 1 could not be told apart."""
    ordered = sorted(arms, key=lambda arm: -goals.accuracy(arm))
    ylabel, caption = "validation error (% of images)", f"Validation error of every arm, {title}"
    return learning.views(name, [(title, ordered)], _errors, caption, ylabel=ylabel, log=True)


def _errors(run: Done) -> list[float]:
    return [100 * (1 - accuracy) for accuracy in run.evaluations["validation_accuracy"]]
