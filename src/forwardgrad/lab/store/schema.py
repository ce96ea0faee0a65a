"""Which fields a stored result and a study's record have, of which types. Loads without torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store.files import check, damaged, is_huge, read_json
from forwardgrad.lab.store.packed import IDENTITY
from forwardgrad.lab.studies import SCHEMA

NUMBER, MAYBE = (int, float), (int, float, type(None))
RESULT = {
    "status": str,
    "reason": (str, type(None)),
    "diverged_at": (int, type(None)),
    "steps": int,
    "epochs": NUMBER,
    "parameters": int,
    "seconds": NUMBER,
    "validation_loss": MAYBE,
    "validation_accuracy": MAYBE,
    "test": (dict, type(None)),
}
LATER = {
    "forward_passes": int,
    "peak_bytes": (int, type(None)),
    "initial_norm": MAYBE,
    "replicas": int,
    "joules": dict,
    "compile_seconds": NUMBER,
    "fallback": str,
    "validation_balanced_accuracy": MAYBE,
    "validation_perplexity": MAYBE,
}  # what not every run has
TEST = {"loss": MAYBE, "accuracy": MAYBE, "examples": int}
LATER_TEST = {
    "last16": MAYBE,
    "last16_low": MAYBE,
    "last16_high": MAYBE,
    "balanced_accuracy": MAYBE,
    "perplexity": MAYBE,
}  # what only losses of examples have, and what older runs did not count
STUDY = {"name": str, "title": str, "arms": list}
ARM = {
    "name": str,
    "group": str,
    "kind": str,
    "label": str,
    "command": str,
    "published": (dict, type(None)),
    "space": dict,
    "tuning_epochs": int,
    "trials": list,
    "chosen": dict,
    "runs": list,
}
LATER_STUDY = {"seeds": int, "of": str}  # what not every study has
LATER_ARM = {
    "full_epochs": int,
    "budget": dict,
    "sampler": str,
    "chosen_by": str,
    "target": NUMBER,
    "margin": NUMBER,
    "training": dict,
    "epochs": int,
    "no_winner": str,
}  # what not every arm has
PUBLISHED = {"epochs": int, "test_loss": NUMBER}
TRIAL = {"values": dict, "run": str}
CHOSEN = {"values": dict, "validation_loss": MAYBE, "at_edge": list}
VALUE = (int, float, str)  # of a hyperparameter; a bool is an int


def checked_result(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """A result, read from the file at `path`, whose fields are as they should be; UserError where they are not."""
    check(path, result, RESULT)
    check(path, result, _there(result, LATER))
    check(path, result.get("joules", {}), dict.fromkeys(result.get("joules", {}), NUMBER))
    if result["test"] is not None:
        check(path, result["test"], TEST)
        check(path, result["test"], _there(result["test"], LATER_TEST))
    if result["status"] not in ("finished", "diverged", "failed") or (result["status"] == "diverged") != (
        result["diverged_at"] is not None
    ):
        raise damaged(path, f"its status is {result['status']!r} and it diverged at {result['diverged_at']!r}")
    return result


def read_study(path: Path) -> dict[str, Any]:
    """The checked record of a study."""
    study = read_json(path) or {}
    if study.get("schema") != SCHEMA:
        raise UserError(
            f"{path} was written by another version of forwardgrad (schema {study.get('schema')!r}, this one reads {SCHEMA}): "
            "use that version, or choose a new output folder with --out"
        )
    if check(path, study, {**STUDY, **_there(study, LATER_STUDY)})["name"] != path.stem:
        raise damaged(path, f"it holds the study {study['name']!r}")
    for arm in study["arms"]:
        _check_arm(path, arm)
    return study


def _check_arm(path: Path, arm: Any) -> None:
    check(path, arm, ARM)
    check(path, arm, _there(arm, LATER_ARM))
    if arm["published"] is not None:
        check(path, arm["published"], PUBLISHED)
    chosen = check(path, arm["chosen"], CHOSEN)
    values = [chosen["values"], *(check(path, trial, TRIAL)["values"] for trial in arm["trials"])]
    spaces = arm["space"].values()
    listed = [value for point in values for value in point.values()] + [value for space in spaces for value in _flat(space)]
    alike = all(len({isinstance(value, str) for value in space}) == 1 for space in spaces if isinstance(space, list))
    if not alike or not all(isinstance(value, VALUE) and not is_huge(value) for value in listed):
        raise damaged(path, f"the values tried by {arm['name']!r} are no numbers or words")
    named = [*arm["runs"], *(trial["run"] for trial in arm["trials"])]
    if not all(isinstance(name, str) and IDENTITY.fullmatch(name) for name in named):
        raise damaged(path, f"{arm['name']!r} has runs that are none")
    if not all(isinstance(name, str) for name in chosen["at_edge"]):
        raise damaged(path, f"{arm['name']!r} has edges that are none")


def _there(value: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Those of the fields that an object has."""
    return {name: kind for name, kind in fields.items() if name in value}


def _flat(space: Any) -> Iterator[Any]:
    """The values of a grid, or the bounds of a space that is none, or the choices in it."""
    if isinstance(space, dict):
        for value in space.values():
            yield from value if isinstance(value, list) else [value]
    else:
        yield from space if isinstance(space, list) else [None]
