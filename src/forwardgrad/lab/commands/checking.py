"""The command that checks an estimator on a user's model before a run is trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from forwardgrad.lab.commands.options import Seed
from forwardgrad.lab.errors import UserError

FAULT = 1


def check(
    factory: Annotated[
        str, typer.Argument(metavar="MODULE:FACTORY", help="A function, or FILE.py:FUNCTION, that returns (model, loss of the model).")
    ],
    estimator: Annotated[
        str, typer.Option(metavar="SPEC", help="As `forwardgrad estimators` lists them, or your own: 'module:Class(option=value)'.")
    ] = "forward",
    seconds: Annotated[float, typer.Option(help="Time for repeated estimates: as many as fit.")] = 30.0,
    compile_: Annotated[bool, typer.Option("--compile", help="Also compile the step, which can take minutes.")] = False,
    seed: Seed = 0,
    json_: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the findings there.")] = None,
) -> int:
    """Check an estimator on your own model: directions, bias, what it leaves behind, what has no rule. Status 1: a fault was found."""
    import torch

    from forwardgrad.diagnostics.checks import check as checked
    from forwardgrad.lab.commands.factory import estimator as named
    from forwardgrad.lab.commands.factory import pair

    if not 0 < seconds < float("inf"):
        raise UserError(f"--seconds must be a number above 0, not {seconds}")
    if json_ is not None and not json_.absolute().parent.is_dir():
        raise UserError(f"the findings cannot be written to {json_}: there is no folder {json_.parent}")
    chosen = named(estimator)
    torch.manual_seed(seed)  # for weights and data that the factory draws, and for dropout
    model, loss = pair(factory)
    try:
        found = checked(loss, model, chosen, generator=torch.Generator().manual_seed(seed), seconds=seconds, compile=compile_)
    except (ValueError, TypeError) as error:  # a model without parameters to train
        raise UserError(f"the model of {factory!r} cannot be checked: {' '.join(str(error).split())}") from error
    print(found.table())
    if json_ is not None:
        json_.write_text(json.dumps(found.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if found.passed else FAULT
