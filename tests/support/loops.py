"""A tiny model, its data and a tiny BERT, for the loops of other frameworks."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import forwardgrad as fg

EXACT = fg.ForwardGradient(tangents=27, law=fg.Orthogonal())  # as many as `Net` has weights: it gives backpropagation's gradient
DRAWN = fg.ForwardGradient(tangents=2, control_variate=0.5)  # draws, and remembers


class Net(nn.Module):
    """4 × 3 + 3 + 3 × 4 weights, in float64."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(4, 3), nn.Linear(3, 4, bias=False)
        self.norm = nn.BatchNorm1d(3, affine=False) if norm else nn.Identity()
        self.calls = 0
        self.double()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        self.calls += 1
        out = self.output(torch.tanh(self.norm(self.hidden(x))))
        return out if labels is None else {"loss": nn.functional.cross_entropy(out, labels), "logits": out}


def net(norm: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(norm)


class Rows(Dataset[dict[str, Tensor]]):
    """24 examples."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(24, 4, dtype=torch.float64, generator=generator)
        self.labels = torch.randint(4, (24,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.labels[index]}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def bert(dropout: float = 0.1, **options: Any) -> Any:
    """A BERT of one layer that sorts texts into three classes."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **options,
    )
    return BertForSequenceClassification(config)


def adapted() -> Any:
    """The same with adapters of rank 2, and what of it moves."""
    from peft import LoraConfig, TaskType, get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft asks transformers for it
        return get_peft_model(bert(), LoraConfig(TaskType.SEQ_CLS, r=2, target_modules=["query", "value"]))


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def trained_by_name(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def nothing_saved() -> AbstractContextManager[Any]:
    """Inside, to save a tensor for a backward pass is an error."""

    def refuse(tensor: Tensor) -> Any:
        raise AssertionError(f"a tensor of shape {tuple(tensor.shape)} was saved for a backward pass")

    return torch.autograd.graph.saved_tensors_hooks(refuse, lambda kept: kept)


def texts(count: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, 40, (count, 6), generator=generator)
    labels = torch.randint(3, (count,), generator=generator)
    return [{"input_ids": t, "attention_mask": torch.ones_like(t), "labels": y} for t, y in zip(tokens, labels, strict=True)]
