"""Attention by tiles: equal to torch's plain formula and its derivative in float64, with the same dropout both ways, and linear memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.engines.test_engines import compare, uncompiled  # noqa: F401  # a fixture among them
from tests.forward_mode.test_rules import explicit, plain
from tests.support.cases import seeded
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from forwardgrad.diagnostics import peak_bytes
from forwardgrad.forward_mode import attention_by_tiles
from forwardgrad.forward_mode.dual_numbers import Alike
from forwardgrad.forward_mode.explicit import Explicit
from forwardgrad.forward_mode.notes import asking
from forwardgrad.forward_mode.rules import tiles

Attention = Callable[..., Tensor]
sdpa: Attention = F.scaled_dot_product_attention


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def parted(call: Attention, tensors: list[Tensor], tangents: list[Tensor | None]) -> tuple[Attention, list[Tensor], list[Tensor]]:
    """The call as a function of those of its tensors that move, these, and their tangents."""
    moving = {index: v for index, v in enumerate(tangents) if v is not None}

    def of(*parts: Tensor) -> Tensor:
        instead = dict(zip(moving, parts, strict=True))
        return call(*(instead.get(index, t) for index, t in enumerate(tensors)))

    return of, [tensors[index] for index in moving], list(moving.values())


def by_rule(call: Attention, tensors: list[Tensor], tangents: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Value and K derivatives of a call of some tensors by the rule."""
    of, given, moves = parted(call, tensors, tangents)
    with torch.no_grad(), asking(), Explicit(len(moves[0]), {id(t): v for t, v in zip(given, moves, strict=True)}) as evaluation:
        out = of(*given)
        moved = evaluation.derivative(out)
    assert {way.kind for way in evaluation.ways or () if way.function == "scaled_dot_product_attention"} == {"rule"}
    return out, moved


