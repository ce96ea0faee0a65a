"""Local losses against backpropagation of each block's own loss, written in plain torch.

Statistical tests have fixed seeds and compare 17 directions of the model and of each tensor with |z| < 4.5, some 1,500 numbers in all:
correct code fails under 1 seed of 100.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import Loss, classify, convolutional, group_norm, perceptron, regress, rows, seeded, trained, true_gradient
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.diagnostics.moments import Moments
from forwardgrad.estimators.heads import similarity_error
from forwardgrad.objective import Objective

State = dict[str, Tensor]


def step(loss: Loss, model: nn.Module, method: fg.Estimator, state: State, seed: int = 0) -> dict[str, Tensor]:
    model.zero_grad()
    fg.estimate_grad_(loss, model, method, generator=seeded(seed), state=state)
    return {name: p.grad for name, p in trained(model).items() if p.grad is not None}


def deep() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def heads(state: State) -> list[tuple[Tensor, Tensor]]:
    """The classifiers of the blocks, weight and bias."""
    count = sum(f"head.{i}.weight" in state for i in range(len(state)))
    return [(state[f"head.{i}.weight"].clone(), state[f"head.{i}.bias"].clone()) for i in range(count)]


def features(h: Tensor, head: str) -> Tensor:
    if head == "flatten" or h.dim() < 3:
        return h.flatten(1).unsqueeze(1)
    positions = h.flatten(2).transpose(1, 2)
    return positions if head == "positions" else positions.mean(1, keepdim=True)


def cosines(t: Tensor) -> Tensor:
    """Between all pairs of rows, each less its mean."""
    x = F.normalize(t - t.mean(1, keepdim=True), dim=1)
    return x @ x.T


def similarity(seen: Tensor, y: Tensor, classes: int = 3) -> Tensor:
    return F.mse_loss(cosines(seen.flatten(1)), cosines(F.one_hot(y, classes).to(seen.dtype)))


def reference(model: nn.Sequential, x: Tensor, ends: list[int], classifiers: list[tuple[Tensor, Tensor]], head: str, s: float) -> State:
    """Gradients of every block's own loss, a block ending with the module of each index, and of the model's loss for what is left."""
    h, y = x, torch.arange(len(x)) % 3
    total, blocks = torch.zeros((), dtype=x.dtype), iter(classifiers)
    for i, module in enumerate(model):
        h = module(h)
        if i in ends:
            weight, bias = next(blocks)
            seen = features(h, head)
            logits = seen @ weight.T + bias
            total = total + (1 - s) * F.cross_entropy(logits.flatten(0, 1), y.repeat_interleave(logits.shape[1])) + s * similarity(seen, y)
            h = h.detach()
    total = total + F.cross_entropy(h, y)
    return dict(zip(trained(model), torch.autograd.grad(total, list(model.parameters())), strict=True))


# Name: the model, its batch, the modules that blocks end with, and what the estimator is told.
BLOCKS: dict[str, tuple[Any, Tensor, list[int], dict[str, Any]]] = {
    "every layer": (deep, rows(6, 4), [1, 2, 5], {}),
    "two layers": (deep, rows(6, 4), [2], {"ends": ("2.weight",)}),
    "similarity": (deep, rows(6, 4), [1, 2, 5], {"similarity": 0.6}),
    "images": (convolutional, rows(3, 1, 6, 6), [2, 4], {}),
    "images, pooled": (convolutional, rows(3, 1, 6, 6), [2, 4], {"head": "pooled", "similarity": 0.3}),
    "images, positions": (convolutional, rows(3, 1, 6, 6), [2, 4], {"head": "positions"}),
    "a norm": (lambda: group_norm()[0], rows(4, 1, 4, 4), [0], {"head": "positions"}),
    "classifier alone": (perceptron, rows(6, 4), [], {"ends": ()}),
}


def built(name: str) -> tuple[nn.Sequential, Tensor, list[int], dict[str, Any]]:
    make, x, ends, options = BLOCKS[name]
    torch.manual_seed(2022)
    return make().double(), x, ends, options


@pytest.mark.parametrize("name", BLOCKS)
def test_the_estimate_is_unbiased_for_the_loss_of_each_block(name: str) -> None:
    model, x, ends, options = built(name)
    state: State = {}
    for seed in range(3):
        step(classify(x), model, fg.LocalLosses(head_rate=0.1, **options), state, seed)
    exact = reference(model, x, ends, heads(state), options.get("head", "flatten"), options.get("similarity", 0.0))
    method, generator, objective = fg.LocalLosses(tangents=64, **options), seeded(5), Objective(classify(x), model)
    moments = Moments(list(exact), list(exact.values()))
    for _ in range(6):
        with torch.no_grad():
            copies = ({key: t.clone() for key, t in state.items()} for _ in range(2))
            moments.add(*(list(method.estimate(objective, generator, copied)[1].values()) for copied in copies))
    parts = {part.name: part for part in moments.parts()}
    for part in parts.values():
        assert part.z < 4.5, part
    last = list(exact)[-2:]
    for parameter in last:  # the classifier of the model learns by its exact gradient
        assert parts[parameter].p == 1.0
    if ends:
        theirs = true_gradient(model, classify(x))
        assert not torch.allclose(theirs["0.weight"], exact["0.weight"], rtol=0.1)  # and that is not the gradient of the model's loss
        assert not method.unbiased


def test_no_gradient_crosses_the_end_of_a_block() -> None:
    """Whatever is behind a block, its gradient has the same bits; and with a classifier of zeros it has none."""
    model, other, x = deep(), deep(), rows(6, 4)
    with torch.no_grad():
        for p in list(other.parameters())[2:]:
            p.mul_(-3)
    state: State = {}
    step(classify(x), model, fg.LocalLosses(head_rate=0.1), state)
    found = [step(classify(x), m, fg.LocalLosses(), {key: t.clone() for key, t in state.items()}) for m in (model, other)]
    assert torch.equal(found[0]["0.weight"], found[1]["0.weight"])
    assert not torch.equal(found[0]["2.weight"], found[1]["2.weight"])
    state["head.1.weight"].zero_()
    found = [step(classify(x), model, fg.LocalLosses(), state)]
    assert not found[0]["2.weight"].any()
    assert all(found[0][f"{i}.weight"].any() for i in (0, 4, 6))


@pytest.mark.parametrize("head", ["flatten", "pooled", "positions"])
def test_classifiers_learn_by_adam_along_their_exact_gradient(head: Any) -> None:
    model, x, y, rate = convolutional().double(), rows(3, 1, 6, 6), torch.arange(3), 0.05
    given, state = [features(h, head).detach() for h in (model[:3](x), model[:5](x))], {}
    expected = [(torch.zeros(3, f.shape[2], dtype=f.dtype).requires_grad_(), torch.zeros(3, dtype=f.dtype).requires_grad_()) for f in given]
    optimizer = torch.optim.Adam([t for pair in expected for t in pair], lr=rate)
    losses = []
    for seed in range(25):
        optimizer.zero_grad()
        each = [
            F.cross_entropy((f @ w.T + b).flatten(0, 1), y.repeat_interleave(f.shape[1])) for f, (w, b) in zip(given, expected, strict=True)
        ]
        sum(each).backward()
        optimizer.step()
        losses.append([float(loss.detach()) for loss in each])
        step(classify(x), model, fg.LocalLosses(head=head, head_rate=rate), state, seed)
        torch.testing.assert_close(heads(state), [(w.detach(), b.detach()) for w, b in expected], rtol=1e-6, atol=1e-7)
    assert all(last < first - 0.02 for first, last in zip(losses[0], losses[-1], strict=True))


@pytest.mark.parametrize("name", ["every layer", "similarity", "images", "images, pooled", "images, positions"])
def test_learned_feedback_sends_back_the_exact_error_of_a_classifier_that_rests(name: str) -> None:
    model, x, ends, options = built(name)
    state: State = {}
    for seed in range(160):  # ten steps of learning, then the feedback catches up
        method = fg.LocalLosses(feedback=True, head_rate=0.1 if seed < 10 else 1e-12, **options)
        found = step(classify(x), model, method, state, seed)
    exact = reference(model, x, ends, heads(state), options.get("head", "flatten"), options.get("similarity", 0.0))
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(5, 4), (4, 3, 2, 2)], ids=str)
def test_the_error_of_the_similarity_is_that_of_autograd(shape: tuple[int, ...]) -> None:
    h, y = rows(*shape), torch.arange(shape[0]) % 2
    leaf = h.clone().requires_grad_()
    (g,) = torch.autograd.grad(similarity(leaf, y, 5), leaf)
    torch.testing.assert_close(similarity_error(h, y, 5, y >= 0), g, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("head", ["flatten", "pooled"])
def test_an_ignored_example_has_no_part_in_any_loss(head: Any) -> None:
    x, y = rows(6, 1, 6, 6), torch.tensor([0, -100, 1, 2, -100, 0])
    method, used = fg.LocalLosses(feedback=True, head=head, similarity=0.7, head_rate=0.1), y >= 0
    model, states = convolutional().double(), (dict[str, Tensor](), dict[str, Tensor]())
    for seed in range(3):
        found, alone = (
            step(lambda m, a=a, b=b: F.cross_entropy(m(a), b), model, method, state, seed)
            for a, b, state in zip((x, x[used]), (y, y[used]), states, strict=True)
        )
        torch.testing.assert_close(found, alone, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("feedback", [False, True])
def test_a_network_learns_from_local_losses_alone(feedback: bool) -> None:
    """Three classes of points: what the first layers pass on lets the model's own classifier tell nearly all of them apart."""
    generator = seeded(1)
    y = torch.arange(60) % 3
    x = F.one_hot(y, 4).double() * 2 + torch.randn(60, 4, dtype=torch.float64, generator=generator)
    model, state, method = deep(), {}, fg.LocalLosses(feedback=feedback, head_rate=0.02)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    before = float(F.cross_entropy(model(x), y).detach())
    for _ in range(100):
        optimizer.zero_grad()
        fg.estimate_grad_(lambda m: F.cross_entropy(m(x), y), model, method, generator=generator, state=state)
        optimizer.step()
    assert float(F.cross_entropy(model(x), y).detach()) < 0.5 * before


