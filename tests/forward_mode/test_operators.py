"""Operators that torch has no forward mode for and that are made of others: their derivative is backpropagation's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.forward_mode.test_derivative import shifted
from tests.support.cases import rows, seeded, trained, true_gradient
from torch import Tensor, nn
from torch.nn.utils import parametrizations, rnn

import forwardgrad as fg
from forwardgrad.forward_mode.rules.composed import COMPOSED

WORDS, BAGS = torch.tensor([0, 2, 2, 1, 5, 1, 3, 2, 4]), torch.tensor([0, 2, 2, 6])
SCALES = rows(9)


class Behind(nn.Module):
    """A function of what a linear layer gives."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.first, self.layers, self.function = nn.Linear(4, 4), nn.ModuleList(layers), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x), *self.layers)


class Bag(nn.Module):
    """Bags of words, one of them empty; word 2 is padding."""

    def __init__(self, mode: str, per_word: bool = False, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 3, mode=mode, **options)
        self.scales = nn.Parameter(SCALES.clone()) if per_word else None

    def forward(self, words: Tensor) -> Tensor:
        offsets = torch.cat([BAGS, torch.tensor([len(WORDS)])]) if self.bag.include_last_offset else BAGS
        return self.bag(words) if words.dim() == 2 else self.bag(words, offsets, self.scales)


def packed(h: Tensor, layer: nn.RNNBase) -> Tensor:
    """Three sequences of 2, 5 and 3 steps."""
    steps = h.reshape(3, 5, 4)
    whole = rnn.pack_padded_sequence(
        steps if layer.batch_first else steps.transpose(0, 1), torch.tensor([2, 5, 3]), layer.batch_first, False
    )
    out, hidden = layer(whole)
    (last, *_) = hidden if isinstance(hidden, tuple) else (hidden,)
    return rnn.pad_packed_sequence(out, layer.batch_first, padding_value=0.3)[0].sum(-1).flatten() + last.sum()


def sampled(mode: str, padding: str) -> Callable[[Tensor], Tensor]:
    return lambda h: F.grid_sample(
        h.reshape(1, 3, 4, 5), h.tanh()[:6, :2].reshape(1, 2, 3, 2) * 1.2, mode=mode, padding_mode=padding, align_corners=False
    )


Made = tuple[Callable[[], nn.Module], Tensor]
X = rows(15, 4)
CASES: dict[str, Made] = {
    **{f"bag {mode}": (lambda mode=mode: Bag(mode, padding_idx=2), WORDS) for mode in ("sum", "mean", "max")},
    **{f"bag {mode} of rows": (lambda mode=mode: Bag(mode), WORDS.view(3, 3)) for mode in ("sum", "mean", "max")},
    "bag with weights": (lambda: Bag("sum", per_word=True, padding_idx=-4), WORDS),
    "bag with a last offset": (lambda: Bag("mean", include_last_offset=True), WORDS),
    "embedding by frequency": (lambda: nn.Embedding(6, 3, scale_grad_by_freq=True, padding_idx=2), WORDS),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), X),
    "weight norm of a convolution": (
        lambda: nn.Sequential(nn.Unflatten(1, (4, 1)), parametrizations.weight_norm(nn.Conv1d(4, 3, 1), dim=1)),
        X,
    ),
    "weight norm by a hook": (lambda: nn.utils.weight_norm(nn.Linear(4, 3), dim=None), X),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), X),
    "spectral norm by a hook": (lambda: nn.utils.spectral_norm(nn.Linear(4, 3)), X),
    **{f"cdist {p}": (lambda p=p: Behind(lambda h: torch.cdist(h, h[:3] * 0.5, p)), X) for p in (0.0, 1.0, 2.0, 3.0, float("inf"))},
    "cdist of itself": (lambda: Behind(lambda h: torch.cdist(h.reshape(3, 5, 4), h.reshape(3, 5, 4))), X),
    **{f"pdist {p}": (lambda p=p: Behind(lambda h: F.pdist(h, p)), X) for p in (1.0, 2.0)},
    **{
        f"packed {kind.__name__} {options}": (lambda kind=kind, options=options: Behind(packed, kind(4, 3, **options)), X)
        for kind, options in (
            (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
            (nn.LSTM, {"proj_size": 2, "batch_first": True}),
            (nn.GRU, {"bidirectional": True}),
            (nn.RNN, {}),
            (nn.RNN, {"nonlinearity": "relu", "bias": False}),
        )
    },
    **{
        f"sampled {mode} {padding}": (lambda mode=mode, padding=padding: Behind(sampled(mode, padding)), X)
        for mode, padding in (("bilinear", "zeros"), ("bilinear", "reflection"), ("nearest", "border"), ("bicubic", "zeros"))
    },
    "time, batch, channels": (lambda: Behind(lambda h: torch.conv_tbc(h.reshape(5, 3, 4), h[:8].reshape(2, 4, 4), h[0], 1)), X),
    "random slopes": (lambda: Behind(lambda h: F.rrelu(h, training=True)), X),
    "random slopes in place": (lambda: Behind(lambda h: F.rrelu(h, training=True, inplace=True)), X),
    "margins": (lambda: Behind(lambda h: F.multi_margin_loss(h, torch.arange(15) % 4, p=2, margin=0.5, weight=rows(4).exp())), X),
    "margins of several": (lambda: Behind(lambda h: F.multilabel_margin_loss(h, torch.tensor([[3, 0, -1, 1]] * 15), reduction="none")), X),
    "cross entropy in parts": (
        lambda: Behind(lambda h: F.linear_cross_entropy(h, h[:3] * 2, torch.arange(15) % 3, options=nn.LinearCrossEntropyOptions())),
        X,
    ),
    "one row": (lambda: Behind(lambda h: h.index_select(0, torch.tensor(1))), X),
}


