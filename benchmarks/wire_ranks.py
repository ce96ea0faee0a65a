"""What a rank of `benchmarks/wire.py` does: it builds every case, then does what it is asked to, one request at a time."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from benchmarks.wire_model import Sent
from tests.support.networks import counted, enter
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import forwardgrad as fg
from forwardgrad.lab import models

DDP = "ddp"
METHODS: dict[str, fg.Estimator | None] = {
    DDP: None,
    "dense-k1": fg.ForwardGradient(),
    "dense-k8": fg.ForwardGradient(tangents=8),
    "rank1-k1": fg.ForwardGradient(perturb=fg.LowRank()),
    "dense-k8-div": fg.ForwardGradient(tangents=8),
    "rank1-k8": fg.ForwardGradient(tangents=8, perturb=fg.LowRank()),
    "zeroth-k1": fg.ZerothOrder(perturb=fg.LowRank()),
    "local": fg.LocalLosses(feedback=True),
}
DIVIDED = ("dense-k8-div",)  # every rank has the same batch, and its part of the directions
SHAPE, CLASSES, BATCHES, WARM_UP = (1, 28, 28), 10, 8, 3
PORT, PIECE = 5000, 1 << 20
COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_reduce")
TIMEOUT = timedelta(minutes=10)


class Case(NamedTuple):
    """A network, how it is trained, and the examples of each rank."""

    model: str
    method: str
    batch: int


class Place(NamedTuple):
    """Where a rank lives: its namespace, the device that is counted, and the address of each rank."""

    namespace: str
    device: str
    addresses: tuple[str, ...]


class Run(NamedTuple):
    """Seconds a step, and bytes and frames sent and received a step through the rank's device."""

    seconds: float
    sent: float
    frames_sent: float
    received: float
    frames_received: float


Take = Callable[[Tensor, Tensor], object]


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def _batches(size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Noise, since nothing is to be learned from it; the same few batches for ever."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % CLASSES
    return itertools.cycle([(torch.randn(size, *SHAPE, generator=generator), labels) for _ in range(BATCHES)])


class Rank:
    """The models of a rank, and the requests that are answered."""

    def __init__(self, rank: int, place: Place, cases: list[Case]) -> None:
        self.rank, self.place, self.wrapped = rank, place, dict[str, DistributedDataParallel]()
        self.steps = {key: self._step(*key) for key in dict.fromkeys((case.model, case.method) for case in cases)}
        self.batches = {(size, seed): _batches(size, seed) for size in {case.batch for case in cases} for seed in {0, rank}}
        for case in cases:
            for _ in range(WARM_UP):
                self._take(case)

    def _step(self, name: str, method: str) -> Take:
        torch.manual_seed(0)
        model = models.build(name, SHAPE, CLASSES)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        if (estimator := METHODS[method]) is not None:
            generator = torch.Generator().manual_seed(0)
            ranks = fg.Distributed(directions=dist.get_world_size() if method in DIVIDED else 1)
            return fg.TrainingStep(loss, model, optimizer, estimator, generator=generator, group=ranks)
        wrapped = self.wrapped[name] = DistributedDataParallel(model)

        def take(x: Tensor, y: Tensor) -> None:
            optimizer.zero_grad()
            loss(wrapped, x, y).backward()
            optimizer.step()

        return take

    def _take(self, case: Case) -> None:
        shard = 0 if case.method in DIVIDED else self.rank
        self.steps[case.model, case.method](*next(self.batches[case.batch, shard]))

    def run(self, case: Case, steps: int) -> Run:
        """So many steps, timed from when all ranks are there. What a barrier sends is counted by itself, and taken off."""
        dist.barrier()
        first = counted(self.place.device)
        dist.barrier()
        before, began = counted(self.place.device), time.perf_counter()
        for _ in range(steps):
            self._take(case)
        seconds = time.perf_counter() - began
        dist.barrier()  # what the last step has sent has arrived
        marks = zip(first, before, counted(self.place.device), strict=True)
        return Run(seconds / steps, *(((end - start) - (start - barrier)) / steps for barrier, start, end in marks))

    def payload(self, case: Case) -> list[Sent]:
        """What the rank gives to collectives in a step: DDP as it says itself, the others as they call torch.distributed."""
        if (wrapped := self.wrapped.get(case.model)) is not None and case.method == DDP:
            sizes = wrapped._get_ddp_logging_data().get("rebuilt_bucket_sizes") or wrapped._get_ddp_logging_data()["bucket_sizes"]
            return [Sent(int(size), reduced=True) for size in str(sizes).split(",")]
        found, kept = list[Sent](), {name: getattr(dist, name) for name in COLLECTIVES}

        def counting(name: str) -> Callable[..., Any]:
            def call(*given: Any, **named: Any) -> Any:
                mine = given[1] if name.startswith("all_gather") else given[0]
                found.append(Sent(mine.numel() * mine.element_size(), reduced=name == "all_reduce"))
                return kept[name](*given, **named)

            return call

        try:
            for name in kept:
                setattr(dist, name, counting(name))
            self._take(case)
        finally:
            for name, call in kept.items():
                setattr(dist, name, call)
        return found

    def gather(self, numbers: int, times: int) -> float:
        """Seconds of an all_gather of so many float32 numbers, one after the other."""
        mine = torch.zeros(numbers)
        every = [torch.zeros(numbers) for _ in range(dist.get_world_size())]
        dist.barrier()
        dist.all_gather(every, mine)
        began = time.perf_counter()
        for _ in range(times):
            dist.all_gather(every, mine)
        return (time.perf_counter() - began) / times

    def transfer(self, size: int) -> float:
        """Bytes a second of plain TCP from rank 0 to rank 1, of what a program gives and gets."""
        dist.barrier()
        if self.rank > 1:
            return 0.0
        if self.rank == 1:
            with socket.create_server((self.place.addresses[1], PORT)) as server:
                dist.send(torch.zeros(1), 0)
                connection, _ = server.accept()
                with connection:
                    got = first = len(connection.recv(PIECE))
                    began = time.perf_counter()
                    while piece := len(connection.recv(PIECE)):
                        got += piece
                    return (got - first) / (time.perf_counter() - began)
        dist.recv(torch.zeros(1), 1)
        with socket.create_connection((self.place.addresses[1], PORT)) as connection:
            connection.sendall(bytes(size))
        return 0.0


def work(rank: int, place: Place, meet: str, cases: list[Case], requests: Connection) -> None:
    """A process's whole life: on its network from the start, since threads stay on that of the thread that starts them."""
    enter(place.namespace)
    os.environ["GLOO_SOCKET_IFNAME"] = place.device
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=len(place.addresses), timeout=TIMEOUT)
    one = Rank(rank, place, cases)
    requests.send("ready")
    while (request := requests.recv()) is not None:
        name, *given = request
        requests.send(getattr(one, name)(*given))
    dist.destroy_process_group()