def test_the_state_goes_through_a_file_and_that_of_another_model_is_told() -> None:
    model, x, state = deep(), rows(6, 4), {}
    step(classify(x), model, fg.LocalLosses(), state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    found = [step(classify(x), model, fg.LocalLosses(), memory, 9) for memory in (state, again)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    torch.testing.assert_close(state, again, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"the state holds a classifier of \(3, 5\) for block 0, but this model needs \(3, 7\)"):
        step(classify(x), nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3)).double(), fg.LocalLosses(), state)


TARGETS = rows(6, 3)
ROWS, LABELLED = rows(6, 4), torch.arange(6) % 3
NONE, WAY, LIES = "and this loss has none", "but this loss uses its result in another way", "do not have the examples of the batch along"


def each(m: nn.Module) -> Tensor:
    return F.cross_entropy(m(ROWS), LABELLED, reduction="none")


OUTSIDE: dict[str, tuple[Any, Loss, str]] = {
    "no closed form": (deep, regress(ROWS), NONE),
    "squared error": (deep, lambda m: F.mse_loss(m(ROWS), TARGETS), NONE),
    "chances": (deep, lambda m: F.cross_entropy(m(ROWS), TARGETS.softmax(1)), NONE),
    "one example": (deep, lambda m: F.cross_entropy(m(rows(4)), torch.tensor(1)), NONE),
    "some examples": (deep, lambda m: each(m)[LABELLED > 0].mean(), WAY),
    "another function": (deep, lambda m: each(m).sqrt().mean(), WAY),
    "hardest": (deep, lambda m: each(m).topk(3)[0].mean(), WAY),
    "part of the batch": (deep, lambda m: F.cross_entropy(m(ROWS)[:3], LABELLED[:3]), LIES),
    "two": (deep, lambda m: F.cross_entropy(m(ROWS), LABELLED) + F.cross_entropy(2 * m(ROWS), LABELLED), "and this loss has 2 of them"),
}


