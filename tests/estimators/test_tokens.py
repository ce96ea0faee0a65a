"""Losses with a target at every position: local losses and learned feedback against backpropagation of each block's own loss.

Statistical tests have fixed seeds and compare 17 directions of the model and of each tensor with |z| < 4.5, some 1,500 numbers in all:
correct code fails under 1 seed of 100.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import Loss, seeded, trained
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.diagnostics.moments import Moments
from forwardgrad.estimators.heads import merged_classes
from forwardgrad.objective import Objective

State = dict[str, Tensor]
TEXTS, LENGTH, WORDS, WIDTH, FEWER = 3, 5, 11, 4, 4
TOKENS = torch.randint(WORDS, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(0))
BEHIND = torch.randint(WORDS, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(1))
PADDED = BEHIND.clone()
PADDED[0, 3:], PADDED[2, 4:] = -100, -100
WEIGHT = torch.rand(WORDS, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.5


class Block(nn.Module):
    """Attention to what came before and two dense layers, as GPT-2 has them."""

    def __init__(self, gains: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=gains) for _ in range(2))
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.inner, self.outer = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm1(x)
        q, k, v = (part(normal).unflatten(-1, (2, 2)).transpose(1, 2) for part in (self.query, self.key, self.value))
        x = x + self.output(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.outer(F.gelu(self.inner(self.norm2(x))))


class Decoder(nn.Module):
    def __init__(self, *, tied: bool = True, gains: bool = True) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block(gains) for _ in range(2))
        self.norm, self.readout = nn.LayerNorm(WIDTH, elementwise_affine=gains), nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.readout.weight = self.words.weight
        self.double()

    def begin(self, tokens: Tensor) -> Tensor:
        return self.words(tokens) + self.places(torch.arange(tokens.shape[1]).expand(tokens.shape))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.begin(tokens)
        for block in self.blocks:
            x = block(x)
        return self.readout(self.norm(x))


def flat(targets: Tensor, **options: Any) -> Loss:
    return lambda m: F.cross_entropy(m(TOKENS).flatten(0, 1), targets.flatten(), **options)


# Name: a loss of the model, and the same of scores [rows, words] in plain torch.
LOSSES: dict[str, tuple[Loss, Callable[[Tensor], Tensor]]] = {
    "flat": (flat(BEHIND), lambda s: F.cross_entropy(s, BEHIND.flatten())),
    "padded": (flat(PADDED), lambda s: F.cross_entropy(s, PADDED.flatten())),
    "turned": (lambda m: F.cross_entropy(m(TOKENS).transpose(1, 2), PADDED), lambda s: F.cross_entropy(s, PADDED.flatten())),
    "padding is a word": (flat(BEHIND, ignore_index=2), lambda s: F.cross_entropy(s, BEHIND.flatten(), ignore_index=2)),
    "a tenth of the sum": (
        lambda m: 0.1 * F.cross_entropy(m(TOKENS).view(-1, WORDS).float().double(), PADDED.view(-1), reduction="sum"),
        lambda s: 0.1 * F.cross_entropy(s.float().double(), PADDED.flatten(), reduction="sum"),
    ),
    "weighted texts": (
        lambda m: (F.cross_entropy(m(TOKENS).transpose(1, 2), BEHIND, reduction="none") * WEIGHT[BEHIND]).mean(),
        lambda s: (F.cross_entropy(s, BEHIND.flatten(), reduction="none") * WEIGHT[BEHIND].flatten()).mean(),
    ),
    "smoothed": (flat(PADDED, label_smoothing=0.2), lambda s: F.cross_entropy(s, PADDED.flatten(), label_smoothing=0.2)),
    "classes weighted": (
        flat(PADDED, weight=WEIGHT, label_smoothing=0.2),
        lambda s: F.cross_entropy(s, PADDED.flatten(), weight=WEIGHT, label_smoothing=0.2),
    ),
}


def step(loss: Loss, model: nn.Module, method: fg.Estimator, state: State, seed: int = 0) -> State:
    model.zero_grad()
    fg.estimate_grad_(loss, model, method, generator=seeded(seed), state=state)
    return {name: p.grad for name, p in trained(model).items() if p.grad is not None}


def learned(loss: Loss, model: nn.Module, steps: int = 10, **options: Any) -> tuple[State, State]:
    """The state after six steps in which classifiers learn and four in which feedback follows, and the last estimate."""
    state: State = {}
    for seed in range(steps):
        found = step(loss, model, fg.LocalLosses(feedback=True, head_rate=0.1 if seed < 6 else 1e-12, **options), state, seed)
    return state, found


def local_loss(own: Callable[[Tensor], Tensor], h: Tensor, state: State, index: int) -> Tensor:
    """The loss of one block, with h [n, length, width] at its end."""
    return own((h @ state[f"head.{index}.weight"].T + state[f"head.{index}.bias"]).flatten(0, 1))


def blockwise(model: Decoder, own: Callable[[Tensor], Tensor], state: State) -> State:
    """Gradients of the losses of whole transformer blocks and of the model's, with nothing that crosses the end of a block."""
    h, total = model.begin(TOKENS), torch.zeros((), dtype=torch.float64)
    for index, block in enumerate(model.blocks):
        h = block(h)
        total, h = total + local_loss(own, h, state, index), h.detach()
    total = total + own(model.readout(model.norm(h)).flatten(0, 1))
    return dict(zip(trained(model), torch.autograd.grad(total, list(trained(model).values())), strict=True))


