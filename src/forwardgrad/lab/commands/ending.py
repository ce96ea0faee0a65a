"""How a command ends: with a status for the job script that started it, and with one sentence where the status is not 0."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import typer

from forwardgrad.lab.store import Store
from forwardgrad.lab.tuning import Campaign

FAILED, MISTAKE, DIVERGED, UNDECIDED, INTERRUPTED = 1, 2, 3, 4, 130
NAMED = 3  # arms that a sentence names
STATUSES = """Exit status: 0 finished; 1 a run failed, or an arm of a study has no winner because trials failed; 2 a mistake in what was
asked for, such as missing data; 3 the run of `train` or `finetune` diverged, or all trials of an arm did; 4 `record verify`
decided nothing, where 1 says that the claim does not hold; 130 interrupted."""


def end(status: int, words: str) -> NoReturn:
    """End the command with this status, and say why."""
    print(f"forwardgrad: {words}", file=sys.stderr)
    raise typer.Exit(status)


def end_of_run(result: dict[str, Any], folder: Path) -> None:
    """Return if a single run finished; else end the command with the status of a run that failed or diverged."""
    if result["status"] == "failed":
        end(FAILED, f"the run failed: {shlex.quote(str(folder / 'error.txt'))} says why, and --retry-failed runs it again")
    if result["status"] == "diverged":
        end(DIVERGED, f"the run diverged at step {result['steps']:,}: that is its result, and it is kept in {shlex.quote(str(folder))}")


def end_of_studies(store: Store, campaigns: Sequence[Campaign]) -> None:
    """Return if every study has all its results; else end the command, and say what is missing.

    A final run that diverged is a result. So is a trial that diverged, if another trial of its arm finished.
    """
    results = [result for campaign in campaigns for result in campaign.results.values()]
    failed = sum(result["status"] == "failed" for result in results)
    arms = [(campaign, state) for campaign in campaigns for state in campaign.arms]
    lacking = [f"{state.arm.name} of {campaign.study.name} ({state.no_winner})" for campaign, state in arms if state.no_winner]
    if not failed and not lacking:
        return
    if not any(result["status"] == "finished" for result in results):
        said = f"no run of {' and '.join(campaign.study.name for campaign in campaigns)} finished"
        said += ": nothing was chosen, and nothing trained further" if len(lacking) == len(arms) else ""
    else:
        told = [f"{failed:,} of {len(results):,} runs failed"] if failed else []
        more = f" and {len(lacking) - NAMED} more arms" if len(lacking) > NAMED else ""
        told += [f"no winner was chosen, and nothing trained further, for {', '.join(lacking[:NAMED])}{more}"] if lacking else []
        said = ", and ".join(told)
    why = f"; error.txt in the folders below {shlex.quote(str(store.root / 'runs'))} says why, and --retry-failed runs them again"
    end(FAILED if failed else DIVERGED, said + (why if failed else ""))
