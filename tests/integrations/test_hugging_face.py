from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.loops import DRAWN, EXACT, Rows, adapted, bert, close, moved, net, nothing_saved, same, texts, trained_by_name, weights
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

import forwardgrad as fg
from forwardgrad.integrations import ForwardTrainer


def arguments(folder: Path, kind: type[TrainingArguments] = TrainingArguments, **options: Any) -> TrainingArguments:
    return kind(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 0.05,
            "optim": "adamw_torch",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        }
    )


def trained(trainer: Trainer, **options: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    trainer.train(**options)
    return weights(trainer.model), trainer.state.log_history[:-1]


SETTINGS = [
    {},
    {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 4},  # six batches: the last step has two
]


@pytest.mark.parametrize("options", SETTINGS, ids=["plain", "accumulated, clipped, scheduled", "a last step of fewer batches"])
def test_a_gradient_without_noise_trains_as_the_trainer_itself(options: dict[str, Any], tmp_path: Path) -> None:
    found, log = trained(ForwardTrainer(net(), arguments(tmp_path, **options), train_dataset=Rows(), estimator=EXACT))
    wanted, other = trained(Trainer(net(), arguments(tmp_path, **options), train_dataset=Rows()))
    close(found, wanted)
    for one, two in zip(log, other, strict=True):
        assert one == pytest.approx(two, rel=1e-5)  # the loss, its norm, the learning rate: rounded when they are logged


def test_backpropagation_has_the_trainers_bits_on_a_bert(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1, "bf16": True}
    found = trained(ForwardTrainer(bert(), arguments(tmp_path, **options), train_dataset=texts(), estimator=fg.Backprop()))
    wanted = trained(Trainer(bert(), arguments(tmp_path, **options), train_dataset=texts()))
    assert same(found[0], wanted[0])
    assert found[1] == wanted[1]


@pytest.mark.parametrize("estimator", [DRAWN, fg.ZerothOrder()], ids=["forward", "zeroth order"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(estimator: fg.Estimator, tmp_path: Path) -> None:
    options = {"save_steps": 2, "save_strategy": "steps", "gradient_accumulation_steps": 2, "bf16": True}

    def trainer() -> ForwardTrainer:
        return ForwardTrainer(bert(), arguments(tmp_path, **options), train_dataset=texts(), estimator=estimator)

    whole, _ = trained(trainer())
    resumed, _ = trained(trainer(), resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(resumed, whole)
    (tmp_path / "checkpoint-2" / "forwardgrad.pt").unlink()
    assert not same(trained(trainer(), resume_from_checkpoint=str(tmp_path / "checkpoint-2"))[0], whole)  # it is what made the difference


def test_only_adapters_move_and_nothing_is_saved_for_a_backward_pass(tmp_path: Path) -> None:
    model = adapted()
    before = weights(model)
    options, estimator = {"save_strategy": "steps", "save_steps": 2}, fg.ForwardGradient(perturb=fg.LowRank())
    with nothing_saved():
        after, _ = trained(ForwardTrainer(model, arguments(tmp_path, **options), train_dataset=texts(), estimator=estimator))
    assert moved(model, before) == trained_by_name(model)
    assert any("lora_A" in name for name in trained_by_name(model))
    again = ForwardTrainer(adapted(), arguments(tmp_path, **options), train_dataset=texts(), estimator=estimator)
    assert same(trained(again, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))[0], after)


@pytest.mark.parametrize("estimator", [DRAWN, fg.ZerothOrder()], ids=["forward", "zeroth order"])
def test_batch_norm_counts_a_batch_once(estimator: fg.Estimator, tmp_path: Path) -> None:
    options = {"learning_rate": 0.0, "gradient_accumulation_steps": 2}
    found, _ = trained(ForwardTrainer(net(norm=True), arguments(tmp_path, **options), train_dataset=Rows(), estimator=estimator))
    wanted, _ = trained(Trainer(net(norm=True), arguments(tmp_path, **options), train_dataset=Rows()))
    assert found["norm.num_batches_tracked"] == 8
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)  # differences of zeroth order leave ε² in the statistics


def test_a_loss_is_logged_without_a_pass_of_its_own(tmp_path: Path) -> None:
    options = {"learning_rate": 0.0, "gradient_accumulation_steps": 2}
    models = {steps: net() for steps in (2, 4)}
    for steps, model in models.items():
        args = arguments(tmp_path, **options, max_steps=steps)
        _, log = trained(ForwardTrainer(model, args, train_dataset=Rows(), estimator=fg.ForwardGradient(tangents=3)))
    _, wanted = trained(Trainer(net(), arguments(tmp_path, **options), train_dataset=Rows()))
    assert [line["loss"] for line in log] == pytest.approx([line["loss"] for line in wanted], rel=1e-5)
    assert models[4].calls - models[2].calls == 4  # one pass a batch, once the ways of forward mode were compared


class Smoothed:
    """What a Trainer of one's own does with the loss."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        out = model(**inputs)
        loss = nn.functional.cross_entropy(out, labels, label_smoothing=0.2)
        return (loss, {"loss": loss, "logits": out}) if return_outputs else loss


class Theirs(Smoothed, Seq2SeqTrainer):
    pass


class Ours(ForwardTrainer, Theirs):
    pass


def test_it_makes_a_forward_trainer_of_others(tmp_path: Path) -> None:
    args = arguments(tmp_path, Seq2SeqTrainingArguments)
    found, _ = trained(Ours(net(), args, train_dataset=Rows(), estimator=EXACT))
    wanted, _ = trained(Theirs(net(), args, train_dataset=Rows()))
    close(found, wanted)


def test_evaluation_is_the_trainers(tmp_path: Path) -> None:
    model = bert()
    options = {"eval_strategy": "steps", "eval_steps": 2}
    trainer = ForwardTrainer(model, arguments(tmp_path, **options), train_dataset=texts(), eval_dataset=texts(8))
    _, log = trained(trainer)
    losses = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert len(losses) == 2
    batch = {name: torch.stack([one[name] for one in texts(8)]) for name in texts(1)[0]}
    with torch.no_grad():
        assert losses[-1] == pytest.approx(float(model.eval()(**batch).loss), rel=1e-5)
    assert not any(p.grad is not None for p in model.parameters())


def test_float16_is_refused(tmp_path: Path) -> None:
    trainer = ForwardTrainer(net(), arguments(tmp_path), train_dataset=Rows())
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="train in bfloat16"):
        trainer.train()


class Twice(Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        super().training_step(*args, **kwargs)
        return super().training_step(*args, **kwargs)


class OursTwice(ForwardTrainer, Twice):
    pass


def test_a_trainer_with_several_backward_passes_is_told(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="OursTwice makes 2 backward passes in a step"):
        OursTwice(net(), arguments(tmp_path), train_dataset=Rows()).train()
