"""A pipeline of processes trains as one process does, sends nothing backward, goes on from checkpoints, and says what is wrong."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.support.cases import seeded
from tests.support.pipelines import CASES, CLASSES, METHOD, alone, batches, made, pipeline, said, smoothed, train
from tests.support.processes import in_processes
from torch import Tensor, nn

import forwardgrad as fg


def counted(sent: dict[str, int]) -> Callable[..., Any]:
    send, me = dist.isend, dist.get_rank()

    def isend(tensor: Tensor, dst: int, *rest: Any) -> Any:
        way = "forward" if dst == me + 1 else "elsewhere"
        sent[way] = sent.get(way, 0) + 1
        return send(tensor, dst, *rest)

    return isend


def refused(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("a pipeline sends by isend alone")


def trained(rank: int) -> Any:
    found, sent, count = {}, dict[str, int](), dist.get_world_size()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "isend", counted(sent))
        for name in ("send", "broadcast", "all_reduce", "reduce", "all_gather", "gather", "scatter", "barrier", "all_gather_object"):
            patch.setattr(dist, name, refused)
        for name, optimizer, dtype in CASES:
            state: dict[str, Tensor] = {}
            step = pipeline(stage := fg.split_stages(made(name, dtype), count)[rank], optimizer, state=state)
            records = train(step, name, dtype, passes=3)
            stage.eval()
            out = step.forward(batches(name, dtype)[0][0] if rank == 0 else None)
            step.wait()
            found[name, optimizer] = {
                "stage": dict(stage.state_dict()),
                "state": {key: t for key, t in state.items() if key.startswith("head")},
                "losses": [record.loss for record in records if record is not None],
                "out": [] if out is None else [out],
            }
    return {"found": found, "sent": sent}


def check_against_one_process(ranks: list[Any]) -> None:
    for name, optimizer, dtype in CASES:
        found = [rank["found"][name, optimizer] for rank in ranks]
        model, state, losses = alone(name, optimizer, dtype)
        close = {"rtol": 1e-9, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close({k: t for one in found for k, t in one["stage"].items()}, dict(model.state_dict()), **close)
        heads = renumbered([one["state"] for one in found])
        torch.testing.assert_close(heads, {key: t for key, t in state.items() if key.startswith("head")}, **close)
        torch.testing.assert_close(found[-1]["losses"], losses, **close)
        assert not any(one["losses"] or one["out"] for one in found[:-1])
        with torch.no_grad():
            torch.testing.assert_close(found[-1]["out"], [model.eval()(batches(name, dtype)[0][0])], **close)
        before = made(name, dtype).state_dict()
        assert all(not torch.equal(t, before[key]) for key, t in model.state_dict().items())


def renumbered(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The classifiers of all ranks, as they are numbered in the whole model."""
    found, before = dict[str, Tensor](), 0
    for state in states:
        numbers = {int(key.split(".")[1]) for key in state}
        for key, tensor in state.items():
            head, number, rest = key.split(".", 2)
            found[f"{head}.{int(number) + before}.{rest}"] = tensor
        before += len(numbers)
    return found


