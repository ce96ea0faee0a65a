"""Rules of the explicit way, function by function: dropout with the mask of an ordinary pass, what works in place, norms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.forward_mode.test_explicit import both, same, ways
from tests.support.cases import classify, rows, seeded
from torch import Tensor, nn
from torch.func import jvp, vmap

import forwardgrad as fg
from forwardgrad.forward_mode.dual_numbers import Alike
from forwardgrad.forward_mode.explicit import Explicit
from forwardgrad.forward_mode.guard import Unfollowed
from forwardgrad.forward_mode.notes import Way, asking

Function = Callable[[Tensor], Tensor]
X, V = rows(4, 3, 6) * 3, rows(3, 4, 3, 6).flip(0)


def explicit(function: Function, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor, Counter[Way]]:
    """The value of a function, how it moves along K tangents, and the way that each call went."""
    with torch.no_grad(), asking(), Explicit(len(tangents), {id(x): tangents}) as evaluation:
        out = function(x)
        moved = evaluation.derivative(out)
    assert evaluation.ways is not None
    return out, moved, evaluation.ways


def plain(function: Function, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """The same by torch's own forward mode as the library uses it."""

    def along(t: Tensor) -> tuple[Tensor, Tensor]:
        with Alike():
            value, moved = jvp(function, (x,), (t,))
        return value, moved

    with torch.no_grad():
        if len(tangents) == 1:
            value, moved = along(tangents[0])
            return value, moved.unsqueeze(0)
        found: tuple[Tensor, Tensor] = vmap(along, out_dims=(None, 0), randomness="same")(tangents)  # type: ignore[arg-type]
        return found


# Dropout ------------------------------------------------------------------------------------------------------------------------------

