"""The tally of a step's memory, checked against the operating system.

The same step runs in a process of its own, and the system tells the most memory that the process held. There, every tensor of 64 kB or
more is a piece of memory that goes back to the system when it is freed. So the peak of the resident memory follows the tensors alive. It
also sees what the tally cannot: scratch inside kernels, and pages that the allocator keeps. Linux only.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from forwardgrad.diagnostics import peak_bytes
from forwardgrad.lab.bench.allocations import allocated_bytes
from forwardgrad.lab.bench.arms import NAMED, ArmStep, BenchArm, chosen_arms
from forwardgrad.lab.bench.cases import BenchCase, BuiltCase, build_case
from forwardgrad.lab.errors import UserError

_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}  # of glibc
TOLERANCE = (0.05, 1_000_000)
"""How far tally and peak may lie apart and still agree: a twentieth of the tally, and 1 MB for pages that are not tensors."""


def tally(step: ArmStep, built: BuiltCase) -> int:
    """The most bytes that a step holds above parameters, input and the optimizer's memory.

    They are its tensors, the gradients, and what the estimator keeps from step to step. Compiled code on the processor allocates outside
    torch's operators, and a loss in parts inside one of them: there they are what torch's allocator gave out.
    """
    step.forget_gradients()
    if (step.arm.engine == "compile" or built.case.loss == "parts") and built.inputs.device.type == "cpu":
        return allocated_bytes(step) + step.state_bytes
    return peak_bytes(step, [built.inputs.device]) + step.state_bytes


def within_tolerance(counted: int, process: int) -> bool:
    share, fixed = TOLERANCE
    return abs(counted - process) <= share * counted + fixed


def process_peak(case: BenchCase, arm: BenchArm, asked_by: str = "--verify-memory", *, few_steps: bool = False) -> dict[str, int]:
    """The tally and the process's peak of one step, both in bytes. The fresh process has as many threads as this one.

    `few_steps`: no more of them than needed, where each takes minutes; the tally is then what torch's allocator gave out.

    Raises UserError where the system does not tell, or the process failed.
    """
    law = getattr(arm.estimator, "law", None) if arm.name in NAMED else None  # an estimator written out has its own
    asked = {"case": dataclasses.asdict(case), "arm": arm.name, "law": law and law.name, "threads": torch.get_num_threads()}
    asked["few_steps"] = few_steps
    command = [sys.executable, "-m", "forwardgrad.lab.bench.process_peak"]
    done = subprocess.run(command, input=json.dumps(asked), env={**os.environ, **_ALLOCATOR}, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"{asked_by}: the process that measures {arm.name} on {case.model} failed: {last}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measured(case: BenchCase, arm: BenchArm, few_steps: bool) -> dict[str, int]:
    torch.manual_seed(0)
    built = build_case(case, torch.device("cpu"))
    step = ArmStep(arm, built)
    if not few_steps or arm.learns_in_first_step:
        step.begin()
    if not few_steps:
        step()
    counted = 0 if few_steps else tally(step, built)
    step.forget_gradients()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = _resident("VmRSS")
    step()
    peak = _resident("VmHWM") - before
    if few_steps:  # behind the step that the system watches: what a profile notes down stays resident
        step.forget_gradients()
        counted = allocated_bytes(step) + step.state_bytes
    return {"tally": counted, "process": peak + step.state_bytes}


def _resident(which: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {which}")


def main() -> None:
    asked: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    (arm,) = [arm for arm in chosen_arms(asked["arm"], asked["law"]) if arm.name == asked["arm"]]
    print(json.dumps(_measured(BenchCase(**asked["case"]), arm, asked["few_steps"])))


if __name__ == "__main__":
    main()