def layerwise(model: Decoder, own: Callable[[Tensor], Tensor], state: State) -> State:
    """The same where every layer is a block of its own."""
    parts: list[Tensor] = []

    def end(h: Tensor) -> Tensor:
        parts.append(local_loss(own, h, state, len(parts)))
        return h.detach()

    places = end(model.places(torch.arange(LENGTH).expand(TOKENS.shape)))
    x = end(model.words(TOKENS) + places)
    for block in model.blocks:
        normal = block.norm1(x)
        q, k, v = (end(part(normal)).unflatten(-1, (2, 2)).transpose(1, 2) for part in (block.query, block.key, block.value))
        x = end(x + block.output(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)))
        x = end(x + block.outer(F.gelu(end(block.inner(block.norm2(x))))))
    total = torch.stack(parts).sum() + own(model.readout(model.norm(x)).flatten(0, 1))
    return dict(zip(trained(model), torch.autograd.grad(total, list(trained(model).values())), strict=True))


def has_the_mean(
    method: fg.Estimator, objective: Objective, state: dict[str, Tensor], exact: dict[str, Tensor], generator: torch.Generator
) -> None:
    """Estimates at one state have this mean: no part is 4.5 standard errors away, which is one false alarm in 150,000 parts."""
    moments = Moments(list(exact), list(exact.values()))
    for _ in range(4):
        with torch.no_grad():
            copies = ({key: t.clone() for key, t in state.items()} for _ in range(2))
            moments.add(*(list(method.estimate(objective, generator, copied)[1].values()) for copied in copies))
    for part in moments.parts():
        assert part.z < 4.5, part


@pytest.mark.some(3)
@pytest.mark.parametrize("name", LOSSES)
def test_every_layer_learns_by_its_own_loss_at_every_position(name: str) -> None:
    (loss, own), model = LOSSES[name], Decoder(tied=name != "flat", gains=False)
    state, found = learned(loss, model)
    assert state["head.2.weight"].shape == (WORDS, WIDTH)
    torch.testing.assert_close(found, layerwise(model, own, state), rtol=1e-5, atol=1e-8)


ENDS = ("blocks.*.outer.weight",)


@pytest.mark.some(1)
@pytest.mark.parametrize("name", ["padded", "weighted texts"])
def test_transformer_blocks_learn_by_the_derivative_of_their_own_loss(name: str) -> None:
    (loss, own), model = LOSSES[name], Decoder()
    state, _ = learned(loss, model, 12, ends=ENDS)
    exact = blockwise(model, own, state)
    has_the_mean(fg.LocalLosses(tangents=64, ends=ENDS), Objective(loss, model), state, exact, seeded(5))


def merged(scores: Tensor, weight: Tensor | None, smoothing: float) -> Tensor:
    """The loss of scores [rows, FEWER]: cross-entropy with what falls to a class of all words that it stands for, word by word."""
    chances, total, size = scores.log_softmax(1), torch.zeros((), dtype=scores.dtype), torch.zeros((), dtype=scores.dtype)
    stands = merged_classes(WORDS, FEWER, torch.device("cpu"))
    for row, target in enumerate(PADDED.flatten().tolist()):
        if target == -100:
            continue
        for word in range(WORDS):
            share = (1 - smoothing) * (word == target) + smoothing / WORDS
            total = total - share * (1.0 if weight is None else weight[word]) * chances[row, stands[word]]
        size = size + (1.0 if weight is None else weight[target])
    return total / size


