"""What a model makes of batches: the loss that is trained, what it says, and how good that is over a whole set."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forwardgrad.lab.data import need
from forwardgrad.lab.finetuning.asked import FineTuning
from forwardgrad.lab.finetuning.model_folder import ModelFolder
from forwardgrad.lab.finetuning.rows import Row
from forwardgrad.lab.finetuning.tokens import IGNORED, Examples, PaddedBatch, batch_of
from forwardgrad.lab.training import computing

Judge = Callable[[list[str], list[Row]], float]
TextLoss = Callable[[nn.Module, PaddedBatch], Tensor]


@dataclass(frozen=True)
class TextTask:
    """The model's task, with all that its loss needs besides the model and the batch."""

    asked: FineTuning
    source: ModelFolder
    on: torch.device
    most: int  # tokens of a row

    def batch(self, examples: Examples, which: list[int]) -> PaddedBatch:
        """Some of the examples as the loss of this run takes them."""
        return batch_of(examples, which, self.source, self.most, self.on, left=self.generates)

    @property
    def generates(self) -> bool:
        """Whether the model is scored by the texts that it goes on with."""
        return self.asked.score is not None and self.source.task == "causal-lm"

    def outputs(self, model: nn.Module, batch: PaddedBatch) -> Tensor:
        """The model's outputs in no less than float32."""
        with computing(self.asked.precision, self.on):
            logits: Tensor = model(**batch.inputs).logits
        return logits if logits.dtype == torch.float64 else logits.float()

    def loss(self, model: nn.Module, batch: PaddedBatch) -> Tensor:
        """Cross-entropy: the mean over the rows of a classifier, over the tokens that count of a language model."""
        outputs = self.outputs(model, batch)
        if self.source.task == "classification":
            return F.cross_entropy(outputs, batch.targets)
        return F.cross_entropy(outputs[:, :-1].flatten(0, 1), batch.targets[:, 1:].flatten(), ignore_index=IGNORED)

    def negated(self, judge: Judge) -> TextLoss:
        """The score of what the model says, negated: a loss that has no derivative."""

        def loss(model: nn.Module, batch: PaddedBatch) -> Tensor:
            return torch.tensor(-judge(self.said(model, batch), batch.rows), dtype=torch.float64, device=self.on)

        return loss

    def said(self, model: nn.Module, batch: PaddedBatch) -> list[str]:
        """The label of each row, or the text that the model goes on with."""
        if self.source.task == "classification":
            return [self.source.classes[i] for i in self.outputs(model, batch).argmax(1).tolist()]
        tokenizer, generate = self.source.tokenizer, getattr(model, "generate", None)
        assert generate is not None
        options = {"max_new_tokens": self.asked.max_new_tokens, "do_sample": False, "use_cache": True}
        with computing(self.asked.precision, self.on):
            tokens = generate(**batch.inputs, **options, pad_token_id=tokenizer.pad_token_id)
        texts: list[str] = tokenizer.batch_decode(tokens[:, batch.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return texts


@torch.no_grad()
def evaluate(model: nn.Module, task: TextTask, examples: Examples, judge: Judge | None) -> dict[str, float]:
    """How good the model is on a whole set, dropout off: its loss and what its task is judged by, and the score where there is one.

    Rows of like lengths share a batch, so that little of it is padding.
    """
    training = model.training
    model.eval()
    try:
        batches = examples.longest
        size = task.asked.batch_size
        parts = [batches[start : start + size] for start in range(0, len(batches), size)]
        if task.generates:
            assert judge is not None
            texts = dict(zip(batches, [text for part in parts for text in task.said(model, task.batch(examples, part))], strict=True))
            return {"score": judge([texts[i] for i in range(len(examples))], examples.rows)}
        if task.source.task == "causal-lm":
            return _of_tokens(model, task, examples, parts)
        return _of_labels(model, task, examples, parts, judge)
    finally:
        model.train(training)


def _of_tokens(model: nn.Module, task: TextTask, examples: Examples, parts: list[list[int]]) -> dict[str, float]:
    total = right = 0.0
    count = 0
    for part in parts:
        batch = task.batch(examples, part)
        outputs, targets = task.outputs(model, batch)[:, :-1].flatten(0, 1), batch.targets[:, 1:].flatten()
        total += float(F.cross_entropy(outputs.double(), targets, ignore_index=IGNORED, reduction="sum"))
        right += float((outputs.argmax(1) == targets).sum())
        count += int((targets != IGNORED).sum())
    loss = total / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": right / count}


def _of_labels(model: nn.Module, task: TextTask, examples: Examples, parts: list[list[int]], judge: Judge | None) -> dict[str, float]:
    losses, predicted = [0.0] * len(examples), [0] * len(examples)
    for part in parts:
        batch = task.batch(examples, part)
        outputs = task.outputs(model, batch)
        each = F.cross_entropy(outputs.double(), batch.targets, reduction="none").tolist()
        for i, loss, best in zip(part, each, outputs.argmax(1).tolist(), strict=True):
            losses[i], predicted[i] = loss, best
    found = {"loss": sum(losses) / len(losses), **quality_of_labels(examples.classes or [], predicted)}
    if judge is not None:
        found["score"] = judge([task.source.classes[i] for i in predicted], examples.rows)
    return found


def quality_of_labels(truth: list[int], predicted: list[int]) -> dict[str, float]:
    """The share that is right; the mean over the classes there are of the share of each; and the mean of the classes' F1.

    >>> quality_of_labels([0, 0, 0, 1], [0, 0, 0, 0])["balanced_accuracy"]
    0.5
    """
    metrics: Any = need("sklearn.metrics")
    there = sorted(set(truth))
    return {
        "accuracy": float(metrics.accuracy_score(truth, predicted)),
        "balanced_accuracy": float(metrics.recall_score(truth, predicted, labels=there, average="macro", zero_division=0)),
        "macro_f1": float(metrics.f1_score(truth, predicted, average="macro", zero_division=0)),
    }
