"""Joules beside seconds, where the machine tells them: RAPL's counters of processor packages, NVML's of a GPU.

Nothing is computed from a power that a data sheet names: where no counter can be read there is no meter. A counter counts all that its
package or GPU does, idle power included. What shares one cannot be told apart. So a caller measures what it runs alone, and a meter notices
what other programs do meanwhile.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

POWERCAP = Path("/sys/class/powercap")
STAT = Path("/proc/stat")
OTHERS = 0.1  # of the processor time of this process: above that the machine was shared
Joules = dict[str, float]  # of the processor packages, "cpu", and of the GPU, "gpu"


@dataclass(frozen=True)
class EnergyCounter:
    """One counter: whose energy it counts, how it is read, and the joules after which it begins again at zero."""

    where: str
    read: Callable[[], float]
    most: float = math.inf

    def between(self, before: float, after: float) -> float:
        """The joules from one reading to a later one, between which it began anew at most once."""
        return after - before if after >= before else after - before + self.most


class EnergyReading(NamedTuple):
    """All counters at one moment, and the seconds that the processors had worked by then: for all programs, and for this process."""

    joules: list[float]
    busy: float
    own: float


class EnergyMeter:
    """Counters that are read together; none of them where the machine does not tell.

    `shared` says whether other programs worked as well in the stretches measured so far: more than OTHERS of what this process did.
    """

    def __init__(self, counters: Sequence[EnergyCounter] = (), times: Callable[[], tuple[float, float]] | None = None) -> None:
        self._counters = tuple(counters)
        self._times = times or (lambda: (0.0, 0.0))
        self._busy = self._own = 0.0

    @property
    def shared(self) -> bool:
        return self._busy - self._own > OTHERS * self._own + 0.02  # the system counts hundredths of a second

    @property
    def tells(self) -> bool:
        """Whether there is anything to be read."""
        return bool(self._counters)

    def read(self) -> EnergyReading | None:
        """All counters now; None where there are none, or one of them cannot be read any more."""
        if not self._counters:
            return None
        try:
            return EnergyReading([counter.read() for counter in self._counters], *self._times())
        except (OSError, ValueError):
            return None

    def since(self, before: EnergyReading | None) -> Joules | None:
        """What was used since a reading; None where either reading is lost."""
        now = self.read()
        if before is None or now is None:
            return None
        found: Joules = {}
        self._busy += now.busy - before.busy
        self._own += now.own - before.own
        for counter, first, last in zip(self._counters, before.joules, now.joules, strict=True):
            found[counter.where] = found.get(counter.where, 0.0) + counter.between(first, last)
        return found if all(map(math.isfinite, found.values())) else None


def energy_meter(on: torch.device, powercap: Path = POWERCAP) -> EnergyMeter:
    """The meter for work on a device: of all processor packages and, where the device is a GPU, of that.

    It has no counters where the device itself does not tell: the part that matters would be missing.

    A process may run on any package, so their sum is read. NVML is asked where `nvidia-ml-py` is installed.
    """
    counters = package_counters(powercap)
    if on.type == "cuda":
        counters += gpu_counter(str(torch.cuda.get_device_properties(on).uuid))
        if not any(counter.where == "gpu" for counter in counters):
            counters = []
    return EnergyMeter(counters, processor_times)


def processor_times(stat: Path = STAT) -> tuple[float, float]:
    """The seconds that all processors have worked for all programs, and for this process and its threads."""
    user, nice, system, _, _, *rest = map(int, stat.read_text(encoding="ascii").splitlines()[0].split()[1:])
    return (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK"), time.process_time()  # rest: interrupts, and stolen time


def package_counters(root: Path) -> list[EnergyCounter]:
    """A counter for every processor package below `root`, none where one of them cannot be read: a part of the sum would mislead.

    Linux lists AMD's packages under Intel's name. What lies below a package (cores, memory) has a second colon in its name, the whole
    platform is called psys, and a second way to the same package is called intel-rapl-mmio: none of them counts again.
    """
    found = []
    try:
        for zone in sorted(root.glob("intel-rapl:*")):
            if zone.name.count(":") == 1 and _words(zone / "name").startswith("package"):
                counter = EnergyCounter("cpu", _microjoules(zone / "energy_uj"), int(_words(zone / "max_energy_range_uj")) / 1e6)
                counter.read()
                found.append(counter)
    except (OSError, ValueError):
        return []
    return found


def _words(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()


def _microjoules(path: Path) -> Callable[[], float]:
    return lambda: int(_words(path)) / 1e6


def gpu_counter(uuid: str, nvml: Any = None) -> list[EnergyCounter]:
    """The counter of the GPU of this id, as a list of one; empty where NVML is not installed or does not tell."""
    try:
        nvml = import_module("pynvml") if nvml is None else nvml
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except ImportError:
        return []
    except Exception as error:  # NVMLError, which can only be named where the package is there
        if type(error).__name__.startswith("NVMLError"):
            return []
        raise
    return [EnergyCounter("gpu", _millijoules(nvml, handle))]


def _millijoules(nvml: Any, handle: Any) -> Callable[[], float]:
    def read() -> float:
        try:
            if _users(nvml, handle) > 1:
                raise OSError("other programs work on this GPU as well")
            return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
        except nvml.NVMLError as error:
            raise OSError(str(error)) from error

    return read


def _users(nvml: Any, handle: Any) -> int:
    """How many processes compute on a GPU; 0 where it does not tell."""
    try:
        return len(nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    except nvml.NVMLError:
        return 0


def add_joules(total: Joules | None, more: Joules | None) -> Joules | None:
    """The sum of two amounts; None where one is not known, since a part of the whole would mislead.

    >>> add_joules({"cpu": 2.0}, {"cpu": 1.0, "gpu": 5.0}), add_joules({}, None)
    ({'cpu': 3.0, 'gpu': 5.0}, None)
    """
    if total is None or more is None:
        return None
    return {name: total.get(name, 0.0) + more.get(name, 0.0) for name in sorted({*total, *more})}