def built(case: Made) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """The model in float64, and a loss that tells all numbers apart."""
    torch.manual_seed(0)
    make, x = case
    model = make().double()
    return model, lambda m: (lambda out: (out * torch.arange(1.0, out.numel() + 1).double().cos().view(out.shape)).sum())(m(x))


@pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", CASES)
def test_a_composition_has_the_derivative_of_backpropagation(name: str) -> None:
    exact = true_gradient(*built(CASES[name]))
    for count, plain in ((1, False), (3, False), (1, True), (3, True)):
        model, loss = built(CASES[name])  # not a copy: the old hooks keep a tensor that cannot be copied
        objective = fg.Objective(loss, model)
        tangents = fg.Gaussian().draw(objective.parameters, count, seeded(1))
        torch.manual_seed(7)
        with fg.plainly() if plain else warnings.catch_warnings():
            value, along = fg.directional_derivatives(objective, tangents)
        products = sum((g * v).reshape(count, -1).sum(1) for g, v in zip(exact.values(), tangents.values(), strict=True))
        torch.testing.assert_close(along, products, rtol=1e-9, atol=1e-10)
    model, loss = built(CASES[name])
    torch.manual_seed(7)
    torch.testing.assert_close(value, loss(model).detach(), rtol=1e-12, atol=1e-12)


BY_DIFFERENCE = ["bag mean", "weight norm", "cdist 3.0", "pdist 2.0", "sampled bicubic zeros", "margins"]


@pytest.mark.parametrize("name", BY_DIFFERENCE)
def test_a_composition_has_the_derivative_of_a_central_difference(name: str) -> None:
    model, loss = built(CASES[name])
    objective = fg.Objective(loss, copy.deepcopy(model))
    tangents = fg.Gaussian().draw(objective.parameters, 1, seeded(1))
    _, along = fg.directional_derivatives(objective, tangents)
    named = dict(zip(trained(model), tangents.values(), strict=True))
    difference = (shifted(model, loss, named, 1e-6) - shifted(model, loss, named, -1e-6)) / 2e-6
    torch.testing.assert_close(along[0], difference, rtol=1e-7, atol=1e-7)


def test_distances_are_not_held_as_a_tensor_of_all_differences() -> None:
    """Of 40 × 40 rows of 30 numbers: in no tensor more numbers than in twice the distances."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(leaf.numel() for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, Tensor))])
            return out

    with Watch():
        COMPOSED[torch.cdist](rows(40, 30), rows(40, 30) + 1)
    assert largest <= 2 * 40 * 40


def test_bags_by_frequency_share_each_word_among_its_uses() -> None:
    """As the documentation has it: torch's own backward pass on a processor divides by the uses of other words."""
    model, loss = built((lambda: Bag("sum", scale_grad_by_freq=True), WORDS))
    whole = true_gradient(built((lambda: Bag("sum"), WORDS))[0], loss)["bag.weight"]
    expected = whole / torch.bincount(WORDS, minlength=6).clamp(min=1).unsqueeze(1)
    fg.estimate_grad_(loss, model, fg.ForwardGradient(18, law=fg.Orthogonal()), generator=seeded())
    torch.testing.assert_close(model.bag.weight.grad, expected, rtol=1e-9, atol=1e-10)


def test_the_vectors_of_a_spectral_norm_move_on_once_a_step() -> None:
    model, loss = built(CASES["spectral norm"])
    other = copy.deepcopy(model)
    fg.estimate_grad_(loss, model, fg.ForwardGradient(2), generator=seeded())
    loss(other)
    torch.testing.assert_close(dict(model.named_buffers()), dict(other.named_buffers()))
