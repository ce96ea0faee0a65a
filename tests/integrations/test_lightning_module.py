from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from tests.support.loops import DRAWN, EXACT, Rows, adapted, close, moved, net, nothing_saved, same, texts, trained_by_name, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader

import forwardgrad as fg
from forwardgrad.integrations import ForwardLightningModule

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),  # of workers and logging intervals
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning flattens with what torch now deprecates
]


class Plain(LightningModule):
    """A module as people write it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net, self.heard = net(), list[float]()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        loss = self.net(**batch)["loss"]
        self.log("loss", loss, on_step=True, on_epoch=False)
        self.log("twice", 2 * loss, on_step=True, on_epoch=False)
        return {"loss": loss, "also": loss + 1}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.heard += [float(self.trainer.callback_metrics["loss"]), float(self.trainer.callback_metrics["twice"])]
        self.heard += [outputs["loss"].item(), outputs["also"].item()]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("validated", self.training_step(batch, batch_idx)["loss"] if self.trainer.sanity_checking else self.net(**batch)["loss"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8), "interval": "step"}]


class Forward(ForwardLightningModule, Plain):
    """The same without a backward pass."""


def trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        **{
            "default_root_dir": folder,
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            **options,
        }
    )


def rows() -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Rows(), batch_size=4)


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 4, "gradient_clip_val": 0.05}],  # six batches an epoch: the last step of each has two
    ids=["plain", "accumulated and clipped"],
)
def test_a_gradient_without_noise_trains_as_the_module_itself(options: dict[str, Any], tmp_path: Path) -> None:
    found, wanted = Forward(estimator=EXACT), Plain()
    for module in (found, wanted):
        trainer(tmp_path, **options).fit(module, rows())
    close(weights(found), weights(wanted))
    assert found.heard == pytest.approx(wanted.heard, rel=1e-6)  # the loss that is logged, and what the step returned


def test_backpropagation_has_the_modules_bits_in_bfloat16(tmp_path: Path) -> None:
    found, wanted = Forward(estimator=fg.Backprop()), Plain()
    for module in (found, wanted):
        module.float()
        trainer(tmp_path, precision="bf16-mixed").fit(
            module, DataLoader([{k: v.float() if v.is_floating_point() else v for k, v in row.items()} for row in Rows()], batch_size=4)
        )
    assert same(weights(found), weights(wanted))


@pytest.mark.parametrize("estimator", [DRAWN, fg.ZerothOrder()], ids=["forward", "zeroth order"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(estimator: fg.Estimator, tmp_path: Path) -> None:
    whole = Forward(estimator=estimator, seed=3)
    trainer(tmp_path).fit(whole, rows())
    first = trainer(tmp_path, max_epochs=1)
    first.fit(Forward(estimator=estimator, seed=3), rows())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Forward(estimator=estimator, seed=4)
    trainer(tmp_path).fit(resumed, rows(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert same(weights(resumed), weights(whole))


def test_evaluation_is_lightnings(tmp_path: Path) -> None:
    module = Forward(estimator=fg.ForwardGradient(perturb=fg.Activity()))
    loop = trainer(tmp_path, num_sanity_val_steps=2)
    loop.fit(module, rows(), rows())
    data = Rows()
    with torch.no_grad():
        assert float(loop.callback_metrics["validated"]) == pytest.approx(float(module.net(data.x, data.labels)["loss"]), rel=1e-6)


def test_a_step_may_call_the_one_it_replaces(tmp_path: Path) -> None:
    class Penalised(Forward):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx)["loss"] + sum(p.square().sum() for p in self.parameters())

        on_train_batch_end = LightningModule.on_train_batch_end

    class Reference(Plain):
        training_step = Penalised.training_step.__wrapped__  # type: ignore[attr-defined]

    found = Penalised(estimator=EXACT)
    trainer(tmp_path).fit(found, rows())
    by_hand, optimizer = net(), None
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    for batch in [*rows(), *rows()]:
        optimizer.zero_grad()
        (by_hand(**batch)["loss"] + sum(p.square().sum() for p in by_hand.parameters())).backward()
        optimizer.step()
        schedule.step()
    close(weights(found.net), weights(by_hand))


def test_only_adapters_move_and_nothing_is_saved_for_a_backward_pass(tmp_path: Path) -> None:
    module = Forward(estimator=fg.ForwardGradient(perturb=fg.LowRank()))
    module.net = adapted()
    before = weights(module)
    with nothing_saved():
        trainer(tmp_path, max_epochs=1).fit(module, DataLoader(texts(), batch_size=4))
    assert moved(module, before) == trained_by_name(module)


def test_batch_norm_counts_a_batch_once(tmp_path: Path) -> None:
    module = Forward(estimator=DRAWN)
    module.net = net(norm=True)
    trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2).fit(module, rows())
    assert module.net.norm.num_batches_tracked == 6


def test_a_pass_is_all_that_a_step_of_one_direction_takes(tmp_path: Path) -> None:
    module = Forward(estimator=fg.ForwardGradient())
    trainer(tmp_path, max_epochs=1).fit(module, rows())
    before = module.net.calls
    trainer(tmp_path, max_epochs=1).fit(module, rows())
    assert module.net.calls - before == 6


def test_a_step_by_hand_is_what_it_was() -> None:
    module = Forward()
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    loss = module.training_step(next(iter(rows())), 0)["loss"]
    loss.backward()
    assert all(p.grad is not None for p in module.parameters())


def test_what_only_a_backward_pass_can_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train in bfloat16"):
        trainer(tmp_path, plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]).fit(Forward(), rows())
    module = Forward()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="manual optimization"):
        trainer(tmp_path).fit(module, rows())


class Skipping(ForwardLightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1).double()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_step_without_a_loss_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="training_step returned no loss"):
        trainer(tmp_path).fit(Skipping(), rows())