def check_directions(ranks: list[Any]) -> None:
    """Three tensors a step and two an evaluation, to the next rank; nothing else."""
    steps = 3 * len(batches("perceptron", torch.float64))
    for rank in ranks[:-1]:
        assert rank["sent"] == {"forward": len(CASES) * (3 * steps + 2)}
    assert ranks[-1]["sent"] == {}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What two processes find out, by what they do."""
    ranks = in_processes(2, tmp_path_factory.mktemp("processes"), two)
    return {what: [rank[what] for rank in ranks] for what in ranks[0]}


def two(rank: int) -> Any:
    return {
        "trained": trained(rank),
        "resumed": resumed(rank),
        "cut wrongly": cut_wrongly(rank),
        "formats": formats(rank),
        "deeper": deeper(rank),
    }


def test_two_processes_train_as_one_and_send_nothing_backward(both: dict[str, list[Any]]) -> None:
    check_against_one_process(both["trained"])
    check_directions(both["trained"])


@pytest.mark.full
def test_four_processes_train_as_one_and_send_nothing_backward(tmp_path: Path) -> None:
    ranks = in_processes(4, tmp_path, trained)
    check_against_one_process(ranks)
    check_directions(ranks)


def resumed(rank: int) -> Any:
    """Three steps, a checkpoint, and three more: by the same objects, and by others that begin elsewhere and load it."""
    name, dtype, ends = "convolutional", torch.float32, []
    first = pipeline(fg.split_stages(made(name, dtype), 2)[rank], "adam")
    train(first, name, dtype, passes=1)
    stored = io.BytesIO()
    torch.save(first.state_dict(), stored)
    second = pipeline(fg.split_stages(made(name, dtype, seed=1), 2)[rank], "adam", generator=seeded(9))
    train(second, name, dtype, passes=2)
    second.load_state_dict(torch.load(io.BytesIO(stored.getvalue()), weights_only=True))
    for step in (first, second):
        train(step, name, dtype, passes=1)
        step.wait()
        ends.append(step.state_dict())
    other = {**ends[0], "rank": 1 - rank}
    return {"ends": ends, "said": said(lambda: first.load_state_dict(other))}


def test_a_pipeline_goes_on_from_checkpoints_to_the_same_bits(both: dict[str, list[Any]]) -> None:
    for rank, found in enumerate(both["resumed"]):
        one, other = found["ends"]
        assert one["steps"] == other["steps"] == 6
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert f"the checkpoint is of rank {1 - rank} of 2, and this is rank {rank} of 2" in found["said"]


def deeper(rank: int) -> Any:
    """Blocks of two layers, each of which ends in its stage; and one that ends in no layer of the first stage."""
    name, dtype, found = "perceptron", torch.float64, dict[str, Any]()
    stage, state = fg.split_stages(made(name, dtype), 2, at=(4,))[rank], dict[str, Tensor]()
    method = fg.LocalLosses(feedback=True, ends=("2.weight", "4.weight"), head_rate=0.02)
    step = pipeline(stage, "adam", method=method, state=state)
    records = train(step, name, dtype, passes=60)
    step.wait()
    found["losses"] = [record.loss for record in records if record is not None]
    found["state"], found["stage"] = state, dict(stage.state_dict())
    if rank == 0:
        elsewhere = pipeline(stage, method=fg.LocalLosses(feedback=True, ends=("0.weight", "4.weight")))
        found["said"] = said(lambda: elsewhere(*batches(name, dtype)[0]))
    else:
        pipeline(stage)
    return found


def test_blocks_of_several_layers_learn_in_their_stage(both: dict[str, list[Any]]) -> None:
    first, second = both["deeper"]
    before = made("perceptron", torch.float64).state_dict()
    assert all(not torch.equal(t, before[key]) for found in (first, second) for key, t in found["stage"].items())
    assert {key for key in first["state"] if key.startswith("feedback")} == {"feedback.0.model.0.weight"}
    assert not any(key.startswith("head.1") for found in (first, second) for key in found["state"])
    assert sum(second["losses"][-9:]) < 0.9 * sum(second["losses"][:9])
    assert "2.weight, 2.bias: behind the last block" in first["said"]


def formats(rank: int) -> Any:
    """Evaluations of batches whose sizes change, come again, and are more than have tags of their own; the second rank is behind."""
    sizes = [4, 4, 2, 4, 2, 2, 7, *range(1, 20), 4, 19, 2]
    step = pipeline(nn.Linear(6, 6) if rank == 0 else nn.Identity(), optimizer="none")
    generator, found = seeded(3), []
    for size in sizes:
        x = torch.randn(size, 6, generator=generator)
        found.append(step.forward(x) if rank == 0 else step.forward())
        if rank == 0:
            found[-1] = step.stage(x).detach()
    step.wait()
    return found


def test_messages_of_all_shapes_arrive_in_their_order(both: dict[str, list[Any]]) -> None:
    sent, came = both["formats"]
    assert len(came) == 29
    assert all(map(torch.equal, sent, came))


def cut_wrongly(rank: int) -> Any:
    """What is wrong with stages that were cut by hand, in the words of the rank that finds it."""
    linear, relu, last = nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, CLASSES)
    cuts: dict[str, tuple[nn.Module, nn.Module]] = {
        "in front of a ReLU": (nn.Sequential(linear), nn.Sequential(relu, last)),
        "behind a norm": (nn.Sequential(linear, relu, nn.LayerNorm(4)), nn.Sequential(last)),
        "other classes": (nn.Sequential(linear, relu), nn.Sequential(nn.Linear(4, 5))),
        "no examples first": (nn.Sequential(linear, relu, nn.Flatten(0), nn.Unflatten(0, (4, -1))), nn.Sequential(last)),
        "well": (nn.Sequential(linear, relu), nn.Sequential(last)),
        "in a block that is used twice": (nn.Sequential(linear, relu), nn.Sequential(Twice(), last)),
    }
    found = {}
    for what, stages in cuts.items():
        step = pipeline(stages[rank])
        if what in ("behind a norm", "no examples first") and rank:
            continue  # the first rank finds out, and sends nothing
        found[what] = said(lambda step=step: step(*batches("perceptron", torch.float32)[0]) if step.rank == 0 else step())
        step.wait()
    found["with a batch"] = said(lambda: step(*batches("perceptron", torch.float32)[0])) if rank else ""
    found["out of step"] = said(lambda: step.forward(torch.ones(8, 6)) if step.rank == 0 else step())
    return found


class Twice(nn.Module):
    """Begins with a ReLU beside which its input goes on: no block of the layer in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x.relu())


