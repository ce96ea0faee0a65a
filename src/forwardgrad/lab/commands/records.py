"""Commands for records: the table of them, a claim to one, and its verification."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from forwardgrad.lab.commands.ending import FAILED, UNDECIDED
from forwardgrad.lab.commands.options import DataDir, Device, Out, RetryFailed
from forwardgrad.lab.execution import Place
from forwardgrad.lab.store import Store, make_folder, results, write_whole
from forwardgrad.lab.studies import folder_of

VERIFIED = Path("verification")  # apart from a claimant's own runs
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Import code of the record's author, which runs it: read it first.")]


def list_records(
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="A folder of results: output folders, and claims in its folder records.")
    ] = Path("results"),
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the page there. [default: print it]")] = None,
) -> None:
    """Print the table of records as Markdown: every task, its best forward-only result, and backpropagation's beside it."""
    from forwardgrad.lab.records import records_page

    page = records_page(folder)
    if out is None:
        print(page, end="")
    else:
        write_whole(out, page.encode())
        print(out)


def claim_record(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs, OUT/runs/NAME: three seeds or more.")],
    task: Annotated[str, typer.Option(metavar="NAME", help="The task; `forwardgrad record list` shows all.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The claim's file.")],
    who: Annotated[str, typer.Option(help="Whose record it is.")] = "not named",
    allow_code: AllowCode = False,
) -> None:
    """Make the claim to a record from finished runs that differ in their seeds alone."""
    from forwardgrad.lab.records import check_forward_only, claimed_runs, record_task, write_claim

    claim = claimed_runs(runs, record_task(task), who)
    check_forward_only(claim.run, allow_code=allow_code)
    make_folder(out.parent)
    write_claim(out, claim)
    print(out)
    commit = claim.environment["commit"]
    if commit is None or commit.endswith("+"):
        print(f"nobody can check out what these runs were trained with (commit {commit}): train from a clean commit", file=sys.stderr)


def verify_record(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file of a claim.")],
    seeds: Annotated[int | None, typer.Option(min=3, help="Fresh seeds. [default: as many as were claimed]")] = None,
    first_seed: Annotated[int | None, typer.Option(min=0, help="The first of them. [default: follows from the claim]")] = None,
    device: Device = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each run. [default: the claim's, where there are so many]")] = None,
    data_dir: DataDir = None,
    out: Out = VERIFIED,
    allow_code: AllowCode = False,
    retry_failed: RetryFailed = False,
) -> None:
    """Check a claim, train its run with fresh seeds, and say whether it holds; the same command goes on after a kill.

    Exit status: 0 it holds, 1 it does not hold, 2 there is nothing to verify, 4 not decided.
    """
    from forwardgrad.lab.commands.carrying import check_place
    from forwardgrad.lab.execution import execute
    from forwardgrad.lab.records import check_forward_only, fresh_runs, read_claim, saved_in_first_steps, verdict
    from forwardgrad.lab.store import Progress

    claim = read_claim(file)
    fresh = fresh_runs(claim, seeds, first_seed)
    check_forward_only(claim.run, allow_code=allow_code)
    threads = threads or min(int(claim.environment["threads"]), os.cpu_count() or 1)
    place = Place(device=device, data_dir=data_dir, threads=threads, batched=False, path=folder_of(claim.run), retry_failed=retry_failed)
    check_place(place)
    saved = saved_in_first_steps(fresh[0], data_dir)
    print(f"rule: forward-only; {'saved tensors cannot be seen' if saved is None else 'nothing is saved for a backward pass'}")
    store = Store(out)
    execute(fresh, store, place, Progress({run.identity: f"{claim.task} seed {run.seed}" for run in fresh}))
    ended = [done for run in fresh if (done := results.finished(store, run.identity)) is not None]
    found = verdict(claim, ended)
    print("\n".join(found.lines))
    print(f"{found.outcome}: {found.why}")
    status = {"holds": 0, "does not hold": FAILED, "not decided": UNDECIDED}[found.outcome]
    raise typer.Exit(status)
