"""Runs as folders: what was asked, where it ran, how it went, and the result, each file written whole or not at all.

OUT/runs/<identity>/run.json            the complete description; its hash is the folder's name
                    environment.json    versions, hardware, commit, command
                    status.json         where a run in progress is (replaced about once a second)
                    checkpoint.pt       the state that a killed run goes on from; gone once it has finished
                    evaluations.csv     validation loss and accuracy against step, epoch and training seconds
                    walk.csv            the parameters' norm over that before the first step, and the relative step, now and then
                    losses.csv.gz       the training loss of every step, and the directional derivative where the estimator has one
                    weights.pt          the final weights, and what the estimator remembered, of a run that was asked to keep them
                    result.json         written last, with the digests of the files beside it: a folder that has it is finished
OUT/runs.jsonl.gz                       finished runs that `forwardgrad pack` took out of their folders (`forwardgrad.lab.store.packed`)
OUT/batches/<identity>/batch.json       the runs that are trained as one program, until all of them have a result
                       checkpoint.pt    the state that all of them go on from
OUT/studies/<name>.json                 which runs belong to which arm of a comparison
OUT/records.lock                        held by who changes a record or a measurement that others may change too

After a kill, a full disk or a power cut at any moment a run is finished, goes on from a checkpoint or begins anew. What was changed
since it was written is refused: a JSON file carries its digest, that of run.json names its folder, and result.json vouches for the rest.
"""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store.files import PACKED, make_folder, read_json
from forwardgrad.lab.store.locks import changing
from forwardgrad.lab.store.packed import IDENTITY, packed_runs
from forwardgrad.lab.store.run_files import Stored, read_stored
from forwardgrad.lab.store.schema import read_study

MEASURED = ("bench.json", "quality.json", "layers.json", "functions.json", "cost.json")  # what lies beside the studies


class Store:
    """The output folder of the laboratory."""

    def __init__(self, root: Path, *, create: bool = True) -> None:
        self.root = root
        if create:
            if root == Path():
                raise UserError("the output folder must be one of its own, not the current folder: name it with --out")
            try:
                for name in ("runs", "studies"):
                    make_folder(root / name)
                with tempfile.TemporaryFile(dir=root):
                    pass
            except OSError as error:
                raise UserError(f"cannot write to the output folder {root} ({error.strerror}): choose another with --out") from error
        elif not self.there(root):
            raise UserError(f"{root} is not an output folder of forwardgrad: it has no runs")

    @staticmethod
    def there(root: Path) -> bool:
        """Whether a folder is an output folder: it holds folders of runs, or a pack of them."""
        return (root / "runs").is_dir() or (root / PACKED).exists()

    def folder(self, identity: str) -> Path:
        return self.root / "runs" / identity

    def stored(self, identity: str) -> Stored | None:
        """What is stored of a run, None for one that was never begun; UserError where any of it is damaged."""
        return read_stored(self.folder(identity), name=identity)

    def result(self, identity: str) -> dict[str, Any] | None:
        """The result of a finished run, None for a run that is absent or unfinished."""
        return None if (found := self.stored(identity)) is None else found.result

    def runs(self) -> list[str]:
        """The identities of all runs that were begun."""
        folders = {path.name for path in (self.root / "runs").glob("*") if IDENTITY.fullmatch(path.name)}
        return sorted(folders | packed_runs(self.root).keys())

    def studies(self) -> list[dict[str, Any]]:
        """Every stored study; UserError for one that is damaged or of another version."""
        return [read_study(path) for path in sorted((self.root / "studies").glob("*.json"))]

    def check(self) -> None:
        """UserError where a record or a measurement is damaged: no report could be made of what is trained then."""
        self.studies()
        for name in MEASURED:
            read_json(self.root / name)

    def changing(self) -> AbstractContextManager[None]:
        """Hold the records of studies and the measurements, which many processes may change. Inside, read again before writing."""
        return changing(self.root)