@pytest.mark.parametrize(("make", "loss", "said"), OUTSIDE.values(), ids=OUTSIDE)
def test_a_loss_that_classifiers_inside_the_model_cannot_learn_is_told(make: Any, loss: Loss, said: str) -> None:
    with pytest.raises(ValueError, match=f"LocalLosses needs an F.cross_entropy of class indices.*{said}.*or use LearnedFeedback"):
        step(loss, make().double(), fg.LocalLosses(), {})


def mapped(m: nn.Module) -> Tensor:
    return torch.func.vmap(lambda score, label: F.cross_entropy(score, label))(m(ROWS), LABELLED).mean()


@pytest.mark.filterwarnings("ignore:derivatives of Sequential")
@pytest.mark.parametrize("method", [fg.LocalLosses(), fg.LearnedFeedback()], ids=repr)
def test_a_loss_inside_a_transform_has_no_error_at_the_output(method: fg.Estimator) -> None:
    with pytest.raises(ValueError, match=r"inside torch\.func\.vmap or another transform.*on the whole batch"):
        step(mapped, deep().double(), method, {})


def test_a_pattern_of_ends_has_to_name_something_that_is_trained() -> None:
    method = fg.LocalLosses(ends=("2.weight", "layers.*"), feedback=True)
    model, x = deep().double(), rows(6, 4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"ends: 'layers\.\*' names nothing that is trained.*such as '0\.weight'"):
        fg.estimate_grad_(
            lambda m: F.cross_entropy(m(x), torch.arange(6) % 3), model, method, generator=torch.Generator().manual_seed(0), state={}
        )
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
