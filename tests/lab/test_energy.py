"""Joules from a powercap tree made by hand and from an NVML made by hand; nothing is said where either does not tell."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from forwardgrad.lab import energy
from forwardgrad.lab.bench import joules
from forwardgrad.lab.energy import EnergyCounter, EnergyMeter

CPU = torch.device("cpu")
UUID = "12345678-aaaa-bbbb-cccc-1234567890ab"


def zone(root: Path, folder: str, name: str, microjoules: int, most: int = 262_143_328_850) -> Path:
    """A zone as Linux shows it, flat in one folder whatever it lies below."""
    path = root / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{most}\n")
    return path


def test_packages_are_added_and_what_lies_below_them_is_not(tmp_path: Path) -> None:
    """Cores and memory below a package, the whole platform, and the second way to the same package each move by far more."""
    first, second = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000), zone(tmp_path, "intel-rapl:1", "package-1", 7_000_000)
    others = [("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "dram"), ("intel-rapl:2", "psys"), ("intel-rapl-mmio:0", "package-0")]
    for folder, name in others:
        zone(tmp_path, folder, name, 0)
    (tmp_path / "intel-rapl").mkdir()
    meter = energy.energy_meter(CPU, tmp_path)
    assert meter.tells
    before = meter.read()
    assert before is not None
    assert before.joules == [5.0, 7.0]
    (first / "energy_uj").write_text("6500000\n")
    (second / "energy_uj").write_text("7250000\n")
    for folder, _ in others:
        (tmp_path / folder / "energy_uj").write_text("900000000\n")
    assert meter.since(before) == {"cpu": pytest.approx(1.75)}


def test_a_counter_that_began_anew_goes_on_from_its_range(tmp_path: Path) -> None:
    """AMD's range is a quarter of Intel's, and the kernel names the zones alike."""
    path = zone(tmp_path, "intel-rapl:0", "package-0", 65_532_000_000, most=65_532_610_987)
    meter = energy.energy_meter(CPU, tmp_path)
    before = meter.read()
    (path / "energy_uj").write_text("1389013\n")
    assert meter.since(before) == {"cpu": pytest.approx(0.610987 + 1.389013)}


@pytest.mark.parametrize("broken", ["energy_uj", "max_energy_range_uj", "name"])
def test_one_package_that_cannot_be_read_leaves_nothing_said(tmp_path: Path, broken: str) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    path = zone(tmp_path, "intel-rapl:1", "package-1", 1) / broken
    path.unlink()
    path.mkdir()  # unreadable for root, too
    meter = energy.energy_meter(CPU, tmp_path)
    assert (meter.tells, meter.read()) == (False, None)


def test_a_counter_that_is_for_root_alone_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, *_: object, **__: object) -> str:
        raise PermissionError(f"only root may read {path}")

    path = zone(tmp_path, "intel-rapl:0", "package-0", 1) / "energy_uj"
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *args, **kwargs: (refused if self == path else read)(self, *args, **kwargs))
    assert not energy.energy_meter(CPU, tmp_path).tells


def test_no_tree_and_a_counter_that_goes_away(tmp_path: Path) -> None:
    assert not energy.energy_meter(CPU, tmp_path / "nowhere").tells
    path = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    meter = energy.energy_meter(CPU, tmp_path)
    before = meter.read()
    (path / "energy_uj").write_text("no number\n")
    assert (meter.read(), meter.since(before)) == (None, None)


class NVMLError(Exception):
    """As the package's own."""


