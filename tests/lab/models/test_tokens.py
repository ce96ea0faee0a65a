"""Transformers over tokens: against torch's own layers in float64, what padding and the future may change, and what an adapter trains."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.lab import models
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.models.adapters import RANK, Lora, adapted, read_out
from forwardgrad.lab.models.tokens import Attention, Bert, DecoderBlock, EncoderBlock, Gpt
from forwardgrad.lab.studies import Optimizer, Run, Transformer, transformer_of

WIDTH, HEADS = 12, 3
TEXTS = torch.tensor([[7, 9, 11, 4], [5, 6, 0, 0], [8, 0, 0, 0]])


def counted(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def small(kind: str = "bert", classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    made = Bert(2, WIDTH, HEADS, classes) if kind == "bert" else Gpt(2, WIDTH, HEADS)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made.double()


def torchs_own(block: EncoderBlock | DecoderBlock) -> nn.TransformerEncoderLayer:
    """torch's layer of the same weights, which was written by others."""
    first = isinstance(block, DecoderBlock)
    gelu = (lambda x: F.gelu(x, approximate="tanh")) if first else F.gelu
    how = {"dropout": 0.0, "activation": gelu, "batch_first": True, "norm_first": first, "dtype": torch.float64}
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, layer_norm_eps=block.norm1.eps, **how)  # type: ignore[arg-type]
    attention = block.attention
    parts = [attention.query, attention.key, attention.value]
    pairs = [
        (layer.self_attn.in_proj_weight, torch.cat([part.weight for part in parts])),
        (layer.self_attn.in_proj_bias, torch.cat([part.bias for part in parts])),
    ]
    modules = [(layer.self_attn.out_proj, attention.output), (layer.linear1, block.inner), (layer.linear2, block.outer)]
    for theirs, mine in [*modules, (layer.norm1, block.norm1), (layer.norm2, block.norm2)]:
        pairs += [(theirs.weight, mine.weight), (theirs.bias, mine.bias)]
    with torch.no_grad():
        for theirs, mine in pairs:
            theirs.copy_(mine)
    return layer


def test_an_encoder_block_is_torchs() -> None:
    block = small().blocks[0]  # type: ignore[index]
    x, there = torch.randn(3, 4, WIDTH, dtype=torch.float64), TEXTS != 0
    found = block(x, there[:, None, None])
    assert torch.allclose(found, torchs_own(block)(x, src_key_padding_mask=~there), rtol=1e-12, atol=1e-12)


def test_a_decoder_block_is_torchs_with_a_causal_mask() -> None:
    block = small("gpt").blocks[0]  # type: ignore[index]
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    assert torch.allclose(block(x), torchs_own(block)(x, src_mask=mask, is_causal=True), rtol=1e-12, atol=1e-12)


def test_what_lies_behind_a_text_changes_nothing() -> None:
    model = small()
    whole = model(TEXTS)
    for row, length in enumerate((4, 2, 1)):
        assert torch.allclose(whole[row], model(TEXTS[row : row + 1, :length])[0], rtol=1e-12, atol=1e-12)


def test_no_token_is_told_of_those_behind_it() -> None:
    model, tokens = small("gpt"), torch.tensor([[7, 9, 11, 4]])
    other = tokens.clone()
    other[0, 3] = 1
    before, after = model(tokens), model(other)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3], after[:, 3])


@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_the_derivative_along_a_direction_is_backpropagations(kind: str) -> None:
    model = small(kind)

    def loss(model: nn.Module) -> Tensor:
        scores = model(TEXTS)
        return (
            F.cross_entropy(scores, torch.tensor([0, 2, 1])) if kind == "bert" else F.cross_entropy(scores.flatten(0, 1), TEXTS.flatten())
        )

    record = fg.estimate_grad_(loss, model, fg.ForwardGradient(tangents=2), generator=torch.Generator().manual_seed(1))
    moved = {name: p.grad for name, p in model.named_parameters()}
    exact = torch.autograd.grad(loss(model), list(model.parameters()))
    # ĝ = ½ Σ dₖ vₖ, so g·ĝ = ½ Σ dₖ²
    inner = sum((g * moved[name]).sum() for g, (name, _) in zip(exact, model.named_parameters(), strict=True))  # type: ignore[operator]
    assert torch.allclose(torch.as_tensor(inner), record.derivatives.square().mean(), rtol=1e-9)


def test_a_correction_begins_as_nothing_and_has_low_rank() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(20, 30), torch.randn(5, 20)
    plain = layer(x)
    made = Lora(layer)
    assert torch.equal(made(x), plain)
    nn.init.normal_(made.up.weight)
    change = torch.autograd.functional.jacobian(lambda v: made(v) - layer(v), x[0])
    assert torch.linalg.matrix_rank(change) == RANK


def test_an_adapter_trains_its_corrections_and_the_classifier_alone() -> None:
    whole, model = small(), adapted(small()).double()  # type: ignore[arg-type]
    assert torch.equal(whole(TEXTS), model(TEXTS))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = {f"blocks.{i}.attention.{part}.{side}.weight" for i in (0, 1) for part in ("query", "value") for side in ("down", "up")}
    assert trained == parts | {"classifier.weight", "classifier.bias"}
    assert counted(model) == 2 * 2 * 2 * RANK * WIDTH + 3 * WIDTH + 3
    assert {name for name, p in read_out(small()).named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}  # type: ignore[arg-type]


def test_sizes_by_name() -> None:
    assert transformer_of("gpt-12x768") == Transformer("gpt", 12, 768)
    assert all(transformer_of(name) is None for name in ("gpt", "bert-6", "bert-0x64", "t5-6x64", "mine:bert-6x64"))
    with torch.device("meta"):
        assert counted(models.build("gpt-12x768", (1024,), 0)) == 124_439_808  # as GPT-2 small has them, its read-out tied
        block = 4 * (384 * 384 + 384) + 2 * 4 * 384 * 384 + 5 * 384 + 2 * 2 * 384
        assert counted(models.build("bert-6x384", (64,), 3)) == (30_522 + 512) * 384 + 2 * 384 + 6 * block + 3 * 384 + 3
    assert [module.heads for module in models.build("bert-2x128", (8,), 3).modules() if isinstance(module, Attention)] == [2, 2]


@pytest.mark.parametrize(
    ("name", "shape", "classes", "words"),
    [
        ("bert-2x64", (1, 28, 28), 10, r"the model bert-2x64 reads texts, but an input here has the shape \(1, 28, 28\)"),
        ("minilm", (1, 28, 28), 10, "the model minilm reads texts"),
        ("nn", (64,), 3, r"the model nn takes images, but an input here has the shape \(64,\)"),
        ("resnet20", (64,), 3, "the model resnet20 takes images"),
        ("bert-2x64", (600,), 3, "reads 512 tokens at most, but a text here has 600"),
        ("gpt-2x64", (64,), 3, "predicts the next token of a text, and these data have classes"),
        ("bert-2x200", (64,), 3, "heads have 64 numbers each"),
    ],
)
def test_a_network_of_other_inputs_is_refused(name: str, shape: tuple[int, ...], classes: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        models.build(name, shape, classes)


def test_a_description_may_name_a_transformer() -> None:
    run = Run("drug-reviews", "bert-2x64", {"name": "backprop"}, Optimizer("adam", 1e-3))
    assert run.model == "bert-2x64"
    with pytest.raises(UserError, match=r"unknown model 'bert-2'.*minilm.*bert-6x384"):
        Run("drug-reviews", "bert-2", {"name": "backprop"}, Optimizer("adam", 1e-3))
