"""Loops of other frameworks in two processes: they end where one process does with the whole batches, with the same bits in both."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from tests.integrations import test_accelerated, test_hugging_face, test_lightning_module
from tests.integrations.test_lightning_module import Forward, Plain
from tests.support.loops import DRAWN, Net, Rows, close, net, same, weights
from tests.support.processes import in_processes
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import Trainer

import forwardgrad as fg
from forwardgrad.integrations import ForwardAccelerator, ForwardStrategy, ForwardTrainer, GradientSource

pytestmark = [pytest.mark.full, *test_lightning_module.pytestmark]
EACH = 4  # examples of a process in a batch


def started_alike(rank: int) -> Net:
    """A model that only the first process begins with: it is for the framework to give it to the others."""
    model = net()
    with torch.no_grad():
        model.hidden.weight += rank
    return model


def hugging_face(folder: Path, model: Net, each: int, **options: Any) -> ForwardTrainer:
    options = {"per_device_train_batch_size": each, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "max_steps": 4} | options
    return ForwardTrainer(model, test_hugging_face.arguments(folder, **options), train_dataset=Rows(), estimator=DRAWN)


def with_trainer(rank: int, folder: Path) -> dict[str, Any]:
    """A whole run, one that goes on from its checkpoint, and Hugging Face's own Trainer after it on the same model."""
    own, model = folder / f"trainer-{rank}", started_alike(rank)
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer = hugging_face(own, model, EACH, **saving)
    whole, log = test_hugging_face.trained(trainer)
    written = sorted(path.name for path in (own / "checkpoint-2").iterdir())
    checkpoint = str(folder / "trainer-0" / "checkpoint-2")
    resumed, _ = test_hugging_face.trained(hugging_face(own, net(), EACH, **saving), resume_from_checkpoint=checkpoint)
    backward = Trainer(model, test_hugging_face.arguments(own), train_dataset=Rows())
    after, _ = test_hugging_face.trained(backward)
    return {
        "whole": whole,
        "losses": [line["loss"] for line in log],
        "written": written,
        "resumed": resumed,
        "sent": trainer.gradients.group.sent if trainer.gradients.group else 0,
        "backward": after,
    }


def lightning(folder: Path, each: int, epochs: int, **options: Any) -> Callable[..., Forward]:
    def fit(module: Forward, **fitting: Any) -> Forward:
        data = Rows()
        trainer = test_lightning_module.trainer(folder, max_epochs=epochs, accumulate_grad_batches=2, gradient_clip_val=0.05, **options)
        order = None if options else DistributedSampler(data, 1, 0)  # that of both, which Lightning shuffles
        trainer.fit(module, DataLoader(data, batch_size=each, sampler=order), **fitting)
        if epochs == 1:
            trainer.save_checkpoint(folder / f"{trainer.global_rank}.ckpt")
        return module

    return fit


def with_lightning(rank: int, folder: Path) -> dict[str, Any]:
    def module() -> Forward:
        made = Forward(estimator=DRAWN)
        made.net = started_alike(rank)
        return made

    def fit(epochs: int, **fitting: Any) -> Forward:
        return lightning(folder, EACH, epochs, devices=2, strategy=ForwardStrategy())(module(), **fitting)

    whole = fit(2)
    fit(1)
    written = [path.name for path in folder.glob("*.ckpt")]
    resumed = fit(2, ckpt_path=folder / "0.ckpt", weights_only=True)
    refused = []
    for wrong, strategy in ((module(), DDPStrategy()), (Plain(), ForwardStrategy())):
        with pytest.raises((TypeError, ValueError)) as told:
            test_lightning_module.trainer(folder, devices=2, strategy=strategy).fit(wrong, DataLoader(Rows(), batch_size=4))
        refused.append(str(told.value))
    with pytest.raises(RuntimeError) as told:  # each process has all of the data there
        test_lightning_module.trainer(folder, plugins=LightningEnvironment()).fit(module(), DataLoader(Rows(), batch_size=4))
    refused.append(str(told.value))
    twin = copy.deepcopy(whole.gradients)  # as a callback keeps one of the whole module
    assert twin.group is whole.gradients.group
    return {"whole": weights(whole.net), "written": written, "resumed": weights(resumed.net), "refused": refused}


def accelerator() -> ForwardAccelerator:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    split = DataLoaderConfiguration(split_batches=True)  # so that schedules take one step for a batch, too
    return ForwardAccelerator(cpu=True, estimator=DRAWN, gradient_accumulation_steps=2, dataloader_config=split)


