"""What every test shares: one thread, no window, reproducible examples, and the folder with MNIST and CIFAR-10."""

from __future__ import annotations

import functools
import gc
import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer.main
from filelock import FileLock
from hypothesis import HealthCheck, settings

os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(1)
settings.register_profile("reproducible", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("reproducible")

ROOT = Path(__file__).resolve().parents[1]


MEMORY, ROOM = Path("/dev/shm"), 8 << 30  # a folder in memory, and the bytes that have to be free there for tests to use it
EACH = 1
"""How many cases of a product each value of each parameter is met in by `make test`; a test may ask for others, `product(each=2)`."""
MORE = 2  # times as many are met by `make test` and `make test-full` together; `make test-all` takes all of them


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", help="I/N: of what is chosen, the I-th of N parts; the cases of a test stay together")


def pytest_configure() -> None:
    """The many small files of tests are written to memory where there is room: to make and remove them takes most of the time of some."""
    if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test marked `product` a part that meets every value of every parameter stays in `make test`; others are `full`, or `rest`.

    Of one marked `some(n)` n cases stay, always the same; the others are `full`.
    """
    part, parts = map(int, config.getoption("--part").split("/"))
    chosen = [int(_digest(item.nodeid.partition("[")[0]), 16) % parts == part % parts for item in items]
    config.hook.pytest_deselected(items=[item for item, taken in zip(items, chosen, strict=True) if not taken])
    items[:] = [item for item, taken in zip(items, chosen, strict=True) if taken]
    met: Counter[tuple[str, ...]] = Counter()
    for item in sorted(items, key=lambda item: _digest(item.nodeid)):
        if (product := item.get_closest_marker("product")) and isinstance(item, pytest.Function):
            each = product.kwargs.get("each", EACH)
            values = [(item.nodeid.partition("[")[0], name, _named(value)) for name, value in item.callspec.params.items()]
            if all(met[value] >= each for value in values):
                item.add_marker("rest" if all(met[value] >= MORE * each for value in values) else "full")
            met.update(values)
        if (some := item.get_closest_marker("some")) and not (item.get_closest_marker("full") or item.get_closest_marker("rest")):
            test = (item.nodeid.partition("[")[0],)
            if met[test] >= some.args[0]:
                item.add_marker("full")
            met.update([test])


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _named(value: object) -> str:
    """The same in every process: no address in memory."""
    return str(getattr(value, "__name__", value)).partition(" at 0x")[0]


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> None:
    """Times and peaks are measured after a collection of garbage, which need not look through all tests and modules there are each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What torch's compiler makes is not shared with other workers, nor with earlier runs that may have been killed while they wrote it."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="session", autouse=True)
def untried_instructions() -> None:
    """The compiler takes the processor at its word, where it would build and start ten programs to find out what it can do."""
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


@pytest.fixture(scope="session", autouse=True)
def no_compiler_processes() -> None:
    """A worker has one core: more processes of torch's compiler, which each load torch, would only wait for it."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def no_waits_for_the_disk() -> Iterator[None]:
    """No power is cut but in tests of that, which count and undo writes themselves; each wait takes milliseconds, and there are many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_seeds_for_absent_devices() -> Iterator[None]:
    """`torch.manual_seed` keeps a call for each kind of device that there is none of, with the text of the whole stack: milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        for device in (torch.cuda, torch.xpu, torch.mtia):
            if not device.is_available():
                patch.setattr(device, "manual_seed_all", lambda seed: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_command_line() -> Iterator[None]:
    """The commands and their options are put together once, not at every call of the command line, most of which do little else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with MNIST and CIFAR-10: FORWARDGRAD_DATA, or unpacked once a session from shared/data beside the checkout."""
    if given := os.environ.get("FORWARDGRAD_DATA"):
        return Path(given)
    unpack = ROOT.parent / "shared" / "data" / "unpack.py"
    if not unpack.exists():
        pytest.skip("no MNIST and CIFAR-10 here: run `forwardgrad data fetch` and set FORWARDGRAD_DATA to its folder")
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent  # the workers' common folder
    folder = session / "data"
    with FileLock(session / "data.lock"):  # the first worker writes the files, the others find them there
        subprocess.run([sys.executable, unpack, folder], check=True, stdout=subprocess.DEVNULL)
    return folder
