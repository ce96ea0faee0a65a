"""The command that builds the model of a run again from the log of its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forwardgrad.lab.commands.options import DataDir
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store import Store, results, write_whole
from forwardgrad.lab.studies import Run, find_here, paths


def replay(
    target: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that was trained with --log, or its steps.log.")],
    step: Annotated[int | None, typer.Option(min=1, help="Stop after this step. [default: the last one]")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the weights there, as torch.load reads them.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Build the model of a run again from its seed and the log of its steps, without training it."""
    folder, path = _log(target)
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"the weights cannot be written to {out}: there is no folder {out.parent}")
    if out is not None and out.is_dir():
        raise UserError(f"the weights cannot be written to {out}: it is a folder, so name a file in it")
    run, took = _described(folder)
    import torch

    from forwardgrad.lab.training import Training, as_bytes, buffers_of, builders, check_code, replay_run

    check_code(run)
    on = torch.device("cpu")
    with torch.random.fork_rng([]):
        training = Training.begin(run, builders.dataset(run, on, data_dir), on, data_dir=data_dir)
        found = replay_run(training, path, step)
    whole = found.steps == training.schedule.total
    said = f"{found.steps:,} steps in {found.seconds:.1f} s"
    said += f", where training took {took:.1f} s" if took is not None and whole else ""
    said += ": the parameters have the digest of the log" if found.compared else ": the log has no digest at this step"
    if found.kept is not None:
        said += ", and are those that the run kept" if found.kept else ""
    if found.kept is False:
        raise UserError(f"{said}, but they are not those in weights.pt of {folder}")
    if out is not None:
        write_whole(out, as_bytes(training.state.model.state_dict()))
    print(said + buffers_of(run, training.state.model) + (f"\n{out}" if out is not None else ""))


def _log(target: Path) -> tuple[Path, Path]:
    """The folder of a run, and its log."""
    from forwardgrad.lab.training import STEPS_LOG

    folder = target if target.is_dir() else target.parent
    path = folder / STEPS_LOG if target.is_dir() else target
    if not path.exists():
        what = f"the run in {folder} has no {STEPS_LOG}" if target.is_dir() else f"there is no {target}"
        raise UserError(f"{what}: name the folder of a run that was trained with --log, such as OUT/runs/0123456789ab")
    return folder.absolute(), path.absolute()


def _described(folder: Path) -> tuple[Run, float | None]:
    """The run of a folder, and the seconds that training took, if it has ended."""
    stored = Store(folder.parent.parent, create=False).stored(folder.name) if folder.parent.name == "runs" else None
    if stored is None:
        raise UserError(
            f"there is no run.json beside the log in {folder}, which says how the model begins: name the log in its run's folder, "
            "or call forwardgrad.replay with the model"
        )
    run = results.described(folder, stored)
    for part, path in paths(run).items():
        find_here(path, part)
    return run, None if stored.result is None else float(stored.result["seconds"])
