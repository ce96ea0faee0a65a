"""The curves of a run: whether it has them, and where they reach a target. Loads without torch."""

from __future__ import annotations

from collections.abc import Sequence

from forwardgrad.lab.statistics import LossSummary, stats, summary
from forwardgrad.lab.store import Done, damaged


def lost(run: Done) -> bool:
    """Whether a run diverged or failed: either way it counts as infinitely bad, and is never left out."""
    return str(run.result["status"]) != "finished"


def has_curve(run: Done) -> bool:
    """Whether a run was evaluated: one that failed may never have been, and then has no table."""
    return run.result["status"] != "failed" or "evaluations.csv" in run.files


def training_losses(run: Done) -> Sequence[float] | LossSummary:
    """The training losses of a run, or what a thin pack kept of them."""
    if (stored := run.loss_summary()) is None:
        return run.losses()
    try:
        return summary.from_json(stored)
    except (TypeError, ValueError, LookupError) as error:
        raise damaged(run.folder / "losses.json", error) from error


def reached(done: Done, column: str, target: float) -> float:
    """Where in a column of its evaluations a run was first seen at or below a validation loss."""
    table = done.evaluations if has_curve(done) else {}
    return stats.first_at_or_below(table.get(column, []), table.get("validation_loss", []), target)