class Nvml:
    """NVML with one GPU, whose counter is in millijoules."""

    NVMLError = NVMLError

    def __init__(self, *, tells: bool = True) -> None:
        self.tells, self.millijoules, self.begun, self.users = tells, 4_000_000, False, 1

    def nvmlInit(self) -> None:
        self.begun = True

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if not self.begun or uuid != f"GPU-{UUID}":
            raise NVMLError("not found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self.tells:
            raise NVMLError("not supported")
        return self.millijoules

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[int]:
        if not self.users:
            raise NVMLError("no permission")
        return list(range(self.users))


def test_the_gpu_is_found_by_its_id_and_its_millijoules_are_joules() -> None:
    nvml = Nvml()
    meter = EnergyMeter(energy.gpu_counter(UUID, nvml))
    before = meter.read()
    nvml.millijoules += 2_500
    assert meter.since(before) == {"gpu": pytest.approx(2.5)}
    nvml.users = 0  # it does not say how many
    assert meter.since(before) == {"gpu": pytest.approx(2.5)}
    nvml.users = 2
    assert meter.since(before) is None
    nvml.users, nvml.tells = 1, False
    assert meter.since(before) is None


@pytest.mark.parametrize(("nvml", "uuid"), [(Nvml(tells=False), UUID), (Nvml(), "another")])
def test_a_gpu_that_does_not_tell_has_no_counter(nvml: Any, uuid: str) -> None:
    assert energy.gpu_counter(uuid, nvml) == []


def test_work_on_a_gpu_that_does_not_tell_is_not_told_by_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 3_000_000)
    told: list[EnergyCounter] = [EnergyCounter("gpu", lambda: 1.0)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda on: type("Properties", (), {"uuid": UUID}))
    monkeypatch.setattr(energy, "gpu_counter", lambda uuid: list(told))
    reading = energy.energy_meter(torch.device("cuda"), tmp_path).read()
    assert reading is not None
    assert reading.joules == [3.0, 1.0]
    told.clear()
    assert not energy.energy_meter(torch.device("cuda"), tmp_path).tells


def test_a_part_that_is_not_known_leaves_the_whole_unknown() -> None:
    assert energy.add_joules({"cpu": 1.0}, None) is energy.add_joules(None, {"cpu": 1.0}) is None
    assert energy.add_joules({}, {"cpu": 1.0}) == {"cpu": 1.0}


def test_the_joules_of_a_step_are_those_of_a_block_over_its_steps() -> None:
    """A machine that uses 3 J in every step of one arm and 12 J in every step of the other."""
    used = [0.0]
    works = {name: lambda cost=cost: used.__setitem__(0, used[0] + cost) for name, cost in (("cheap", 3.0), ("dear", 12.0))}
    meter = EnergyMeter([EnergyCounter("cpu", lambda: used[0])])
    found = joules.joules_of_steps(works, meter, seed=0, now=time.perf_counter, block=0.002)
    assert found["cheap"]["cpu"] == {"value": 3.0, "low": 3.0, "high": 3.0, "refused": None}
    assert found["dear"]["cpu"]["value"] == 12.0
    assert joules.joules_of_steps(works, EnergyMeter(), seed=0, now=time.perf_counter) == {}


@pytest.mark.parametrize(("others", "shared"), [(0.0, False), (0.5, False), (2.0, True)])
def test_what_other_programs_do_meanwhile_is_noticed(others: float, shared: bool) -> None:
    """Ten seconds of work of this process's own, and some of others, in two stretches; a pause in between does not count."""
    moments = iter([(100.0, 1.0), (105.0 + others, 6.0), (300.0, 6.0), (305.0, 11.0)])
    meter = EnergyMeter([EnergyCounter("cpu", lambda: 1.0)], lambda: next(moments))
    for _ in range(2):
        assert meter.since(meter.read()) == {"cpu": 0.0}
    assert meter.shared is shared


def test_the_times_of_the_processors_are_those_of_the_system(tmp_path: Path) -> None:
    """user, nice, system, interrupts and stolen time; not idle, waiting, nor a guest's, which is in user's already."""
    ticks = os.sysconf("SC_CLK_TCK")
    line = " ".join(str(part * ticks) for part in (1, 2, 4, 1000, 2000, 8, 16, 32, 4000, 8000))
    (tmp_path / "stat").write_text(f"cpu  {line}\ncpu0 {line}\n")
    busy, own = energy.processor_times(tmp_path / "stat")
    assert busy == 63
    assert 0 < own <= time.process_time()
    assert energy.processor_times()[0] > own  # this machine's
