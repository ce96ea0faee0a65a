"""What ranks say where they are not alike, or one of them is not there any more; and what goes over the wire."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.cases import seeded
from tests.support.processes import in_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import forwardgrad as fg
from forwardgrad.ranks.digest import digest

NAP = 8  # seconds


def network(seed: int = 0, width: int = 5) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def said(call: Callable[[], object]) -> str:
    try:
        call()
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def stepper(model: nn.Module, group: Any, method: fg.Estimator | None = None, seed: int = 0) -> Callable[[], object]:
    chosen = fg.ForwardGradient() if method is None else method
    step = fg.TrainingStep(loss, model, torch.optim.SGD(model.parameters(), lr=0.1), chosen, generator=seeded(seed), group=group)
    x = torch.randn(6, 4, generator=seeded(1))
    return lambda: step(x)


def drifted(rank: int) -> str:
    model = network()
    take = stepper(model, fg.Distributed(check_every=4))
    for number in range(1, 5):
        take()
        if number == 2 and rank == 1:
            with torch.no_grad():
                model[0].bias[0] += 1e-7
    return said(take)


def wide() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 200), nn.ReLU(), nn.Linear(200, 200))


def late(rank: int) -> str:
    """A difference in the last steps, which no hundred is full of."""
    model, group = network(), fg.Distributed()
    take = stepper(model, group)
    for number in range(1, 4):
        take()
        if number == 3 and rank == 1:
            with torch.no_grad():
                model[0].bias[0] += 1e-7
    return said(lambda: group.compare(model))


def compared(rank: int) -> str:
    model, group = network(), fg.Distributed(check_every=2)
    take = stepper(model, group)

    def some() -> None:
        for _ in range(3):
            take()
            group.compare(model)

    return said(some)


def again(rank: int) -> list[str]:
    """A start that was refused is looked at anew."""
    group = fg.Distributed()
    take = stepper(network(rank), group)
    return [said(take), said(take)]


def unfinished(rank: int) -> str:
    """What a rank says that goes on after an error of its own."""
    group = fg.Distributed(check_every=None)

    def broken(model: nn.Module, x: Tensor) -> Tensor:
        raise ValueError("no loss today")

    step = fg.TrainingStep(
        broken, model := network(), torch.optim.SGD(model.parameters()), fg.ForwardGradient(), generator=seeded(), group=group
    )
    first = said(lambda: step(torch.ones(2, 4)))
    return f"{first} {said(lambda: step(torch.ones(2, 4)))}"


def payload(rank: int, method: fg.Estimator) -> int:
    """The bytes of a step, without those of the comparison at the start."""
    group = fg.Distributed(check_every=None)
    take = stepper(wide(), group, method)
    take()
    before = group.sent
    take()
    return group.sent - before


def two(rank: int) -> dict[str, Any]:
    group, pairs = fg.Distributed(), fg.Distributed(directions=2)
    shared = network(rank)
    group.broadcast(shared)
    first = group.sent
    group.broadcast(shared)
    sent = [first, group.sent - first, sum(t.numel() * t.itemsize for t in shared.state_dict().values())]
    empty = partial(fg.estimate_grad_, lambda m: m(torch.ones(0, 4)).sum(), network(), generator=seeded(), group=group)
    found = {
        "parameters": said(stepper(network(rank), group)),
        "generators": said(stepper(network(), group, seed=rank)),
        "estimators": said(stepper(network(), group, fg.ForwardGradient(1 + rank))),
        "broadcast": sent,
        "shared": said(stepper(shared, group)),
        "drifted": drifted(rank),
        "late": late(rank),
        "compared": compared(rank),
        "again": again(rank)[1],
        "unfinished": unfinished(rank),
        "uneven": said(stepper(network(), pairs, fg.ForwardGradient(3))),
        "split": said(stepper(network(), fg.Distributed(directions=2), fg.ForwardGradient(2, perturb=fg.SplitWeights(2)))),
        "whole": said(stepper(network(), pairs, fg.LearnedFeedback())),
        "wrapped": said(stepper(DistributedDataParallel(network()), group)),
        "empty": said(empty),
        "divisor": said(lambda: fg.Distributed(directions=3)),
        "count": said(lambda: fg.Distributed(directions=0)),
        "often": said(lambda: fg.Distributed(check_every=0)),
        "seconds": said(lambda: fg.Distributed(timeout=0)),
        "group": said(partial(stepper, network(), torch.distributed.group.WORLD)),
        "bytes, dense": payload(rank, fg.ForwardGradient(8)),
        "bytes, low rank": payload(rank, fg.ForwardGradient(8, perturb=fg.LowRank())),
        "bytes, zeroth order": payload(rank, fg.ZerothOrder(tangents=8, perturb=fg.LowRank())),
        "bytes, backpropagation": payload(rank, fg.Backprop()),
        "bytes, by example": payload(rank, fg.ForwardGradient(perturb=fg.PerExample())),
    }
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return in_processes(2, tmp_path_factory.mktemp("ranks"), two, limit=600)


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("parameters", "RuntimeError: the parameters of rank 1 are not those of rank 0 at the start: build the model from the same seed"),
        ("generators", "RuntimeError: the generators of rank 1 are not those of rank 0 at the start: seed them alike"),
        ("estimators", "RuntimeError: the estimators of rank 1 are not those of rank 0 at the start: give every rank the same"),
        ("drifted", "RuntimeError: the parameters of rank 1 are not those of rank 0 after step 2 of these processes: let all ranks"),
        ("late", "RuntimeError: the parameters of rank 1 are not those of rank 0 after step 3 of these processes"),
        ("again", "RuntimeError: the parameters of rank 1 are not those of rank 0 at the start: build the model from the same seed"),
        ("unfinished", "ValueError: no loss today RuntimeError: a step that rank "),
        ("uneven", "ValueError: 2 ranks divide the directions of a batch, and 3 cannot be divided by that: take a multiple of 2"),
        ("split", "ValueError: ranks cannot divide the directions of SplitWeights("),
        ("whole", "ValueError: LearnedFeedback("),
        ("wrapped", "RuntimeError: a group averages by itself: pass the module that DistributedDataParallel wraps (model.module)"),
        ("empty", "ValueError: a batch without examples on one of several ranks"),
        ("divisor", "ValueError: directions=3 must divide the number of ranks, which is 2"),
        ("count", "ValueError: directions must be a whole number of at least 1, not 0"),
        ("often", "ValueError: check_every must be a whole number of at least 1, not 0"),
        ("seconds", "ValueError: timeout must be a number of seconds above 0, or None, not 0"),
        ("group", "TypeError: group must be a forwardgrad.Distributed()"),
    ],
)
def test_every_rank_says_what_is_wrong(both: list[Any], case: str, sentence: str) -> None:
    assert [one[case][: len(sentence)] for one in both] == [sentence, sentence]


def test_a_model_that_was_broadcast_trains(both: list[Any]) -> None:
    assert [one["shared"] for one in both] == ["", ""]


def test_parameters_are_sent_where_they_differ(both: list[Any]) -> None:
    digest = 8
    (first, again, whole), (other, _, _) = (one["broadcast"] for one in both)
    assert (first, other, again) == (digest + whole, digest, digest)


def test_equal_ranks_may_be_compared_at_any_time(both: list[Any]) -> None:
    assert [one["compared"] for one in both] == ["", ""]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_digest_tells_changes_that_make_up_for_one_another(dtype: torch.dtype) -> None:
    numbers = torch.randn(70_001, generator=seeded()).to(dtype)
    other = numbers.clone()
    other[[3, 60_000]] = numbers[[60_000, 3]]
    digests = {int(digest([tensor])) for tensor in (numbers, other, numbers.flip(0), numbers[:-1])}
    assert len(digests) == 4
    assert int(digest([numbers.clone()])) == int(digest([numbers]))
    assert int(digest([numbers[1:]])) == int(digest([numbers[1:].clone()]))  # wherever it lies in memory


@pytest.mark.parametrize("method", ["dense", "low rank", "zeroth order"])
def test_a_step_sends_its_derivatives_and_its_loss(both: list[Any], method: str) -> None:
    assert [one[f"bytes, {method}"] for one in both] == [4 * 9, 4 * 9]


def test_a_gradient_is_sent_whole_or_as_the_factors_of_its_examples(both: list[Any]) -> None:
    first, bias, matrix, other = (p.numel() for p in wide().parameters())
    forms, six_examples = 4, 6 * (200 + 200)
    assert both[0]["bytes, backpropagation"] == 4 * (forms + first + bias + matrix + other + 1)  # a loss, and no derivative
    assert both[0]["bytes, by example"] == 4 * (forms + first + bias + six_examples + other + 2)


def gone(folder: Path, rank: int) -> str:
    take = stepper(network(), fg.Distributed())
    take()
    return "" if rank else said(take)


def asleep(folder: Path, rank: int) -> str:
    take = stepper(network(), fg.Distributed(timeout=2))
    take()
    if rank:
        time.sleep(NAP)
        return "awake before the other gave up" if not (folder / "gave up").exists() else ""
    sentence = said(take)
    (folder / "gave up").touch()
    return sentence


@pytest.mark.full
@pytest.mark.parametrize("work", [gone, asleep])
def test_a_rank_that_is_gone_or_asleep_ends_the_others_with_a_sentence(tmp_path: Path, work: Callable[[Path, int], str]) -> None:
    sentence, other = in_processes(2, tmp_path, partial(work, tmp_path))
    assert sentence.startswith("RankGone: rank 0 of 2 waited in vain for another rank: that process has ended, or was busy for longer")
    assert not other


def test_without_processes_there_is_no_group() -> None:
    with pytest.raises(RuntimeError, match="start the script with torchrun"):
        fg.Distributed()