@pytest.mark.parametrize("name", ["padded", "classes weighted"])
def test_fewer_classes_stand_for_many(name: str) -> None:
    loss, _ = LOSSES[name]
    weight, smoothing = (None, 0.0) if name == "padded" else (WEIGHT, 0.2)
    model = Decoder(gains=False)
    state, found = learned(loss, model, classes=FEWER)
    assert {tuple(t.shape) for key, t in state.items() if key.startswith("head.") and key.endswith("feedback")} == {
        (FEWER, WIDTH),
        (FEWER, 6),
    }

    def own(scores: Tensor) -> Tensor:
        return merged(scores, weight, smoothing) if scores.shape[1] == FEWER else LOSSES[name][1](scores)

    torch.testing.assert_close(found, layerwise(model, own, state), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("classes", "fewer"), [(30_522, 512), (11, 4), (50_257, 2)])
def test_words_are_shared_out_evenly_and_neighbours_part(classes: int, fewer: int) -> None:
    found = merged_classes(classes, fewer, torch.device("cpu"))
    assert torch.equal(found, merged_classes(classes, fewer, torch.device("cpu")))
    counts = torch.bincount(found, minlength=fewer)
    assert len(counts) == fewer
    assert counts.max() - counts.min() <= 1
    assert (found[1:] != found[:-1]).float().mean() > 0.9 or fewer == 2


class Plain(nn.Module):
    """Layers that are linear and see one position alone, so that one matrix is right for every position."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words, self.first, self.second = nn.Embedding(WORDS, 4), nn.Linear(4, 5), nn.Linear(5, 4)
        self.readout = nn.Linear(4, WORDS)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.readout(self.second(self.first(self.words(tokens))))


def test_learned_feedback_sends_the_error_of_a_position_to_the_same_position() -> None:
    model, state, loss = Plain(), {}, LOSSES["padded"][0]
    for seed in range(150):
        found = step(loss, model, fg.LearnedFeedback(), state, seed)
    shapes = {key: tuple(t.shape) for key, t in state.items() if key.startswith("feedback.") and t.dim() == 2}
    assert sorted(shapes.values()) == [(4, 4), (4, 4), (4, 5), (WORDS, 4)]  # nothing is as large as a text
    exact = dict(zip(trained(model), torch.autograd.grad(loss(model), list(trained(model).values())), strict=True))
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.some(1)
@pytest.mark.parametrize("name", ["padded", "turned"])
def test_feedback_by_position_with_a_control_variate_is_unbiased(name: str) -> None:
    loss, model, state = LOSSES[name][0], Decoder(), {}
    for seed in range(3):
        step(loss, model, fg.LearnedFeedback(), state, seed)
    for key, t in state.items():
        if key.startswith("feedback.") and t.is_floating_point():
            t.add_(torch.randn(t.shape, dtype=t.dtype, generator=seeded(1)))
    exact = dict(zip(trained(model), torch.autograd.grad(loss(model), list(trained(model).values())), strict=True))
    method = fg.LearnedFeedback(use="control-variate", tangents=64)
    has_the_mean(method, Objective(loss, model), state, exact, seeded(6))


def test_the_gradient_of_a_tied_matrix_is_that_of_both_of_its_uses() -> None:
    """That of the read-out is exact, e xᵀ; that of the embedding is of its own block's loss."""
    loss, own = LOSSES["padded"]
    tied, apart = Decoder(gains=False), Decoder(tied=False, gains=False)
    apart.readout.weight.data.copy_(tied.words.weight.data)
    state, found = learned(loss, tied)
    again = {key: t.clone() for key, t in state.items() if not key.startswith("feedback.")}
    both = step(loss, apart, fg.LocalLosses(feedback=True, head_rate=1e-12), again)
    torch.testing.assert_close(
        step(loss, tied, fg.LocalLosses(feedback=True, head_rate=1e-12), state)["words.weight"],
        both["words.weight"] + both["readout.weight"],
    )
    h = tied(TOKENS).detach()
    assert own(h.flatten(0, 1)).item() == pytest.approx(float(loss(tied).detach()))
    assert not torch.allclose(found["words.weight"], both["words.weight"])


