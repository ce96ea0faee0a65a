"""Which runs are trained together as one program, and which alone.

Runs go together that differ in seed and in the numbers of one optimizer alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from forwardgrad.ensemble import unbatched
from forwardgrad.lab.store import Store, check, read_json
from forwardgrad.lab.studies import Run, from_json, paths
from forwardgrad.lab.training import builders

LARGEST = 32  # runs in one batch: beyond that a GPU is busy anyway, and a kill or a full memory costs more


def plan(runs: Sequence[Run], store: Store) -> list[tuple[Run, ...]]:
    """Runs as units of work: batches that were begun and may go on, new ones, and runs that go alone.

    Runs alone are those whose estimator has no batched form, those with a checkpoint of their own, and those without a partner.
    """
    waiting = {run.identity: run for run in runs}
    units = []
    for members in _begun(store):
        unfinished = {run.identity for run in members if store.result(run.identity) is None}
        if unfinished and unfinished <= waiting.keys():
            units.append(members)
            waiting = {key: run for key, run in waiting.items() if key not in unfinished}
    groups: dict[str, list[Run]] = {}
    for key, run in waiting.items():
        begun = (store.folder(key) / "checkpoint.pt").exists()
        single = begun or bool(paths(run)) or unbatched(builders.estimator(run)) is not None
        groups.setdefault(key if single else _in_common(run), []).append(run)
    for group in groups.values():
        batches = math.ceil(len(group) / LARGEST)
        units += [tuple(group[first::batches]) for first in range(batches)]
    return units


def _in_common(run: Run) -> str:
    """What runs of one batch have in common."""
    same = (run.data, run.model, run.estimator, run.optimizer.name, run.epochs, run.steps, run.batch_size, run.precision)
    return json.dumps(same, sort_keys=True)


def _begun(store: Store) -> list[tuple[Run, ...]]:
    """The batches that were begun in a store and have not come to their end."""
    found = []
    for path in sorted((store.root / "batches").glob("*/batch.json")):
        stored = check(path, read_json(path), {"schema": int, "runs": list})
        found.append(tuple(from_json(description, str(path)) for description in stored["runs"]))
    return found
