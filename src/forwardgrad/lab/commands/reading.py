"""Commands that read what is stored."""

from __future__ import annotations

import contextlib
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from forwardgrad.lab.commands.options import Seed, write_report
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store import Store, catalogue, results
from forwardgrad.lab.store import pack as pack_runs
from forwardgrad.lab.studies import NEXT_TOKEN

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="An output folder.")]
Column = Literal[
    "identity", "study", "arm", "data", "model", "estimator", "optimizer", "lr", "seed", "status", "validation-loss", "test-accuracy",
    "steps", "seconds",
]  # fmt: skip


def report(
    directory: Directory, pdf: Annotated[bool, typer.Option("--pdf", help="Also write every figure as PDF, for a paper.")] = False
) -> None:
    """Write the report of an output folder again, from its stored runs."""
    write_report(Store(directory, create=False), pdf=pdf)


def list_runs(
    directory: Directory,
    study: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only runs of this study, which may have * and ? in it; can be repeated.")
    ] = None,
    arm: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only runs of this arm; likewise.")] = None,
    status: Annotated[
        Literal["finished", "diverged", "failed", "unfinished"] | None, typer.Option(help="Only runs that ended so, or have not.")
    ] = None,
    sort: Annotated[Column | None, typer.Option(help="Order by this column. [default: by study]")] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="The greatest first.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Show at most so many. [default: all]")] = None,
    table: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write a CSV file instead, every hyperparameter and result a column.")
    ] = None,
) -> None:
    """List the stored runs: a table on a terminal, fields separated by tabs elsewhere."""
    wanted = catalogue.Wanted(tuple(study or ()), tuple(arm or ()), status)
    found = catalogue.rows(Store(directory, create=False), wanted, where=table is not None)
    if sort or reverse:
        found = catalogue.ordered(found, (sort or "study").replace("-", " "), reverse=reverse)
    counted = Counter(row["status"] for row in found)
    shown = found[:limit]
    if table:
        catalogue.write_csv(table, shown)
        print(table)
    else:
        _show(shown)
    ended = ", ".join(f"{counted[name]:,} {name}" for name in catalogue.STATUSES if counted[name])
    print(f"{len(found):,} run{'' if len(found) == 1 else 's'}{f': {ended}' if ended else ''}", file=sys.stderr)


def pack(
    directory: Directory,
    thin: Annotated[
        bool, typer.Option("--thin", help="Of every step's training loss keep only what the report reads; the rest is deleted.")
    ] = False,
) -> None:
    """Put the finished runs of an output folder into one file, which every command reads as it reads their folders."""
    from forwardgrad.lab.report import pack_thin

    store = Store(directory, create=False)
    before = len(store.runs())
    held = pack_thin(store) if thin else pack_runs(store)
    print(f"{held:,} of {before:,} runs: {directory / 'runs.jsonl.gz'}" if held else "no run has finished: nothing to pack")


def _show(shown: list[catalogue.RunRow]) -> None:
    if not sys.stdout.isatty():
        print("\t".join(catalogue.SHOWN))
        for row in shown:
            print("\t".join(catalogue.cells(row)))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console, names = Console(markup=False, highlight=False), list(catalogue.SHOWN)
    table, kept = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False), catalogue.fitting(shown, console.width)
    for place in kept:
        numeric = names[place] in ("lr", "seed", "validation loss", "test accuracy", "steps", "seconds")
        table.add_column(
            names[place].replace(" ", "\n"), justify="right" if numeric else "left", no_wrap=numeric or place == 0, overflow="fold"
        )
    for row in shown:
        cells = catalogue.cells(row)
        table.add_row(*(cells[place] for place in kept))
    console.print(table)


def write(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of a run, OUT/runs/NAME, that kept its weights.")],
    prompt: Annotated[str, typer.Option(help="How the text begins. [default: with nothing]")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens at most, of which a word has one or several.")] = 40,
    temperature: Annotated[float, typer.Option(min=0, help="Tokens are drawn with softmax(scores/temperature); 0: the likeliest.")] = 0.8,
    count: Annotated[int, typer.Option("--texts", min=1, help="Texts to write.")] = 1,
    seed: Seed = 0,
) -> None:
    """Have a network that predicts words, trained with --data movie-words or drug-words, write a text on from a prompt."""
    if not math.isfinite(temperature):
        raise UserError(f"--temperature takes a finite number, not {temperature}")
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name OUT/runs/NAME of a run that was trained with --keep-weights")
    store = Store(folder.absolute().parent.parent, create=False)
    if (stored := store.stored(folder.name)) is None:
        raise UserError(f"{folder} is no folder of a run: name OUT/runs/NAME, with the names that `forwardgrad list OUT` shows")
    run = results.described(store.folder(folder.name), stored)
    if run.data not in NEXT_TOKEN:
        raise UserError(f"the run {folder.name} learned from {run.data}, and predicts no words: name one of {' or '.join(NEXT_TOKEN)}")
    import torch

    from forwardgrad.lab.data import MARK, vocabulary
    from forwardgrad.lab.models import written
    from forwardgrad.lab.training import builders, read_weights

    dataset = builders.dataset(run, torch.device("cpu"))
    model = builders.model(run, dataset)
    read_weights(folder, model)
    words, generator = vocabulary(), torch.Generator().manual_seed(seed)
    begun = words.encode(prompt)
    how: dict[str, Any] = {"count": tokens, "places": dataset.shape[0], "stop": MARK, "temperature": temperature, "generator": generator}
    for _ in range(count):
        print(words.decode([*begun, *written(model, [MARK, *begun], **how)]))


def watch(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An output folder, also one that another process writes.")],
    once: Annotated[bool, typer.Option("--once", help="Show it as it is now, and end.")] = False,
) -> None:
    """Show how far the runs of an output folder are, until all are done; Ctrl-C ends the watching and nothing else."""
    from forwardgrad.lab.store import watch as show

    with contextlib.suppress(KeyboardInterrupt):
        show(Store(directory, create=False), once=once)