def test_gpt2_of_transformers_with_labels_of_its_own() -> None:
    """The loss is made inside the model, of labels that are moved by one; layers are addmm, their results views."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_positions=8,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).double()
    for name, p in model.named_parameters():
        p.requires_grad_("ln_" not in name and "wpe" not in name)

    def loss(m: Any) -> Tensor:
        return m(input_ids=TOKENS, labels=TOKENS).loss

    state, found = learned(loss, model, classes=FEWER)
    behind = F.pad(TOKENS, (0, 1), value=-100)[:, 1:].flatten()
    codes = merged_classes(WORDS, FEWER, torch.device("cpu"))
    parts: list[Tensor] = []

    def end(h: Tensor) -> Tensor:
        scores = h @ state[f"head.{len(parts)}.weight"].T + state[f"head.{len(parts)}.bias"]
        parts.append(F.cross_entropy(scores.flatten(0, 1), torch.where(behind < 0, -100, codes[behind.clamp(min=0)])))
        return h.detach()

    body = model.transformer
    x = end(body.wte(TOKENS) + body.wpe(torch.arange(LENGTH)))
    for block in body.h:
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in end(block.attn.c_attn(block.ln_1(x))).split(WIDTH, 2))
        x = end(x + block.attn.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)))
        x = end(x + block.mlp.c_proj(block.mlp.act(end(block.mlp.c_fc(block.ln_2(x))))))
    total = torch.stack(parts).sum() + F.cross_entropy(model.lm_head(body.ln_f(x)).flatten(0, 1), behind)
    exact = dict(zip(trained(model), torch.autograd.grad(total, list(trained(model).values())), strict=True))
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (fg.LocalLosses(head="pooled"), r'head="pooled" takes means over positions, but every position has a target'),
        (fg.LocalLosses(similarity=0.5, feedback=True), r"similarity compares whole examples, but every position has a target"),
    ],
)
def test_options_that_do_not_go_with_positions_are_told(method: fg.Estimator, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        step(LOSSES["flat"][0], Decoder(), method, {})


def test_targets_that_were_cut_are_told() -> None:
    model = Decoder()
    with pytest.raises(ValueError, match=r"block that ends with .* has 5 positions an example, and the loss 4 targets: .* ignore_index"):
        step(lambda m: F.cross_entropy(m(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()), model, fg.LocalLosses(feedback=True), {})


@pytest.mark.parametrize("classes", [1, 0, 2.5, True])
def test_the_number_of_classes_is_checked(classes: Any) -> None:
    with pytest.raises(ValueError, match="classes must be"):
        fg.LocalLosses(classes=classes)


class TwoHeads(Plain):
    """A second head behind the read-out, as a value beside the words."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(4, 1).double()

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = self.second(self.first(self.words(tokens)))
        return self.readout(hidden), self.value(hidden)


def test_feedback_learns_where_another_layer_runs_behind_the_read_out() -> None:
    model, state = TwoHeads(), {}

    def loss(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(TOKENS)[0].flatten(0, 1), BEHIND.flatten())

    for seed in range(80):
        found = step(loss, model, fg.LearnedFeedback(), state, seed)
    names = [name for name in trained(model) if "value" not in name]
    exact = dict(zip(names, torch.autograd.grad(loss(model), [trained(model)[name] for name in names]), strict=True))
    torch.testing.assert_close({name: found[name] for name in names}, exact, rtol=1e-4, atol=1e-6)


def with_scores_squared(m: nn.Module) -> Tensor:
    scores = m(TOKENS)
    return F.cross_entropy(scores.flatten(0, 1), BEHIND.flatten()) + 0.01 * scores.logsumexp(2).square().mean()


def with_a_value(m: nn.Module) -> Tensor:
    scores, value = m(TOKENS)
    return F.cross_entropy(scores.flatten(0, 1), BEHIND.flatten()) + value.square().mean()


def turned_behind_a_value(m: nn.Module) -> Tensor:
    """The view of the scores is made behind the last layer, where calls are made again to read the loss."""
    scores, value = m(TOKENS)
    return F.cross_entropy(scores.transpose(1, 2), BEHIND) + value.square().mean()


@pytest.mark.parametrize("loss", [with_scores_squared, with_a_value, turned_behind_a_value])
@pytest.mark.parametrize(
    "method", [fg.LearnedFeedback(), fg.LocalLosses(feedback=True), fg.ForwardGradient(perturb=fg.Activity(), exact_output=True)], ids=str
)
def test_the_read_out_learns_exactly_where_a_loss_uses_outputs_in_another_way_besides(loss: Loss, method: fg.Estimator) -> None:
    model, state = Plain() if loss is with_scores_squared else TwoHeads(), {}
    for seed in range(2):
        found = step(loss, model, method, state, seed)
    last = [name for name in trained(model) if name.startswith(("readout", "value"))]
    exact = torch.autograd.grad(loss(model), [trained(model)[name] for name in last])
    torch.testing.assert_close({name: found[name] for name in last}, dict(zip(last, exact, strict=True)))
