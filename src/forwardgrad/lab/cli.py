"""The `forwardgrad` command. Nothing heavy is imported before a command needs it, so that --help is quick."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from forwardgrad import __version__
from forwardgrad.lab import interrupts
from forwardgrad.lab.commands import (
    INTERRUPTED,
    MISTAKE,
    STATUSES,
    checking,
    datasets,
    finetuning,
    measuring,
    reading,
    records,
    replaying,
    studies,
    training,
)
from forwardgrad.lab.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
for command in (
    training.train,
    training.tune,
    finetuning.finetune,
    studies.study,
    studies.reproduce,
    training.demo,
    checking.check,
    measuring.bench,
    measuring.estimators,
    measuring.quality,
    measuring.layers,
    reading.report,
    reading.watch,
    reading.pack,
    reading.write,
    replaying.replay,
):
    app.command()(command)
app.command("list")(reading.list_runs)
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Download the data sets, or check the files that are there.")
for command in (datasets.fetch, datasets.verify):
    data_app.command()(command)
app.add_typer(data_app, name="data")
record_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Records of training without a backward pass: list, claim, verify."
)
record_app.command("list")(records.list_records)
record_app.command("claim")(records.claim_record)
record_app.command("verify")(records.verify_record)
app.add_typer(record_app, name="record")


def main() -> None:
    """Run the command line. A command that cannot have its result ends with one sentence and a status (`commands.ending`)."""
    interrupts.listen()
    for stream in (sys.stdout, sys.stderr):  # a path, or a stored name, may hold what the terminal's encoding does not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = app(prog_name="forwardgrad", standalone_mode=False)
    except typer.TyperException as error:
        helps = type(error).__name__ == "NoArgsIsHelpError"  # not a mistake: a user who asks what there is
        message = " ".join(error.format_message().split()).replace("Value error, ", "")  # Python's word, which helps nobody
        status = print(error.format_message()) if helps else _fail(message)
    except UserError as error:
        status = _fail(str(error))
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        status = _fail(f"cannot read or write{where} ({error.strerror or error}): mend that and run the same command again to go on")
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:
        print("\nforwardgrad: interrupted; finished runs are kept, and the same command goes on from the last checkpoint", file=sys.stderr)
    sys.exit(status or 0)


def _fail(message: str) -> int:
    print(f"forwardgrad: {message}", file=sys.stderr)
    return MISTAKE


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"forwardgrad {__version__}")
        raise typer.Exit


@app.callback(epilog=STATUSES)
def forwardgrad(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Train neural networks without a backward pass, and compare that fairly with backpropagation."""


if __name__ == "__main__":
    main()
