"""Trains units on a Ray cluster: each is a task with its cores and its part of a GPU.

All nodes must see the output folder under the same path. Checkpoints are in it: a unit whose node is lost goes on from there on another
one. Ray is imported where it is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.execution.place import Place
from forwardgrad.lab.execution.unit import GpuLost, Reply, Unit, WorkerDied, reason_of, train_unit
from forwardgrad.lab.store import Store

OBJECT_STORE = 100 * 2**20  # bytes of an instance that is started here: what tasks pass is small
CANCEL_SECONDS = 2.0
REACH_SECONDS = 10.0
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}  # the second: no advice on the next version


class Cluster:
    """A Ray cluster that was joined, or an instance on this machine that ends with this object."""

    def __init__(self, place: Place) -> None:
        data_dir = place.data_dir or (Path(given) if (given := os.environ.get("FORWARDGRAD_DATA")) else None)
        paths = {"data_dir": data_dir and data_dir.resolve(), "path": place.path and place.path.resolve()}
        self.place = dataclasses.replace(place, threads=place.share, **paths)  # type: ignore[arg-type]
        self._running: dict[Any, Unit] = {}
        self._tokens: dict[Path, Path] = {}  # of each store, the file that shows a node that it sees the store
        self._ray = _ray()
        self._ours = not self._ray.is_initialized()
        if self._ours:
            _join(self._ray, self.place)
        if not self._fit():
            self.close()
            need = f"{place.share * place.ranks} cores" + (f" and {place.gpu_share:g} of a GPU" if place.gpu_share else "")
            raise UserError(f"no node of the Ray cluster has what a run needs, {need}: ask for less with --threads, --jobs or --gpus")

    @property
    def room(self) -> int:
        """One unit more than fits now. It makes a cluster grow that can, and begins without a pause when another ends."""
        return self._fit() + 1

    def expect(self, units: int) -> None:
        """Ray starts and ends processes itself."""

    def _fit(self) -> int:
        """How many units the nodes have room for."""
        cores, gpus, count = self.place.share * self.place.ranks, self.place.gpu_share, 0
        for has in (node["Resources"] for node in self._nodes()):
            fit = int(has.get("CPU", 0) // cores)
            count += min(fit, int(has.get("GPU", 0) / gpus)) if gpus else fit
        return count

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def start(self, unit: Unit, store: Store, ranks: int | None) -> None:
        root, place = store.root.resolve(), self.place.with_ranks(ranks)
        if root not in self._tokens:
            self._show(root)
        cores = place.share * place.ranks
        needs = {"num_cpus": cores, "num_gpus": place.gpu_share, "max_retries": 0}  # who counts tries is `execute`
        task = self._ray.remote(_task).options(**needs, name="forwardgrad")
        self._running[task.remote(unit, root, self._tokens[root], place, sys.argv)] = unit

    def _show(self, root: Path) -> None:
        """Leave a token in a store, and let every node look for it."""
        from ray.exceptions import NodeDiedError, TaskUnschedulableError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        handle, name = tempfile.mkstemp(dir=root, prefix=".shared-")
        os.close(handle)
        self._tokens[root] = token = Path(name)
        look = self._ray.remote(_sees)
        for node in self._nodes():
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            seen = look.options(num_cpus=0, scheduling_strategy=where).remote(token)
            with contextlib.suppress(NodeDiedError, TaskUnschedulableError):  # it is gone already
                if not self._ray.get(seen):
                    raise UserError(_unseen(node["NodeManagerAddress"], root))

    def finished(self, seconds: float) -> Iterator[tuple[Unit, Reply]]:
        """The units that came back, waiting for one so long."""
        from ray import exceptions

        done = self._ray.wait(list(self._running), timeout=seconds)[0] if self._running else []
        for reference in done:
            unit = self._running.pop(reference)
            try:
                yield unit, self._ray.get(reference)
            except exceptions.NodeDiedError:
                yield unit, WorkerDied("was on a node that is gone", counts=False)
            except exceptions.OutOfMemoryError:
                yield unit, WorkerDied("was killed by Ray, because the memory of its node ran out")
            except exceptions.WorkerCrashedError:
                yield unit, WorkerDied("ended without a word, as where memory runs out")
            except exceptions.RayError as error:
                raise UserError(f"the Ray cluster cannot do what it was given ({reason_of(error)}): mend that and run it again") from error

    def cancel(self) -> None:
        """End what is under way."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        if self._running:
            self._ray.wait(list(self._running), num_returns=len(self._running), timeout=CANCEL_SECONDS)
        self._running.clear()

    def close(self) -> None:
        """End what is under way, and an instance that was started here; leave a cluster that was joined."""
        self.cancel()
        for token in self._tokens.values():
            token.unlink(missing_ok=True)
        self._tokens.clear()
        if self._ours:
            self._ray.shutdown()


def _ray() -> Any:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise UserError("--executor ray needs Ray, which is not installed: pip install 'forwardgrad[ray]'") from error
    return ray


def _join(ray: Any, place: Place) -> None:
    """Join the cluster at the place's address, or start an instance on this machine; quietly."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if place.address is None:
        instance = {"num_cpus": place.jobs * place.share * place.ranks, "object_store_memory": OBJECT_STORE, "include_dashboard": False}
        ray.init(address="local", **instance, **options)
    else:
        try:
            _reach(place.address)
            ray.init(address=place.address, **options)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            told = f"cannot join a Ray cluster at {place.address!r} ({reason_of(error)})"
            raise UserError(f"{told}: start one with `ray start --head`, or leave --address out") from error
    with contextlib.suppress(AttributeError):  # what it prints of every worker that died is ours to say, and not on the output
        ray._private.worker._worker_logs_enabled = False


def _reach(address: str) -> None:
    """Ray itself would try for minutes whether there is anything at HOST:PORT."""
    host, colon, port = address.rpartition(":")
    if colon and "://" not in address:
        socket.create_connection((host, int(port)), REACH_SECONDS).close()


def _sees(token: Path) -> bool:
    return token.exists()


def _unseen(node: str, root: Path) -> str:
    return f"the node {node} of the Ray cluster does not see the output folder {root}: choose with --out a folder that all nodes share"


def _task(unit: Unit, root: Path, token: Path, place: Place, words: list[str]) -> Reply:
    """What a node does with a unit; it may have joined after the others were asked."""
    sys.argv = words  # what environment.json says of the command
    if not token.exists():
        return UserError(_unseen(os.uname().nodename, root))
    reply = train_unit(unit, Store(root, create=False), place)
    if isinstance(reply, GpuLost):
        os._exit(1)  # the result is stored: whoever takes the unit up again finds it
    return reply