def test_stages_that_were_cut_wrongly_are_refused(both: dict[str, list[Any]]) -> None:
    first, second = both["cut wrongly"]
    assert "rank 1 begins with relu, which belongs to the block" in second["in front of a ReLU"]
    assert "2.weight, 2.bias: behind the last block" in first["behind a norm"]
    assert "shape (8, 5) for 8 examples of 3 classes" in second["other classes"]
    assert "the 8 examples of its batch along dimension 0, and not shape (4, 8)" in first["no examples first"]
    for found in (first, second):
        assert found["well"] == found["in a block that is used twice"] == ""
    assert "rank 1 of the pipeline gets its batches from rank 0" in second["with a batch"]
    assert "rank 1 of the pipeline is at step after 1 steps, and rank 0 at forward after 1" in second["out of step"]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_one_process_is_a_pipeline_of_one_stage() -> None:
    name, dtype = "perceptron", torch.float64
    step = pipeline(model := made(name, dtype))
    records = train(step, name, dtype, passes=3)
    other, _, losses = alone(name, "sgd", dtype)
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()))
    torch.testing.assert_close([record.loss for record in records], losses)


@pytest.mark.usefixtures("group")
def test_what_a_pipeline_cannot_do_is_refused() -> None:
    def made_with(estimator: Any = METHOD, classes: Any = CLASSES) -> fg.PipelineStep:
        model = made("perceptron", torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return fg.PipelineStep(smoothed, model, optimizer, estimator, classes=classes, generator=seeded())

    for estimator in (fg.Backprop(), fg.ForwardGradient(), fg.LearnedFeedback(), fg.ZerothOrder()):
        with pytest.raises(ValueError, match=r"use LocalLosses\(feedback=True\), not .*would have to be sent backward"):
            made_with(estimator)
    with pytest.raises(ValueError, match=r"use LocalLosses\(feedback=True\), not .*one pass through the whole model"):
        made_with(fg.LocalLosses())
    with pytest.raises(ValueError, match="classes must be a whole number of at least 2"):
        made_with(classes=1)
    step = made_with()
    for wrong in ((), (torch.ones(4, 6),), (torch.ones(4, 6), torch.ones(4)), (torch.ones(0, 6), torch.ones(0).long())):
        with pytest.raises(ValueError, match=r"needs a batch|one or more examples with one class index each"):
            step(*wrong)
    with pytest.raises(ValueError, match="needs a batch"):
        step.forward()


def test_a_pipeline_needs_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="start the script by torchrun"):
        pipeline(made("perceptron", torch.float32))


@pytest.mark.full
def test_the_example_trains() -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "examples/pipeline.py"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
    assert float(done.stdout.split(": ")[-1].partition("%")[0]) > 95
