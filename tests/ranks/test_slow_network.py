"""Ranks on bad links: slow, late and lossy ones change no bit, and one that goes down ends every rank with a sentence."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import seeded
from tests.support.networks import Link, Network, NoNetwork, check, network
from tests.support.processes import in_processes
from torch import Tensor, nn

import forwardgrad as fg

pytestmark = pytest.mark.full

RANKS, STEPS, BATCH, CUT_AT, TIMEOUT = 2, 20, 8, 5, 5.0
SLOW = 300  # seconds that all steps may take over a bad link, on a machine with other work
BAD = Link(rate=1, delay=0.05, loss=0.05)
METHODS: dict[str, fg.Estimator] = {
    "dense": fg.ForwardGradient(tangents=8),
    "low rank": fg.ForwardGradient(perturb=fg.LowRank()),
    "zeroth order": fg.ZerothOrder(perturb=fg.LowRank()),
    "local losses": fg.LocalLosses(feedback=True),  # sends gradients, so frames enough that some are lost
}


@pytest.fixture(scope="module", autouse=True)
def namespaces() -> None:
    try:
        check(relay=True)
    except NoNetwork as missing:
        pytest.skip(str(missing))


def made() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


class Training:
    """A model, and steps of it on this rank's examples."""

    def __init__(self, rank: int, method: str) -> None:
        self.model = made()
        optimizer, ranks = torch.optim.SGD(self.model.parameters(), lr=0.05), fg.Distributed()
        self.step = fg.TrainingStep(loss, self.model, optimizer, METHODS[method], generator=seeded(1), group=ranks)
        self.examples, self.labels = seeded(2 + rank), torch.arange(BATCH) % 3

    def take(self) -> None:
        self.step(torch.randn(BATCH, 12, generator=self.examples), self.labels)


def trained(rank: int) -> dict[str, list[Tensor]]:
    """The parameters in the end, by method."""
    found = {}
    for method in METHODS:
        training = Training(rank, method)
        for _ in range(STEPS):
            training.take()
        found[method] = [p.detach() for p in training.model.parameters()]
    return found


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tensor]]:
    """What the ranks end with on loopback."""
    first, second = in_processes(RANKS, tmp_path_factory.mktemp("near"), trained)
    assert all(bits(first[method]) == bits(second[method]) for method in METHODS)
    return first


def bits(tensors: list[Tensor]) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in tensors]


def test_a_bad_link_changes_no_bit(near: dict[str, list[Tensor]], tmp_path: Path) -> None:
    with network(RANKS, BAD) as joined:
        far = in_processes(RANKS, tmp_path, trained, limit=SLOW, namespaces=joined.machines)
    for method, ends in near.items():
        assert all(bits(one[method]) == bits(ends) for one in far), method
        assert not any(torch.equal(end, start) for end, start in zip(ends, made().parameters(), strict=True)), method


def cut_off(joined: Network, folder: Path, rank: int) -> NoReturn:
    """What a rank says after the link of the last has gone down, and after how many steps and seconds."""
    training, found = Training(rank, "dense"), {"step": STEPS, "said": "", "seconds": 0.0}
    for step in range(STEPS):
        if rank == 0 and step == CUT_AT:
            joined.cut(RANKS - 1)
        began = time.monotonic()
        try:
            training.take()
        except RuntimeError as error:
            found = {"step": step, "said": str(error), "seconds": time.monotonic() - began}
            break
    torch.save(found, folder / f"{rank}.pt")
    os._exit(0)  # taking a group apart whose link is down may end the process otherwise


@pytest.mark.parametrize("link", [Link(rate=10), BAD], ids=["10 Mbit/s", "bad"])
def test_a_link_that_goes_down_ends_every_rank_with_a_sentence(link: Link, tmp_path: Path) -> None:
    with network(RANKS, link) as joined:
        told = in_processes(RANKS, tmp_path, partial(cut_off, joined, tmp_path), timeout=TIMEOUT, namespaces=joined.machines)
    assert told[0]["step"] == CUT_AT
    assert told[1]["step"] in (CUT_AT - 1, CUT_AT)  # what rank 0 sent last may have been on its way
    for rank, one in enumerate(told):
        assert f"rank {rank} of {RANKS} waited in vain for another rank" in one["said"]
        assert one["seconds"] < 4 * TIMEOUT  # without a limit, gloo waits for half an hour
