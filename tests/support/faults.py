"""What can befall a run in a worker, by a module in a folder for `Place.path`; and what runs leave."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from forwardgrad.lab.store.run_files import read_result
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.run import Optimizer, Run

THROWS, ALWAYS_DIES, DIES_ONCE, EXHAUSTS, EXITS, FULL = 101, 102, 103, 104, 105, 106  # seeds

RUN = Run("digits", "logistic", {"name": "forward", "clip": 1.0}, Optimizer("sgd", 0.01), epochs=5)
LEAVES = dataclasses.replace(RUN, optimizer=Optimizer("sgd", 1e6))  # it diverges

MODULE = '''
import os, signal, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np

HERE = Path(__file__).parents[1]

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def kill_once(store):
    """In the middle: when there is a checkpoint to go on from."""
    while not any(store.glob("runs/*/checkpoint.pt")):
        time.sleep(0.002)
    (HERE / "killed").touch()
    kill()

def load_digits():
    seed = sys._getframe(2).f_locals["seed"]
    if seed == 101:
        raise ValueError("no such\\nluck")
    if seed == 102:
        kill()
    if seed == 103 and not (HERE / "killed").exists():
        threading.Thread(target=kill_once, args=(Path((HERE / "store").read_text()),), daemon=True).start()
    if seed == 104:
        raise MemoryError
    if seed == 105:
        sys.exit("enough")
    if seed == 106:
        raise OSError(28, "No space left on device", "some/file")
    kept = np.load(HERE / "digits.npz")
    return SimpleNamespace(images=kept["images"], target=kept["target"])
'''


def folder(path: Path, store: Store) -> Path:
    """A folder whose module takes the place of scikit-learn's digits: the same ones, and what goes wrong on the way to them."""
    (path / "sklearn").mkdir(parents=True)
    (path / "sklearn" / "__init__.py").touch()
    (path / "sklearn" / "datasets.py").write_text(MODULE)
    (path / "store").write_text(str(store.root))
    digits = load_digits()
    np.savez(path / "digits.npz", images=digits.images, target=digits.target)
    return path


def seeded(*seeds: int) -> list[Run]:
    return [dataclasses.replace(RUN, seed=seed) for seed in seeds]


def left(store: Store, run: Run) -> tuple[Any, ...]:
    """What a run has come to, to the bit: without its seconds."""
    folder = store.folder(run.identity)
    result = read_result(folder) or {}
    return {**result, "seconds": None}, *((folder / name).read_bytes() for name in ("losses.csv.gz", "walk.csv"))


def tidy(store: Store) -> None:
    """Nothing is left that nobody needs."""
    assert not [
        path for path in store.root.rglob("*") if path.name.startswith(".") or (path.suffix == ".lock" and path.name != "records.lock")
    ]
