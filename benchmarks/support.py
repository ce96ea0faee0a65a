"""The support table of the documentation: torch.nn's layers and functions, and models of transformers and timm under every estimator.

python benchmarks/support.py --out docs/support.md                # everything; what the store holds already is not checked again
python benchmarks/support.py --out docs/support.md --only BERT    # entries whose name has this in it; the page shows all that is stored

Entries are checked in a child process, so that one that crashes does not stop the rest. A model under one estimator has `--seconds`.
Results lie in the store (`--store`), a line an entry; those of other versions of torch, transformers or timm are checked again. Everything
runs on one thread in float64 from random weights, without a download.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import support_checks as checks
import support_models as models
import torch
from support_functions import FUNCTIONS
from support_layers import LAYERS, NOTES, build, loss_of
from support_page import page

import forwardgrad as fg

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300.0  # for a model under one estimator
Entry = tuple[str, str]
Check = Callable[..., dict[str, Any]]


def entries() -> list[Entry]:
    kinds = {"layer": LAYERS, "function": FUNCTIONS, "transformers": models.TRANSFORMERS, "timm": models.TIMM}
    return [(kind, name) for kind, names in kinds.items() for name in names]


def checked(kind: str, name: str, columns: Sequence[str] = checks.ESTIMATORS, seconds: float = SECONDS) -> dict[str, Any]:
    """What is found of an entry; of a model, under these estimators, each for so many seconds."""
    if kind in ("layer", "function"):
        make = (LAYERS if kind == "layer" else FUNCTIONS)[name]
        return asdict(checks.derived(lambda: build(make), loss_of))
    warnings.simplefilter("ignore")
    model, loss = models.of_transformers(name) if kind == "transformers" else models.of_timm(name)
    exact = checks.gradient(model, loss)
    single = checks.computes_in_single(model, loss)
    limits, cells = checks.SINGLE if single else checks.FULL, {}
    for estimator in columns:
        cells[estimator] = asdict(_cell(lambda name=estimator: checks.cell(name, model, loss, exact, limits), seconds))
    return {"class": type(model).__name__, "weights": sum(p.numel() for p in model.parameters()), "single": single, "cells": cells}


def _cell(check: Callable[[], checks.Row], seconds: float) -> checks.Row:
    """What is found of one estimator: by differences where an operator has no rule, which is then said."""
    try:
        with _limited(seconds):
            try:
                return check()
            except NotImplementedError:
                with fg.differences():
                    row = check()
                return replace(row, way=f"{row.way or f'{row.error:.0e}'} (differences)")
    except Exception as error:
        return checks.Row(False, None, "", sentence(error))


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds, and again after each further one, should something on the way have taken it for its own."""

    def late(*_: object) -> None:
        raise TimeoutError(f"it took longer than {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def in_process(left: list[Entry], seconds: float, check: Check) -> Iterator[tuple[Entry, dict[str, Any]]]:
    """Every entry with what is found, checked by a child that inherits what is imported; after one that fails, another child goes on."""
    context = multiprocessing.get_context("fork")
    while left:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_told, args=(theirs, left, check))
        child.start()
        theirs.close()
        failed = False
        while left and not failed:
            try:
                found = ours.recv() if ours.poll(seconds) else {"said": f"it took longer than {seconds:.0f} seconds"}
                failed = "cells" not in found and "ok" not in found
            except EOFError:
                child.join()
                found, failed = {"said": f"its process ended with status {child.exitcode}"}, True
            yield left.pop(0), found
        if child.is_alive() and failed:
            child.terminate()
        child.join()


def _told(pipe: Connection, left: list[Entry], check: Check) -> None:
    for entry in left:
        try:
            pipe.send(check(*entry))
        except Exception as error:
            pipe.send({"said": sentence(error)})
            return  # what it left behind is not to touch the next


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "timm"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """The last commit that changed the source, with a plus where it was changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return git("log", "-1", "--format=%h", "--", "src") + ("+" if git("status", "--porcelain", "--", "src") else "")


def stored(store: Path, now: dict[str, str]) -> dict[Entry, dict[str, Any]]:
    """What was checked under these versions."""
    lines = store.read_text(encoding="utf-8").splitlines() if store.exists() else []
    found = [json.loads(line) for line in lines]
    return {(one["kind"], one["name"]): one for one in found if one["versions"] == now}


def write(path: Path, text: str) -> None:
    """Whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f"{path.name}.{os.getpid()}.part")
    half.write_text(text, encoding="utf-8")
    half.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the page to write")
    parser.add_argument("--store", type=Path, default=ROOT / "build" / "support.jsonl", help="where results are kept")
    parser.add_argument("--only", default="", help="check entries whose name has one of these in it, with commas between")
    parser.add_argument("--kind", choices=("layer", "function", "transformers", "timm"), help="check entries of this kind alone")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="the limit of a model under one estimator")
    parser.add_argument("--again", action="store_true", help="check also what the store holds")
    parser.add_argument("--columns", help="check these estimators of models again, with commas between; the others keep what is stored")
    options = parser.parse_args()
    torch.set_num_threads(1)
    now = versions()
    have = stored(options.store, now)
    options.store.parent.mkdir(parents=True, exist_ok=True)
    columns = checks.ESTIMATORS if options.columns is None else tuple(options.columns.split(","))

    def wanted(kind: str, name: str) -> bool:
        chosen = options.kind in (None, kind) and any(part in name for part in options.only.split(","))
        return chosen and (options.again or ((kind, name) not in have) == (options.columns is None))

    left = [entry for entry in entries() if wanted(*entry)]
    checked("layer", "Linear")  # what torch imports when it is first used, the children inherit
    for kind, load in (("transformers", lambda: __import__("transformers")), ("timm", models.import_timm)):
        if now[kind] != "not installed" and any(kind == of for of, _ in left):
            load()
    began = time.perf_counter()
    check, limit = partial(checked, columns=columns, seconds=options.seconds), options.seconds * (len(columns) + 2)
    for (kind, name), found in in_process(left, limit, check):
        commits = [commit()]
        if options.columns and "cells" in found and "cells" in (before := have.get((kind, name), {})):
            found["cells"] = {**before["cells"], **found["cells"]}
            commits = list(dict.fromkeys([*before["commits"], *commits]))
        line = {"kind": kind, "name": name, "versions": now, "commits": commits, **found}
        have[kind, name] = line
        with options.store.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{kind:12} {name:45} {time.perf_counter() - began:6.1f} s  {found.get('said') or found.get('error', '')}", flush=True)
        began = time.perf_counter()
    rows = {entry: have[entry] for entry in entries() if entry in have}
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    write(options.out, page(rows, now, machine, datetime.date.today().isoformat(), NOTES))
    print(f"{options.out}: {len(rows)} entries of {len(entries())}")


if __name__ == "__main__":
    main()
