"""What a report reads of the training loss of every step, so that a pack can leave out the rest. Loads without torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from forwardgrad.lab.report.sections import STEP_BINS
from forwardgrad.lab.statistics import stats, summarized
from forwardgrad.lab.store import Store, results

SHORT = 2_000  # steps up to which a summary would be no shorter
UNDRAWN = ("baydin", "beyond", "faster", "finetune", "passes")  # studies whose section draws evaluations alone


def thinning_of(store: Store) -> Callable[[str, dict[str, list[float]]], dict[str, Any] | bool]:
    """What to keep of the losses of a run: all (True), none (False), or a summary.

    The noise study reads every step. Other studies draw curves, and a summary says all that is drawn. Nothing reads those of trials.
    """
    widths: dict[str, set[int]] = {}
    whole: set[str] = set()
    for study in results.studies(store):
        for arm in study.arms if study.family not in UNDRAWN else ():
            longest = max((int(done.result["steps"]) for done in arm.done), default=0)
            for done in arm.done:
                widths.setdefault(done.folder.name, set()).update(stats.bin_width(longest, bins) for bins in STEP_BINS)
            if study.family == "noise":
                whole.update(done.folder.name for done in arm.done)

    def kept(run: str, table: dict[str, list[float]]) -> dict[str, Any] | bool:
        losses = table.get("loss", [])
        if run in whole or (run in widths and len(losses) <= SHORT):
            return True
        return summarized(losses, sorted(widths[run])).to_json() if run in widths else False

    return kept