def with_accelerator(rank: int, folder: Path) -> dict[str, Any]:
    whole, half, resumed = (started_alike(rank) for _ in range(3))
    losses = test_accelerated.trained(accelerator(), whole, Rows(), range(2))
    test_accelerated.trained(first := accelerator(), half, Rows(), range(1), folder)
    first.wait_for_everyone()
    test_accelerated.trained(accelerator(), resumed, Rows(), range(1, 2), folder)
    other = Accelerator(cpu=True)
    wrapped = other.prepare(whole)
    first.gradients.group = fg.Distributed(directions=2)
    with pytest.raises(ValueError, match="ranks divide the directions") as told:
        first.estimate_grad_(lambda model: model(torch.ones(1, 4).double()).sum(), half)
    return {
        "whole": weights(whole),
        "losses": losses,
        "resumed": weights(resumed),
        "wrapped": type(wrapped).__name__,
        "refused": str(told.value),
    }


def on_their_own(rank: int) -> dict[str, Tensor]:
    """Processes that each train a model of their own, as in a sweep."""
    model = started_alike(rank)
    with fg.independent_ranks():
        source = GradientSource(DRAWN)
        source.join(2)
        data = Rows()
        source.add_(lambda model: model(data.x, data.labels)["loss"], model)
    assert source.group is None
    return {"gradient": model.output.weight.grad}


def two(folder: Path, rank: int) -> dict[str, Any]:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}  # as torchrun says it
    os.environ.update({name: str(value) for name, value in here.items()})
    os.environ.update({"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"})
    warnings.simplefilter("ignore")
    with_framework = (("trainer", with_trainer), ("lightning", with_lightning), ("accelerator", with_accelerator))
    found: dict[str, Any] = {}
    for name, work in with_framework:
        (folder / name).mkdir(exist_ok=True)
        found[name] = work(rank, folder / name)
    return found | {"independent": on_their_own(rank)}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("ranks")
    return in_processes(2, folder, partial(two, folder))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What one process comes to, with batches as large as those of both."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    found["trainer"], _ = test_hugging_face.trained(hugging_face(folder, net(), 2 * EACH))
    found["lightning"] = weights(lightning(folder, 2 * EACH, 2)(Forward(estimator=DRAWN)).net)
    model = net()
    test_accelerated.trained(accelerator(), model, Rows(), range(2))
    return found | {"accelerator": weights(model)}


LOOPS = ["trainer", "lightning", "accelerator"]


@pytest.mark.parametrize("loop", LOOPS)
def test_both_end_where_one_process_does(loop: str, both: list[Any], alone: dict[str, Any]) -> None:
    assert same(both[0][loop]["whole"], both[1][loop]["whole"])
    close(both[0][loop]["whole"], alone[loop])


@pytest.mark.parametrize("loop", LOOPS)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(loop: str, both: list[Any]) -> None:
    for found in both:
        assert same(found[loop]["resumed"], found[loop]["whole"])


def test_the_loss_that_is_logged_is_that_of_both(both: list[Any]) -> None:
    assert both[0]["accelerator"]["losses"] == both[1]["accelerator"]["losses"]
    assert both[0]["trainer"]["losses"] == both[1]["trainer"]["losses"]


def test_the_first_process_writes_the_checkpoint(both: list[Any]) -> None:
    first, second = (found["trainer"]["written"] for found in both)
    assert "forwardgrad.pt" in first
    assert second == ["rng_state_1.pth"]
    assert both[0]["lightning"]["written"] == ["0.ckpt"]


def test_a_batch_costs_a_few_numbers(both: list[Any]) -> None:
    batches, numbers, size = 8, 3, 8
    digests = 24 + 8 * 3  # at the start, of the steps up to a checkpoint, and at the end
    assert both[0]["trainer"]["sent"] <= batches * numbers * size + digests + 8 * batches


def test_a_loop_with_a_backward_pass_wraps_the_model_later(both: list[Any]) -> None:
    assert same(both[0]["trainer"]["backward"], both[1]["trainer"]["backward"])
    assert both[0]["accelerator"]["wrapped"] == "DistributedDataParallel"


def test_what_would_not_be_averaged_is_refused(both: list[Any]) -> None:
    wrapping, plain, whole = both[0]["lightning"]["refused"]
    assert "estimates are not exchanged between them" in whole
    assert wrapping.startswith("DDPStrategy wraps the module for a backward pass")
    assert "it trains no Plain" in plain


def test_processes_may_train_on_their_own(both: list[Any]) -> None:
    assert not torch.equal(*(found["independent"]["gradient"] for found in both))
