"""Hugging Face's Trainer without a backward pass: `python examples/hf_trainer.py` teaches adapters of a small BERT a new task."""

import sys
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import forwardgrad as fg
from forwardgrad.integrations import ForwardTrainer

WORDS, LENGTH, CLASSES = 60, 8, 3


def sentences(count: int, seed: int, shift: int = 0) -> list[dict[str, torch.Tensor]]:
    """Random words, one of which says what the label is."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(CLASSES, WORDS, (count, LENGTH), generator=generator)
    said = torch.randint(CLASSES, (count,), generator=generator)
    words[torch.arange(count), torch.randint(LENGTH, (count,), generator=generator)] = said
    return [{"input_ids": one, "labels": label} for one, label in zip(words, (said + shift) % CLASSES, strict=True)]


def trainer(model: torch.nn.Module, estimator: fg.Estimator, shift: int, **options: Any) -> ForwardTrainer:
    args = TrainingArguments(per_device_train_batch_size=32, lr_scheduler_type="cosine", report_to=[], **options)
    return ForwardTrainer(
        model,
        args,
        train_dataset=sentences(3000, 1, shift),
        eval_dataset=sentences(500, 2, shift),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())},
        estimator=estimator,
    )


def main(steps: int = 100, folder: str = "hf-trainer") -> float:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, num_labels=CLASSES
    )
    model = BertForSequenceClassification(config)
    # What you would load with `from_pretrained`: a model that knows the words, here from another task and by backpropagation.
    trainer(model, fg.Backprop(), 0, output_dir=f"{folder}/base", max_steps=100, learning_rate=1e-3, save_strategy="no").train()
    adapted = get_peft_model(model, LoraConfig(TaskType.SEQ_CLS, r=4, target_modules=["query", "value", "dense"]))
    forward = fg.ForwardGradient(tangents=4, perturb=fg.Activity(), exact_output=True)
    tuning = trainer(adapted, forward, 1, output_dir=folder, max_steps=steps, learning_rate=1e-2, save_steps=50)
    before = tuning.evaluate()["eval_accuracy"]
    tuning.train(resume_from_checkpoint="--resume" in sys.argv)
    after = tuning.evaluate()["eval_accuracy"]
    print(f"{before:.1%} of the sentences are sorted right before tuning, {after:.1%} after; checkpoints lie in {folder}")
    return after


if __name__ == "__main__":
    main()
