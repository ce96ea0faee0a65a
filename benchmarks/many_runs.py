"""What listing and reporting cost in a store of many runs: seconds and peak memory of each command, in a process of its own.

python benchmarks/many_runs.py                          # 20 arms × (250 final runs + 250 trials); the goal is 10 s and 1 GiB for either
python benchmarks/many_runs.py --arms 4 --runs 5 --trials 5 --steps 50 --keep STORE
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from forwardgrad.lab.store import Store, write_json, write_result
from forwardgrad.lab.store.files import write_table
from forwardgrad.lab.studies.run import SCHEMA, Optimizer, Run, to_json

KINDS = ("backprop", "forward", "local", "feedback", "zeroth-order")
ENVIRONMENT = {"forwardgrad": "0", "commit": None, "command": "made up", "python": "3", "torch": "2", "platform": "", "device": "none"}


def build(root: Path, arms: int, runs: int, trials: int, steps: int) -> Store:
    """A study of finished runs that were never trained, with losses of so many steps."""
    store, records = Store(root), []
    for arm in range(arms):
        base = Run("digits", "mlp", {"name": "forward", "tangents": arm + 1}, Optimizer("sgd", 0.01), epochs=10)
        finals = [dataclasses.replace(base, seed=seed) for seed in range(runs)]
        points = [1e-5 * 1.02**point for point in range(trials)]
        tried = [dataclasses.replace(base, seed=10_000, test=False, optimizer=Optimizer("sgd", lr)) for lr in points]
        for number, run in enumerate([*finals, *tried]):
            put(store, run, 0.1 + 0.01 * arm + 0.001 * (number % 97), steps)
        records.append(
            {
                "name": f"arm-{arm}",
                "group": f"group {arm // 4}",
                "kind": KINDS[arm % len(KINDS)],
                "label": f"arm {arm}",
                "command": "made up",
                "published": None,
                "space": {"lr": points},
                "tuning_epochs": 10,
                "trials": [{"values": {"lr": lr}, "run": run.identity} for lr, run in zip(points, tried, strict=True)],
                "chosen": {"values": {"lr": points[0]}, "validation_loss": 0.1, "at_edge": ["lr"]},
                "runs": [run.identity for run in finals],
            }
        )
    write_json(root / "studies" / "many.json", {"schema": SCHEMA, "name": "many", "title": "Many runs", "arms": records})
    return store


def put(store: Store, run: Run, end: float, steps: int) -> None:
    """One finished run whose losses fall from 2.3 to `end`."""
    folder = store.folder(run.identity)
    folder.mkdir()
    loss = [end + (2.3 - end) * math.exp(-5 * i / steps) * (1 + 0.2 * math.sin(i * i)) for i in range(steps)]
    write_json(folder / "run.json", to_json(run))
    write_json(folder / "environment.json", ENVIRONMENT)
    write_table(folder / "losses.csv.gz", ["step", "loss"], ((i + 1, f"{value:.7g}") for i, value in enumerate(loss)))
    header = ["step", "epoch", "seconds", "validation_loss", "validation_accuracy"]
    write_table(folder / "evaluations.csv", header, [[s, s / 17, s * 0.002, loss[s - 1], 0.9] for s in range(17, steps + 1, 17)])
    test = {"loss": end, "accuracy": 1 - end, "examples": 360, "last16": end, "last16_low": end / 2, "last16_high": 2 * end}
    result: dict[str, Any] = {
        "status": "finished",
        "reason": None,
        "diverged_at": None,
        "steps": steps,
        "epochs": steps / 17,
        "parameters": 1000,
        "seconds": steps * 0.002,
        "validation_loss": end,
        "validation_accuracy": 1 - end,
        "test": test if run.test else None,
    }
    write_result(folder, result)


def measured(words: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes of the command in a process of its own."""
    program = (
        "import resource, subprocess, sys; from forwardgrad.lab import cli\n"
        "try:\n    cli.main()\n"
        "finally:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(done.stderr)
    return seconds, int(done.stderr.split()[-1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=int, default=20)
    parser.add_argument("--runs", type=int, default=250, help="final runs of each arm")
    parser.add_argument("--trials", type=int, default=250, help="trials of each arm")
    parser.add_argument("--steps", type=int, default=400, help="training losses of each run")
    parser.add_argument("--keep", type=Path, help="build the store here, or take the one that is here, and leave it")
    options = parser.parse_args()
    root = options.keep or Path(tempfile.mkdtemp())
    try:
        if not (root / "studies" / "many.json").exists():
            os.fsync = lambda handle: None  # nobody will miss these runs after a power cut, and 60,000 waits for the disk take long
            build(root, options.arms, options.runs, options.trials, options.steps)
        count = len(Store(root, create=False).runs())
        print(f"{count:,} runs of {options.steps} steps, {os.cpu_count()} cores")
        for words in (["list", str(root)], ["list", str(root), "--csv", str(root / "runs.csv")], ["report", str(root)]):
            seconds, peak = measured(words)
            name = f"{words[0]}{' --csv' if '--csv' in words else ''}"
            print(f"{name:12} {seconds:6.1f} s  {peak / 2**20:6.0f} MiB")
    finally:
        if not options.keep:
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