def by_duals(call: Attention, tensors: list[Tensor], tangents: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """The same by torch's forward mode as the library uses it, one tangent after the other from the same random state."""
    of, given, moves = parted(call, tensors, tangents)
    state, along = torch.get_rng_state(), []
    for k in range(len(moves[0])):
        torch.set_rng_state(state)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Alike():
            value, moved = jvp(of, tuple(given), tuple(v[k] for v in moves))
        along.append(moved)
    return value, torch.stack(along)


def both(call: Attention, tensors: list[Tensor], tangents: list[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    state = torch.get_rng_state()
    found = by_rule(call, tensors, tangents)
    torch.set_rng_state(state)
    return [found, by_duals(call, tensors, tangents)]


def reference(call: Attention, tensors: list[Tensor], tangents: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """The same by torch's plain formula and its forward mode alone."""
    of, given, moves = parted(call, tensors, tangents)
    along = []
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for k in range(len(moves[0])):
            value, moved = jvp(of, tuple(given), tuple(v[k] for v in moves))
            along.append(moved)
    return value, torch.stack(along)


# Equal to the formula -------------------------------------------------------------------------------------------------------------------


def mask_of(kind: str, batch: int, heads: int, rows: int, keys: int) -> Tensor | None:
    seen = draw(batch, heads, rows, keys, seed=9) > -0.5
    masks = {
        "none": None,
        "causal": None,
        "by head": seen,
        "keys": seen[:, :1, :1],
        "empty rows": seen & (torch.arange(rows) % 3 > 0).unsqueeze(1),
        "numbers": draw(batch, 1, rows, keys, seed=8),
        "numbers, −∞": draw(rows, keys, seed=8).masked_fill(~seen[0, 0], -math.inf),
    }
    return masks[kind]


MASKS = ["none", "causal", "by head", "keys", "empty rows", "numbers", "numbers, −∞"]


@pytest.mark.product(each=4)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sizes", [(7, 7, 4, 4), (5, 11, 4, 2), (11, 5, 4, 1)], ids=str)
@pytest.mark.parametrize("moving", ["all", "key", "last"])
@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "one tile"])
def test_it_is_the_formula(mask: str, sizes: tuple[int, ...], moving: str, tiled: bool, request: pytest.FixtureRequest) -> None:
    if tiled:
        request.getfixturevalue("small_tiles")
    length, keys, many, shared = sizes
    scale = None if length == keys else 0.7
    tensors = [draw(2, many, length, 4), draw(2, shared, keys, 4, seed=1), draw(2, shared, keys, 3, seed=2)]
    if (given := mask_of(mask, 2, many, length, keys)) is not None:
        tensors.append(given)
    names = ["query", "key", "value", "mask"][: len(tensors)]
    last = [name for name, t in zip(names, tensors, strict=True) if t.is_floating_point()][-1]
    chosen = last if moving == "last" else moving
    moves = [
        draw(2, *t.shape, seed=5) if t.is_floating_point() and chosen in ("all", name) else None
        for name, t in zip(names, tensors, strict=True)
    ]

    def call(*tensors: Tensor) -> Tensor:
        return sdpa(*tensors, is_causal=mask == "causal", scale=scale, enable_gqa=many != shared)

    value, moved = reference(call, tensors, moves)
    for out, derivative in both(call, tensors, moves) if tiled else [by_rule(call, tensors, moves)]:  # of one tile torch makes the other
        torch.testing.assert_close(out, value, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(derivative, moved, rtol=1e-11, atol=1e-12)


SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {  # of query, key, value and mask
    "matrices": ((7, 4), (9, 4), (9, 3)),
    "one row": ((2, 1, 4), (2, 9, 4), (2, 9, 3), (2, 1, 9)),
    "one batch": ((2, 7, 4), (2, 9, 4), (2, 9, 3), (7, 9)),
    "keys for all": ((2, 3, 7, 4), (9, 4), (3, 9, 3), (2, 1, 1, 9)),
    "queries for all": ((7, 4), (2, 3, 9, 4), (1, 1, 9, 3), (9,)),
    "five dimensions": ((2, 1, 3, 4, 4), (1, 2, 1, 5, 4), (2, 2, 3, 5, 3), (2, 1, 4, 1)),
    "a larger mask": ((3, 4, 4), (3, 5, 4), (3, 5, 3), (2, 3, 4, 5)),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("small_tiles")
def test_batches_broadcast(name: str) -> None:
    tensors = [draw(*shape, seed=index) for index, shape in enumerate(SHAPES[name])]
    moves: list[Tensor | None] = [draw(3, *t.shape, seed=5) for t in tensors]
    value, moved = reference(sdpa, tensors, moves)
    for out, derivative in both(sdpa, tensors, moves):
        torch.testing.assert_close(out, value, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(derivative, moved, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("small_tiles")
def test_transposed_memory_and_chunks_of_several_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind `view(B, T, H, d).transpose(1, 2)`; parts of two examples that have few numbers each."""
    monkeypatch.setattr(tiles, "_MOST", {"cpu": 100})
    tensors = [draw(5, 4, 3, 4, seed=index).transpose(1, 2) for index in range(3)]
    moves: list[Tensor | None] = [draw(2, 5, 4, 3, 4, seed=5 + index).transpose(2, 3) for index in range(3)]
    assert len(tiles.cuts(tiles.AttentionCall(*tensors, None, 0.0, False, 0.5, None, (5, 3)))) == 3
    value, moved = reference(sdpa, tensors, moves)
    for out, derivative in both(sdpa, tensors, moves):
        torch.testing.assert_close(out, value, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(derivative, moved, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mask", ["none", "by head", "empty rows", "numbers, −∞"])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_what_is_not_a_number_spreads_as_in_the_formula(where: str, mask: str) -> None:
    """Surveys of where examples meet go by that, behind a mask, too: the next batch may have another one."""
    tensors = {"query": draw(2, 3, 7, 4), "key": draw(2, 3, 9, 4, seed=1), "value": draw(2, 3, 9, 3, seed=2)}
    tensors[where][0, 1, 2] = math.nan
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        ordinary = sdpa(*tensors.values(), mask_of(mask, 2, 3, 7, 9))
        with Explicit(0):
            still = sdpa(*tensors.values(), mask_of(mask, 2, 3, 7, 9))
        moved, _, _ = explicit(
            lambda q: sdpa(q, tensors["key"], tensors["value"], mask_of(mask, 2, 3, 7, 9)), tensors["query"], draw(1, 2, 3, 7, 4)
        )
    for found in (still, moved):
        torch.testing.assert_close(found, ordinary, rtol=1e-12, atol=1e-13, equal_nan=True)


@pytest.mark.usefixtures("small_tiles")
def test_several_tangents_at_once_are_each_by_itself() -> None:
    q, v = draw(2, 7, 4), draw(5, 2, 7, 4, seed=3)
    value, moves, _ = explicit(lambda q: sdpa(q, q, q, is_causal=True), q, v)
    for k in range(5):
        out, moved, _ = explicit(lambda q: sdpa(q, q, q, is_causal=True), q, v[k : k + 1])
        torch.testing.assert_close(out, value, rtol=0, atol=0)
        torch.testing.assert_close(moved[0], moves[k], rtol=1e-13, atol=1e-14)
    out, moved = plain(lambda q: sdpa(q, q, q, is_causal=True), q, v)  # all at once by vmap
    torch.testing.assert_close(out, value, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(moved, moves, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("mask", ["causal", "empty rows", "numbers"])
def test_it_is_the_central_difference(mask: str, p: float) -> None:
    """Of the values that the library makes where nothing moves: with dropout each has the same masks from one random state."""
    q, k, v = draw(2, 3, 7, 4), draw(2, 3, 8, 4, seed=1), draw(2, 3, 8, 3, seed=2)
    moves = [draw(1, *t.shape, seed=6 + index) for index, t in enumerate((q, k, v))]
    call = lambda q, k, v: sdpa(q, k, v, mask_of(mask, 2, 3, 7, 8), p, mask == "causal")  # noqa: E731

    def still(step: float) -> Tensor:
        torch.manual_seed(3)
        with torch.no_grad(), Explicit(0):
            return call(*(t + step * m[0] for t, m in zip((q, k, v), moves, strict=True)))

    torch.manual_seed(3)
    out, moved = by_rule(call, [q, k, v], list(moves))
    torch.testing.assert_close(out, still(0.0), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(moved[0], (still(1e-5) - still(-1e-5)) / 2e-5, rtol=1e-7, atol=1e-8)


# Dropout --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "one tile"])
@pytest.mark.parametrize("causal", [True, False])
def test_values_and_tangents_share_one_mask_of_dropout(tiled: bool, causal: bool, request: pytest.FixtureRequest) -> None:
    if tiled:
        request.getfixturevalue("small_tiles")
    q, k, v = draw(2, 9, 4), draw(2, 9, 4, seed=1), draw(2, 9, 3, seed=2)
    moves: list[Tensor | None] = [draw(2, *t.shape, seed=4) for t in (q, k, v)]
    call = lambda q, k, v: sdpa(q, k, v, None, 0.4, causal)  # noqa: E731
    torch.manual_seed(1)
    weights, _ = by_rule(call, [q, k, torch.eye(9, dtype=q.dtype).expand(2, 9, 9)], [moves[0], None, None])
    scores = (q @ k.mT / 2).masked_fill(torch.ones(9, 9).triu(1).bool() if causal else torch.zeros(9, 9).bool(), -math.inf)
    factor = torch.where(weights == 0, 0.0, weights / scores.softmax(-1))  # what was drawn, read off the weights
    kept = factor[weights != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.6))
    assert (weights == 0).sum() > (scores == -math.inf).sum()

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT / 2).masked_fill(torch.ones(9, 9).triu(1).bool() if causal else torch.zeros(9, 9).bool(), -math.inf)
        return (scores.softmax(-1) * factor) @ v

    torch.manual_seed(1)
    found = both(call, [q, k, v], moves)
    value, moved = reference(formula, [q, k, v], moves)
    for out, derivative in found:
        torch.testing.assert_close(out, value, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(derivative, moved, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("small_tiles")
def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    """500 masks of 49 factors. Each mean is within z < 4.5 of 1: a correct one fails under one seed in 3,000. Of 1,176 correlations each is
    within z < 6: one seed in 400,000."""
    count, q = 500, draw(1, 7, 4)
    weights, many = (q @ q.mT / 2).softmax(-1), q.expand(count, 7, 4)
    torch.manual_seed(0)
    with torch.no_grad(), Explicit(0):
        out = sdpa(many, many, torch.eye(7, dtype=q.dtype).expand(count, 7, 7), None, 0.3)
    factor = out / weights
    assert set(factor.mul(0.7).round(decimals=9).unique().tolist()) == {0.0, 1.0}
    assert float((factor.mean(0) - 1).abs().max()) < 4.5 * (0.3 / 0.7 / count) ** 0.5
    off = (factor - 1).flatten(1)
    correlations = off.T @ off / count / (0.3 / 0.7)  # within a tile and between them
    assert float((correlations - correlations.diag().diag()).abs().max()) < 6 * count**-0.5


@pytest.mark.usefixtures("small_tiles")
def test_what_is_drawn_does_not_depend_on_what_moves() -> None:
    q, k, v = draw(2, 3, 7, 4), draw(2, 3, 8, 4, seed=1), draw(2, 3, 8, 3, seed=2)
    states, outs = [], []
    for moving in ([], [0], [1, 2], [0, 1, 2]):
        torch.manual_seed(5)
        tensors = [q.clone(), k.clone(), v.clone()]
        with torch.no_grad(), Explicit(2, {id(tensors[i]): draw(2, *tensors[i].shape, seed=9) for i in moving}):
            outs.append(sdpa(*tensors, dropout_p=0.5))
        states.append(torch.get_rng_state())
    for out, state in zip(outs[1:], states[1:], strict=True):
        torch.testing.assert_close(out, outs[0], rtol=1e-13, atol=1e-14)
        assert torch.equal(state, states[0])


# Other types ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_keeps_its_type_and_sums_in_float32(dtype: torch.dtype) -> None:
    tensors = [draw(2, 7, 4, seed=index, dtype=dtype) for index in range(3)]
    moves: list[Tensor | None] = [draw(2, 2, 7, 4, seed=5 + index, dtype=dtype) for index in range(3)]
    value, moved = reference(sdpa, [t.double() for t in tensors], [None if v is None else v.double() for v in moves])
    eps = torch.finfo(dtype).eps
    for out, derivative in both(sdpa, tensors, moves):
        assert out.dtype == derivative.dtype == dtype
        torch.testing.assert_close(out.double(), value, rtol=2 * eps, atol=2 * eps)
        assert float((derivative - moved).norm() / moved.norm()) < 4 * eps


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "one tile"])
def test_autocast_casts_as_it_does_elsewhere(tiled: bool, request: pytest.FixtureRequest) -> None:
    if tiled:
        request.getfixturevalue("small_tiles")
    tensors = [draw(2, 7, 4, seed=index, dtype=torch.float32) for index in range(3)]
    moves: list[Tensor | None] = [draw(2, 2, 7, 4, seed=5 + index, dtype=torch.float32) for index in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        ordinary = sdpa(*tensors)
        found = both(sdpa, tensors, moves)
    value, moved = reference(sdpa, [t.bfloat16().double() for t in tensors], [None if v is None else v.double() for v in moves])
    for out, derivative in found:
        assert out.dtype == derivative.dtype == ordinary.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), value, rtol=0.01, atol=0.01)
        assert float((derivative - moved).norm() / moved.norm()) < 0.01


@pytest.mark.usefixtures("small_tiles")
def test_the_function_for_others_goes_through_torchs_transforms() -> None:
    q, k, v = (draw(2, 4, 7, 4, seed=index) for index in range(3))
    moves = draw(3, 2, 4, 7, 4, seed=5)
    options: dict[str, Any] = {"scale": 0.3, "enable_gqa": True}
    out, moved = vmap(lambda t: jvp(lambda q: attention_by_tiles(q, k[:, :2], v[:, :2], **options), (q,), (t,)), out_dims=(None, 0))(moves)
    value, expected = reference(lambda q: sdpa(q, k[:, :2], v[:, :2], **options), [q], [moves])
    torch.testing.assert_close(out, value, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(moved, expected, rtol=1e-11, atol=1e-12)
    gradients = [grad(lambda q, f=f: f(q, k, v, is_causal=True).square().sum())(q) for f in (attention_by_tiles, sdpa)]  # type: ignore[misc]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)
    with pytest.raises(RuntimeError, match="Expected size"):
        attention_by_tiles(q, k[..., :2], v)


# What is left to torch ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda q: sdpa(q, q[..., :2], q),
        lambda q: sdpa(q, q, q, torch.ones(7, 7, dtype=torch.bool), is_causal=True),
        lambda q: sdpa(q, q, q, torch.ones(7, 6, dtype=torch.bool)),
        lambda q: sdpa(q, q[:, :2], q[:, :2], enable_gqa=True),
        lambda q: sdpa(q, q[:, :2], q[:, :2]),
        lambda q: sdpa(q, q.float(), q),
    ],
)
def test_a_mistake_is_told_as_torch_tells_it(call: Callable[[Tensor], Tensor]) -> None:
    q = draw(2, 3, 7, 4)
    with sdpa_kernel(SDPBackend.MATH), pytest.raises(RuntimeError) as ordinary:
        call(q)
    with sdpa_kernel(SDPBackend.MATH), pytest.raises(RuntimeError) as found:
        explicit(call, q, draw(1, 2, 3, 7, 4))
    assert str(found.value).splitlines()[0] == str(ordinary.value).splitlines()[0]


def test_a_mask_that_is_a_kind_of_its_own_is_left_to_torch() -> None:
    q, k = draw(1, 2, 3, 4), draw(1, 2, 5, 4, seed=1)
    with sdpa_kernel(SDPBackend.MATH):
        out, moved, _ = explicit(lambda q: sdpa(q, k, k, causal_lower_right(3, 5)), q, draw(2, 1, 2, 3, 4))
        seen = torch.ones(3, 5, dtype=torch.bool).tril(2)
        value, moves = reference(lambda q: sdpa(q, k, k, seen), [q], [draw(2, 1, 2, 3, 4)])
    torch.testing.assert_close(out, value)
    torch.testing.assert_close(moved, moves)


# Memory ---------------------------------------------------------------------------------------------------------------------------------

HEADS, WIDTH = 2, 8


def held(length: int, count: int, *, causal: bool, p: float = 0.0) -> int:
    """Peak bytes of attention with K tangents, above what goes in."""
    q = torch.randn(1, HEADS, length, WIDTH)
    v = torch.randn(count, *q.shape)

    def work() -> None:
        with torch.no_grad(), Explicit(count, {id(q): v}):
            sdpa(q, q, q, None, p, causal)

    return peak_bytes(work, [q.device])


@pytest.mark.parametrize(("causal", "p"), [(True, 0.1), (False, 0.0)])
@pytest.mark.parametrize("count", [1, 4])
def test_memory_grows_with_the_length_and_not_with_its_square(count: int, causal: bool, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_MOST", {"cpu": 2**15})  # tiles of one size for all three
    monkeypatch.setattr(tiles, "_ROWS", 128)
    low, middle, high = (held(length, count, causal=causal, p=p) for length in (512, 1024, 2048))
    assert high - middle <= 2.02 * (middle - low)
    assert high <= 0.1 * 4 * HEADS * 2048**2  # of what the scores alone would take


def test_tiles_as_they_are_hold_a_fraction_of_the_scores() -> None:
    assert held(2048, 4, causal=False) <= 0.15 * 4 * HEADS * 2048**2
