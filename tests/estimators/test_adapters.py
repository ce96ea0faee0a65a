"""Adapters beside frozen weights: only they move and get a gradient, and tangents begin where the first of them stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import Loss, rows, seeded, trained, true_gradient
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.diagnostics import explain, peak_bytes

PERTURBATIONS = [
    fg.Dense(),
    fg.LowRank(),
    fg.LowRank(3),
    fg.Informed(weighted=False),
    fg.SplitWeights(2, fg.LowRank(), part=1),
    fg.PerExample(),
]


class LoRA(nn.Module):
    """y = W x + B A x with W frozen, as in Hu et al. (2021)."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapted() -> tuple[nn.Module, Loss]:
    torch.manual_seed(0)
    model = nn.Sequential(LoRA(5, 8, 2), nn.GELU(), nn.Linear(8, 8).requires_grad_(False), LoRA(8, 3, 2)).double()
    return model, lambda m: F.cross_entropy(m(rows(6, 5)), torch.arange(6) % 3)


def through_peft(kind: str) -> tuple[nn.Module, Loss]:
    """A transformer of two layers of width 16 with LoRA on its attention, dropout off."""
    peft = pytest.importorskip("peft", reason="adapters of peft: pip install peft transformers")
    transformers: Any = pytest.importorskip("transformers", reason="adapters of peft: pip install peft transformers")
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (3, 7), generator=seeded())
    size = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    if kind == "bert":
        config = transformers.BertConfig(**size, max_position_embeddings=16, num_labels=3, attn_implementation="eager")
        base, targets = transformers.BertForSequenceClassification(config), ["query", "value"]
    else:
        config = transformers.LlamaConfig(**size, num_key_value_heads=1, max_position_embeddings=16, attn_implementation="eager")
        base, targets = transformers.LlamaForCausalLM(config), ["q_proj", "v_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, target_modules=targets)).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)  # zeros at first, so that A would have no gradient
    if kind == "bert":
        return model, lambda m: F.cross_entropy(m(input_ids=tokens).logits, torch.arange(3))
    return model, lambda m: F.cross_entropy(m(input_ids=tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


THEIRS = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
"""What peft and transformers warn of among themselves."""
MODELS = {"torch": adapted, "bert": lambda: through_peft("bert"), "llama": lambda: through_peft("llama")}


@THEIRS
@pytest.mark.product(each=3)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("perturb", PERTURBATIONS, ids=repr)
def test_the_derivative_is_that_of_backpropagation_along_the_direction(perturb: fg.Perturbation, name: str) -> None:
    """And nothing but adapters gets a gradient."""
    model, loss = MODELS[name]()
    exact = true_gradient(model, loss)
    record = fg.estimate_grad_(loss, model, fg.ForwardGradient(perturb=perturb), generator=seeded())
    moved = {key: p for key, p in model.named_parameters() if p.grad is not None}
    assert all(p.requires_grad for p in moved.values())
    if isinstance(perturb, fg.SplitWeights):
        assert set(moved) == {key for key, part in perturb.owners(trained(model)).items() if part == 1}
    else:
        assert set(moved) == set(trained(model))
    if not isinstance(perturb, fg.PerExample):  # whose directions are as many as examples
        product = sum((exact[key] * p.grad).sum() / record.derivatives[0] for key, p in moved.items() if p.grad is not None)
        close = 1e-6 if name == "llama" else 1e-9  # its norms and rotations are computed in float32, whatever the weights are
        torch.testing.assert_close(record.derivatives[0], torch.as_tensor(product), rtol=close, atol=1e-11)


@THEIRS
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_adapters_of_peft_take_the_explicit_way(name: str) -> None:
    model, loss = MODELS[name]()
    told = explain(loss, model, fg.ForwardGradient(perturb=fg.LowRank()))
    assert told.way == "explicit"


def test_tangents_of_adapters_take_the_memory_of_one_activity() -> None:
    """Ten layers of 64 × 64 on 512 rows: an activation is 256 KiB in float64, and backpropagation keeps one a layer."""
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(10) for layer in (LoRA(64, 64, 2), nn.Tanh())]).double()
    x, activation = rows(512, 64), 512 * 64 * 8

    def loss(m: nn.Module) -> Tensor:
        return m(x).square().mean()

    def peak(method: fg.Estimator) -> float:
        step = fg.TrainingStep(loss, model, torch.optim.SGD(model.parameters(), 1e-3), method, generator=seeded())
        step()  # the path of calls is known from here on
        return peak_bytes(step, [torch.device("cpu")]) / activation

    with torch.no_grad():
        inference = peak_bytes(lambda: loss(model), [torch.device("cpu")]) / activation
    assert peak(fg.ForwardGradient(perturb=fg.LowRank())) < 2.2 * inference
    assert peak(fg.Backprop()) > 10
