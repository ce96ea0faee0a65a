"""Every run of a study that was lost, shown and not dropped. Loads without torch."""

from __future__ import annotations

from typing import Any

from forwardgrad.lab.report.blocks import arm_cells, run_curves
from forwardgrad.lab.report.blocks.tables import Cell, Table
from forwardgrad.lab.store import ArmResult, StudyResult


def lost_runs(study: StudyResult) -> Table | None:
    """Every run that diverged or failed, trials too, with its reason; None where all went well."""
    groups = []
    for group, arms in study.groups.items():
        rows = tuple(row for arm in arms for row in (*_lost_finals(arm), *_lost_trials(arm)))
        groups += [(group, rows)] if rows else []
    meaning = (
        ("run", "a final run by its place among the seeds, or a trial of the search by its values; below it the folder under runs/"),
    )
    return Table(("arm", "run", "steps", "what happened"), tuple(groups), "Runs that diverged or failed", meaning) if groups else None


def _lost_finals(arm: ArmResult) -> list[tuple[Cell, ...]]:
    runs = [(seed, run) for seed, run in sorted(arm.by_seed.items()) if run_curves.lost(run)]
    return [_lost_row(arm, f"seed {seed}", run.folder.name, run.result) for seed, run in runs]


def _lost_trials(arm: ArmResult) -> list[tuple[Cell, ...]]:
    tried = zip(arm.record["trials"], arm.trials, strict=True)
    bad = [(trial, result) for trial, result in tried if result and result["status"] != "finished"]
    return [_lost_row(arm, f"trial {arm_cells.values_text(trial['values'])}", trial["run"], result) for trial, result in bad]


def _lost_row(arm: ArmResult, run: str, identity: str, result: dict[str, Any]) -> tuple[Cell, ...]:
    return (arm_cells.arm_cell(arm), Cell(run, identity, "ids"), Cell(f"{result['steps']:,}"), Cell(arm_cells.ended(result), tone="warn"))
