from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from tests.support.loops import DRAWN, EXACT, Rows, adapted, bert, close, moved, net, nothing_saved, same, texts, trained_by_name, weights
from torch import nn
from torch.utils.data import DataLoader

import forwardgrad as fg
from forwardgrad.integrations import ForwardAccelerator


@pytest.fixture(autouse=True)
def _no_state() -> Iterator[None]:
    """accelerate keeps its settings for the whole process, and so do Trainers of other tests."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def trained(accelerator: Accelerator, model: nn.Module, data: Any, epochs: range = range(1), folder: Path | None = None) -> list[float]:
    """The loop of accelerate's documentation: it leaves a state in the folder, and goes on from it where it does not begin with epoch 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    prepared, optimizer, loader, schedule = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=4), schedule)
    if epochs.start:
        accelerator.load_state(folder)
    losses = []
    for batch in (batch for _ in epochs for batch in loader):
        with accelerator.accumulate(prepared):
            if isinstance(accelerator, ForwardAccelerator):
                loss = accelerator.estimate_grad_(lambda model, batch=batch: model(**batch)["loss"], prepared).loss
            else:
                loss = prepared(**batch)["loss"]
                accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 0.05)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    if folder:
        accelerator.save_state(folder)
    return losses


def test_a_gradient_without_noise_trains_as_the_accelerator_itself() -> None:
    found, wanted = net(), net()
    losses = trained(ForwardAccelerator(estimator=EXACT, gradient_accumulation_steps=3), found, Rows())
    assert losses == pytest.approx(trained(Accelerator(gradient_accumulation_steps=3), wanted, Rows()), rel=1e-9)
    close(weights(found), weights(wanted))


def test_backpropagation_has_the_accelerators_bits_in_bfloat16() -> None:
    found, wanted = bert(dropout=0.0), bert(dropout=0.0)
    one = trained(ForwardAccelerator(estimator=fg.Backprop(), mixed_precision="bf16"), found.train(), texts())
    assert one == trained(Accelerator(mixed_precision="bf16"), wanted.train(), texts())
    assert same(weights(found), weights(wanted))


def test_only_adapters_move_and_nothing_is_saved_for_a_backward_pass() -> None:
    model = adapted()
    before = weights(model)
    with nothing_saved():
        trained(ForwardAccelerator(estimator=fg.ForwardGradient(perturb=fg.LowRank())), model.train(), texts())
    assert moved(model, before) == trained_by_name(model)


def test_batch_norm_counts_a_batch_once() -> None:
    model = net(norm=True)
    trained(ForwardAccelerator(estimator=DRAWN, gradient_accumulation_steps=2), model, Rows())
    assert model.norm.num_batches_tracked == 6


@pytest.mark.parametrize("estimator", [DRAWN, fg.ZerothOrder()], ids=["forward", "zeroth order"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(estimator: fg.Estimator, tmp_path: Path) -> None:
    def accelerator() -> ForwardAccelerator:
        return ForwardAccelerator(estimator=estimator, gradient_accumulation_steps=2, mixed_precision="bf16", seed=5)

    whole, half, resumed = (bert().train() for _ in range(3))
    torch.manual_seed(7)
    trained(accelerator(), whole, texts(), range(2))
    torch.manual_seed(7)
    trained(accelerator(), half, texts(), range(1), tmp_path)
    torch.manual_seed(8)
    trained(accelerator(), resumed, texts(), range(1, 2), tmp_path)
    assert same(weights(resumed), weights(whole))


def test_what_only_a_backward_pass_can_do_is_refused() -> None:
    accelerator = ForwardAccelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="train in bfloat16"):
        accelerator.estimate_grad_(lambda model: model(torch.ones(1, 4)).sum(), net())
    accelerator.scaler = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(accelerator), "parallelism_config", SimpleNamespace(non_data_parallel_size=2))
        with pytest.raises(ValueError, match="leave parallelism_config out"):
            accelerator.estimate_grad_(lambda model: model(torch.ones(1, 4)).sum(), net())
    accelerator.state.distributed_type = type(accelerator.distributed_type).DEEPSPEED
    with pytest.raises(ValueError, match="under DEEPSPEED"):
        accelerator.estimate_grad_(lambda model: model(torch.ones(1, 4)).sum(), net())