DROPOUTS: dict[str, Callable[[Tensor, float, bool], Tensor]] = {
    "dropout": F.dropout,
    "torch": torch.dropout,
    "1d": F.dropout1d,
    "feature": torch.feature_dropout,
    "alpha": F.alpha_dropout,
    "feature alpha": F.feature_alpha_dropout,
    "in place": lambda x, p, train: F.dropout(x * 2, p, train, inplace=True),
    "alpha in place": lambda x, p, train: F.alpha_dropout(x * 2, p, train, inplace=True),
    "feature in place": lambda x, p, train: torch.feature_dropout_(x * 2, p, train),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("p", "train"), [(0.4, True), (0.4, False), (0.0, True), (1.0, True)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_has_the_mask_of_an_ordinary_pass(name: str, transposed: bool, p: float, train: bool, count: int) -> None:
    function, x, tangents = DROPOUTS[name], X, V[:count]
    if transposed:
        x, tangents = x.transpose(0, 2), tangents.transpose(1, 3)
    torch.manual_seed(11)
    ordinary = function(x, p, train)
    after = torch.get_rng_state()
    torch.manual_seed(11)
    out, moved, found = explicit(lambda x: function(x, p, train), x, tangents)
    assert torch.equal(out, ordinary)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(way.kind == "rule" for way in found)
    torch.manual_seed(11)
    other, moves = plain(lambda x: function(x, p, train), x, tangents)
    assert torch.equal(other, ordinary)
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(moved, moves, rtol=1e-14, atol=0)
    # dropout is linear but for a constant: a difference of any length is exact up to rounding
    shifted = []
    for v in tangents:
        torch.manual_seed(11)
        shifted.append(function(x + v, p, train) - ordinary)
    torch.testing.assert_close(moved, torch.stack(shifted), rtol=1e-12, atol=1e-13)


def test_dropout_in_place_beside_a_view_is_not_followed() -> None:
    def function(x: Tensor) -> Tensor:
        h = x * 2
        part = h[0]
        return F.dropout(h, 0.5, True, True) + part

    with pytest.raises(Unfollowed, match="dropout_ writes in place"):
        explicit(function, X, V)


def test_each_of_several_examples_under_vmap_may_have_a_mask_of_its_own() -> None:
    x, function = torch.ones(50, 8), lambda x: F.dropout(x, 0.5)
    with Alike():
        apart = vmap(lambda x: jvp(function, (x,), (x,))[0], randomness="different")(x)
        alike = vmap(lambda x: jvp(function, (x,), (x,))[0], randomness="same")(x)
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(lambda x: jvp(function, (x,), (x,))[0])(x)
    assert len(apart.unique(dim=0)) > 1
    assert len(alike.unique(dim=0)) == 1


class Encoder(nn.Module):
    """Attention leaves a transposed tensor behind, on which dropout works."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.3, batch_first=True, **options)  # type: ignore[arg-type]
        self.body, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


def network(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *middle, nn.Flatten(), nn.Linear(4 * 6 * 6, 3))


RANDOM: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "encoder": lambda: (Encoder(), rows(4, 5, 8)),
    "encoder, norm first": lambda: (Encoder(norm_first=True, activation="gelu"), rows(4, 5, 8)),
    "dropout2d": lambda: (network(nn.ReLU(), nn.Dropout2d()), rows(4, 3, 6, 6)),
    "alpha dropout": lambda: (network(nn.SELU(), nn.AlphaDropout(0.2)), rows(4, 3, 6, 6)),
    "dropout in place": lambda: (network(nn.ReLU(True), nn.Dropout(0.3, inplace=True)), rows(4, 3, 6, 6)),
}


@pytest.mark.parametrize("method", [fg.ForwardGradient(), fg.ForwardGradient(3), fg.ForwardGradient(2, perturb=fg.Activity())], ids=repr)
@pytest.mark.parametrize("name", RANDOM)
def test_random_models_are_followed_and_see_the_masks_of_an_ordinary_pass(name: str, method: fg.Estimator) -> None:
    torch.manual_seed(0)
    model, x = RANDOM[name]()
    loss = classify(x)
    one, other = both(model.double(), loss, method)
    same(one, other)
    assert ways(one[2], loss) == [False]
    torch.manual_seed(5)
    ordinary = [loss(model).detach() for _ in range(2)]  # `both` makes two steps of one state of the generator
    torch.testing.assert_close(one[0].loss, ordinary[1], rtol=1e-14, atol=0)


def test_attention_with_dropout_is_torchs_own() -> None:
    q, k, v = (rows(2, 2, 5, 4) * scale for scale in (1, 2, 3))
    masks: list[Tensor | None] = [None, torch.ones(5, 5, dtype=torch.bool).tril(), rows(5, 5)]
    masks.append(torch.zeros(5, 5, dtype=torch.bool))  # rows without a weight
    for mask in masks:
        for causal in (False, True) if mask is None else (False,):
            torch.manual_seed(3)
            ordinary = F.scaled_dot_product_attention(q, k, v, mask, 0.4, causal)
            torch.manual_seed(3)
            found, _, _ = explicit(lambda q, m=mask, c=causal: F.scaled_dot_product_attention(q, k, v, m, 0.4, c), q, rows(1, 2, 2, 5, 4))  # type: ignore[misc]
            torch.testing.assert_close(found, ordinary, rtol=1e-14, atol=1e-15)


# Every number by itself, arithmetic and norms ---------------------------------------------------------------------------------------------

W, B = rows(6) + 2, rows(6) - 1
UNITS: dict[str, Function] = {
    "tanh": torch.tanh, "tanh_": lambda x: (x * 1).tanh_(), "sigmoid": torch.sigmoid, "sigmoid_": lambda x: torch.sigmoid_(x * 1),
    "exp": torch.exp, "exp_": lambda x: (x * 1).exp_(), "log": lambda x: x.abs().log(), "sqrt": lambda x: x.square().sqrt(),
    "rsqrt": lambda x: x.square().rsqrt(), "abs_": lambda x: (x * 1).abs_(), "neg": lambda x: -x, "square_": lambda x: (x * 1).square_(),
    "gelu": F.gelu, "gelu tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu,
    "silu in place": lambda x: F.silu(x * 1, inplace=True),
    "mish": F.mish, "mish in place": lambda x: F.mish(x * 1, inplace=True), "hardswish": F.hardswish,
    "hardswish in place": lambda x: F.hardswish(x * 1, True), "hardsigmoid": F.hardsigmoid,
    "hardsigmoid in place": lambda x: F.hardsigmoid(x * 1, inplace=True), "relu6": F.relu6,
    "relu6 in place": lambda x: F.relu6(x * 1, True),
    "hardtanh": lambda x: F.hardtanh(x, -2, 1.5), "hardtanh_": lambda x: F.hardtanh_(x * 1, -2, 1.5),
    "hardtanh in place": lambda x: F.hardtanh(x * 1, inplace=True), "leaky relu": F.leaky_relu,
    "leaky_relu_": lambda x: F.leaky_relu_(x * 1, 0.2), "leaky relu in place": lambda x: F.leaky_relu(x * 1, 0.2, True), "elu": F.elu,
    "elu_": lambda x: F.elu_(x * 1, 0.7), "elu in place": lambda x: F.elu(x * 1, alpha=0.7, inplace=True), "celu": lambda x: F.celu(x, 0.5),
    "celu in place": lambda x: F.celu(x * 1, 0.5, True), "selu": F.selu, "selu in place": lambda x: F.selu(x * 1, inplace=True),
    "softplus": lambda x: F.softplus(x, 0.5, 3), "mul": lambda x: x * x.tanh(), "mul number": lambda x: 3 * x,
    "mul broadcast": lambda x: x[0] * x,
    "mul still": lambda x: W * x, "mul_": lambda x: (x * 1).mul_(x.tanh()),
    "div": lambda x: x / (x.square() + 1), "div still": lambda x: W / (x.square() + 1), "div_": lambda x: (x * 1).div_(W),
    "div_ moving": lambda x: (x * 1).div_(x.exp()), "sub": lambda x: x - x[0], "sub still": lambda x: W - x, "sub number": lambda x: x - 2,
    "sub_": lambda x: (x * 1).sub_(x.tanh()), "softmax": lambda x: F.softmax(x, 1), "softmax last": lambda x: x.softmax(-1),
    "log_softmax": lambda x: F.log_softmax(x, dim=0), "layer norm": lambda x: F.layer_norm(x, (6,), W, B),
    "layer norm moving": lambda x: F.layer_norm(x, (3, 6), x[0], x[1]), "layer norm bare": lambda x: F.layer_norm(x, (3, 6)),
    "layer norm of what stands still": lambda x: F.layer_norm(X, (6,), x[0, 0], x[0, 1]),
    "batch norm": lambda x: F.batch_norm(x, W[:3], W[3:], B[:3], B[3:]),
    "batch norm moving": lambda x: F.batch_norm(x, W[:3], W[3:], x[0, :, 0], x[1, :, 1]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap, for mish
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", UNITS)
def test_a_rule_gives_what_torch_does(name: str, count: int) -> None:
    function, tangents = UNITS[name], V[:count]
    value, moves = plain(function, X.clone(), tangents)
    out, moved, found = explicit(function, X.clone(), tangents)
    assert torch.equal(out, value)
    torch.testing.assert_close(moved, moves, rtol=1e-11, atol=1e-12)
    assert {way.function for way in found if way.kind == "dual numbers"} <= {"__getitem__"}


def test_a_product_with_itself_in_place_has_twice_the_derivative() -> None:
    """Against the formula: torch's own rule reads the tangent that it has just written."""
    _, moved, _ = explicit(lambda x: (h := x * 2).mul_(h), X, V)
    torch.testing.assert_close(moved, 8 * X * V)


IN_PLACE: dict[str, Function] = {
    "silu": lambda h: F.silu(h, inplace=True), "hardswish": lambda h: F.hardswish(h, True), "leaky": lambda h: F.leaky_relu_(h, 0.1),
    "mul": lambda h: h.mul_(3), "div": lambda h: h.div_(h.detach().exp()), "tanh": Tensor.tanh_, "relu6": lambda h: F.relu6(h, True),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_is_refused_where_a_view_looks_on(name: str) -> None:
    def function(x: Tensor) -> Tensor:
        h = x * 1
        part = h[:, 0]
        IN_PLACE[name](h)
        return h.sum(1) + part

    with pytest.raises(Unfollowed, match="in place"):
        explicit(function, X, V)


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_behind_a_relu_that_others_follow(name: str) -> None:
    """What a ReLU passes on may be written to; the ReLU of another name may not lose its own."""

    def function(x: Tensor) -> Tensor:
        h = x * 1
        first, second = F.relu(h), F.relu(h)
        IN_PLACE[name](first)
        return first + second + h

    value, moves = plain(function, X, V)
    out, moved, _ = explicit(function, X, V)
    torch.testing.assert_close(out, value, rtol=1e-14, atol=0)
    torch.testing.assert_close(moved, moves, rtol=1e-12, atol=1e-13)


def test_a_module_that_asks_for_in_place_by_position_is_seen() -> None:
    module = nn.Threshold(0.1, 0.0, inplace=True)
    with pytest.raises(Unfollowed, match="in place"):
        explicit(lambda x: module(x * 1), X, V)


def test_what_only_looks_at_values_does_not_move() -> None:
    def function(x: Tensor) -> Tensor:
        mask = (x > 0) & ~torch.isnan(x)
        noise = x.new_empty(x.shape[:1]).bernoulli_(0.5)
        return torch.where(mask, x * noise.view(-1, 1, 1), torch.zeros_like(x))

    torch.manual_seed(2)
    value, moves = plain(function, X, V)
    torch.manual_seed(2)
    out, moved, _ = explicit(function, X, V)
    assert torch.equal(out, value)
    torch.testing.assert_close(moved, moves)


# Local losses ------------------------------------------------------------------------------------------------------------------------


def vgg() -> tuple[nn.Module, Tensor]:
    body = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2)]
    head = [nn.Flatten(), nn.Linear(32, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 3)]
    return nn.Sequential(*body, *head), rows(4, 3, 8, 8)


LOCAL: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "vgg": vgg,
    "encoder": lambda: (Encoder(), rows(4, 5, 8)),
    "views": lambda: (nn.Sequential(nn.Linear(6, 8), nn.SiLU(True), nn.Unflatten(1, (2, 4)), nn.Flatten(), nn.Linear(8, 3)), rows(4, 6)),
}


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("name", LOCAL)
def test_local_losses_take_the_fast_way(name: str, feedback: bool) -> None:
    """Behind a block nothing moves, and what does not move may be viewed."""
    torch.manual_seed(0)
    model, x = LOCAL[name]()
    loss = classify(x)
    one, other = both(model.double(), loss, fg.LocalLosses(tangents=2, feedback=feedback))
    same(one, other)
    assert ways(one[2], loss) == [False]


def test_the_same_seed_gives_the_same_bits_with_dropout() -> None:
    torch.manual_seed(0)
    model, loss = Encoder().double(), classify(rows(4, 5, 8))
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(fg.estimate_grad_(loss, model, fg.ForwardGradient(2), generator=seeded()).derivatives)
    assert torch.equal(*found)


def test_a_bias_moves_alone_beside_a_frozen_weight_with_several_tangents() -> None:
    """As many tangents as examples: their dimensions must not be taken for one another."""
    torch.manual_seed(0)
    model, loss = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), classify(rows(3, 4))
    model[0].weight.requires_grad_(False)
    one, other = both(model, loss, fg.ForwardGradient(3, perturb=fg.LowRank()))
    same(one, other)
    assert ways(one[2], loss) == [False]
