"""What forward-only means for a record, as far as a program can check it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.records.wording import STEPS
from forwardgrad.lab.studies import Run, find_here, paths, signed
from forwardgrad.lab.training import Training, builders


def check_forward_only(run: Run, *, allow_code: bool) -> None:
    """Raise UserError unless the estimator of a run says that it makes no backward pass.

    Code of the claimant's own is imported where `allow_code` says so, which runs it, and refused where its digest is another than the
    description's: the digest cannot be told without the import.
    """
    own = paths(run)
    if own and not allow_code:
        raise UserError(
            f"this record runs code of its author's ({', '.join(own.values())}), and importing that can do whatever you can do: "
            "read it, then add --allow-code"
        )
    for part, path in own.items():
        find_here(path, part)  # looked for in the current folder first
    if own and (found := signed(run).code) != run.code:
        raise UserError(f"the code of {', '.join(own.values())} is not that of the claim ({run.code}, here {found}): take its author's")
    if builders.estimator(run).reverse:
        raise UserError(f"the estimator {run.estimator['name']!r} makes a backward pass (its `reverse` is True): records are forward-only")


def saved_in_first_steps(run: Run, data_dir: Path | None = None) -> int | None:
    """Bytes that the first steps of a run save for a backward pass, on the processor; None where torch does not show them.

    Raises UserError where there are any, where a step stops with an error, and where they cannot be seen of code that does not come with
    the project.
    """
    plain = dataclasses.replace(run, engine="eager")
    on, sizes = torch.device("cpu"), list[int]()

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    dataset = builders.dataset(plain, on, data_dir)
    try:
        with torch.random.fork_rng([]):
            training = Training.begin(plain, dataset, on, data_dir=data_dir)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                training.advance(min(STEPS, training.schedule.total))
    except (UserError, OSError):
        raise
    except Exception as error:  # code of the claimant's own can raise anything
        if "saved tensor hooks" in str(error):  # torch.func lets nobody look
            if not paths(run):
                return None
            raise UserError("what this record saves for a backward pass cannot be seen, as its code uses torch.func") from error
        why = " ".join(str(error).split()) or "no message"
        raise UserError(f"the first {STEPS} steps stop with {type(error).__name__}: {why}; ask the record's author") from error
    if sizes:
        raise UserError(f"the first {STEPS} steps save {sum(sizes):,} bytes for a backward pass: records are forward-only")
    return 0
