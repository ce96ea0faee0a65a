"""The graph of a step: what it computes, what is left out of it, and what cannot be one."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import rows
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import jvp

import forwardgrad.engines.trace as trace_module
from forwardgrad.engines.compiled import compiled
from forwardgrad.engines.reads import Untraceable
from forwardgrad.engines.trace import trace

aten = torch.ops.aten


def traced(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[set[object], list[Tensor]]:
    """The operations of the graph of a function, and what the graph says of the inputs."""
    found = trace(lambda: [function(*inputs)], inputs)
    with torch.no_grad():
        return {node.target for node in found.graph.graph.nodes if node.op == "call_function"}, found.graph(*inputs, *found.constants)


@pytest.mark.parametrize(
    ("function", "shapes", "left"),
    [
        (lambda x, w, b: F.linear(x, w, b).tanh(), [(5, 4), (3, 4), (3,)], 2),
        (lambda x, w, b: torch.bmm(x, w) + b, [(2, 5, 4), (2, 4, 3), (3,)], 2),
        (lambda x, w, b: F.conv2d(x, w, b), [(2, 3, 5, 5), (4, 3, 2, 2), (4,)], 2),
    ],
    ids=["linear", "bmm", "convolution"],
)
def test_products_with_what_does_not_move_are_left_out(function: Callable[..., Tensor], shapes: list[tuple[int, ...]], left: int) -> None:
    x, w, b = (rows(*shape) + index for index, shape in enumerate(shapes))
    v = rows(*shapes[0]).flip(0)
    derivative = lambda x, w, b, v: jvp(lambda x: function(x, w, b), (x,), (v,))[1]  # noqa: E731
    found = trace(lambda: [derivative(x, w, b, v)], [x, w, b, v])
    products = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default)
    assert sum(node.target in products for node in found.graph.graph.nodes) <= left
    torch.testing.assert_close(found.graph(x, w, b, v)[0], derivative(x, w, b, v))


def test_a_column_times_a_row_is_a_product_of_elements() -> None:
    targets, [found] = traced(torch.mm, a := rows(4, 1), b := rows(1, 3) + 1)
    assert aten.mm.default not in targets
    assert torch.equal(found, a @ b)


def test_a_graph_writes_what_the_step_wrote_and_reads_what_it_read() -> None:
    x, kept, elsewhere = rows(3), torch.zeros(3, dtype=torch.float64), torch.tensor(2.0)

    def step() -> list[Tensor]:
        kept[:2].add_(x[:2] * elsewhere)
        return [kept.sum()]

    found = trace(step, [x, kept])
    assert any(constant is elsewhere for constant in found.constants)
    for value, wanted in ((2.0, 2 * x[:2]), (3.0, 3 * x[:2])):
        kept.zero_()
        elsewhere.fill_(value)
        [total] = found.graph(x, kept, *found.constants)
        torch.testing.assert_close(kept[:2], wanted)
        assert kept[2] == 0
        torch.testing.assert_close(total, wanted.sum())


@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_a_product_that_is_scaled_and_added_keeps_its_factor(first: bool) -> None:
    a, b, c = rows(16, 16), rows(16, 8), rows(8, 16) + 1
    function = lambda a, b, c: torch.add(a, b @ c, alpha=0.1) if first else torch.add(b @ c, a, alpha=0.1)  # noqa: E731
    found = trace(lambda: [function(a, b, c)], [a, b, c])
    assert not any("alpha" in node.kwargs for node in found.graph.graph.nodes)
    torch.testing.assert_close(found.graph(a, b, c)[0], function(a, b, c))


def test_the_compiler_keeps_the_factor_of_a_product_that_is_added() -> None:
    a, b, c = rows(64, 64, dtype=torch.float32), rows(64, 32, dtype=torch.float32), rows(32, 64, dtype=torch.float32) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler uses what torch itself calls deprecated
        found = compiled(trace(lambda: [torch.add(a, b @ c, alpha=0.1)], [a, b, c]), [a, b, c])
    torch.testing.assert_close(found(a, b, c)[0], a + 0.1 * (b @ c))


def test_no_view_is_left_that_needs_the_order_in_memory_of_the_step() -> None:
    x = rows(4, 2, 6, 8)
    found = trace(lambda: [F.dropout(torch.matmul(x.transpose(2, 3), x), 0.4)], [x])  # as in attention with dropout
    assert found.random
    assert not any(node.target in (aten.view.default, aten._unsafe_view.default) for node in found.graph.graph.nodes)
    torch.manual_seed(1)
    [drawn] = found.graph(x)
    torch.manual_seed(1)
    assert torch.equal(drawn, F.dropout(torch.matmul(x.transpose(2, 3), x), 0.4))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x * x.sum().item(), "a value is read off a tensor"),
        (lambda x: x if x.sum() > 0 else -x, "a value is read off a tensor"),
        (lambda x: x[x > 0].sum(), "indexing with a mask"),
        (lambda x: x.nonzero().sum(), "depends on the values of a tensor"),
    ],
    ids=["item", "branch", "mask", "nonzero"],
)
def test_what_depends_on_values_is_no_graph(function: Callable[[Tensor], Tensor], reason: str) -> None:
    with pytest.raises(Untraceable, match=reason):
        traced(function, rows(4))


def test_indexing_by_whole_numbers_is_harmless() -> None:
    x, places = rows(4), torch.tensor([2, 0])
    assert torch.equal(traced(lambda x, places: x[places], x, places)[1][0], x[places])


def test_what_a_graph_draws_and_how_precisely_it_computes_is_known() -> None:
    x = rows(4, 4, dtype=torch.float32)
    assert not trace(lambda: [x * 2], [x]).random
    assert trace(lambda: [F.dropout(x)], [x]).random

    def halved() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return [(x @ x).float()]

    assert [trace(step, [x]).lowest for step in (lambda: [x @ x], halved)] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("rows_", "columns", "turned"), [(11, 20, False), (12, 20, True), (48, 20, True), (49, 20, False), (49, 12, True), (5, 5, False)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_of_few_rows_or_columns_is_turned_and_stays_what_it_is(rows_: int, columns: int, turned: bool, bias: bool) -> None:
    x, w, b = rows(rows_, 6), rows(columns, 6) - 1, rows(columns) if bias else None
    inputs = [x, w] if b is None else [x, w, b]
    found = trace(lambda: [F.linear(x, w, b).relu().view(-1).sum()], inputs)
    placeholder = next(iter(found.graph.graph.nodes))
    products = [node for node in found.graph.graph.nodes if node.target in (aten.mm.default, aten.addmm.default)]
    assert len(products) == 1
    assert any(node.target is aten.addmm.default for node in products) == (bias and not turned)
    first = products[0].args[-2]
    assert (first is not placeholder) == turned
    torch.testing.assert_close(found.graph(*inputs)[0], F.linear(x, w, b).relu().sum())


@pytest.mark.parametrize(("columns", "summed"), [(1, True), (12, True), (13, False)])
@pytest.mark.parametrize("bias", [False, True])
def test_on_a_gpu_a_small_product_of_few_columns_is_added_up_and_stays_what_it_is(
    columns: int, summed: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_module, "_turn", trace_module._add_up)  # as if this were one
    x, w, b = rows(49, 6), rows(columns, 6) - 1, rows(columns) if bias else None
    inputs = [x, w] if b is None else [x, w, b]
    found = trace(lambda: [F.linear(x, w, b).relu().view(-1).sum()], inputs)
    assert any(node.target in (aten.mm.default, aten.addmm.default) for node in found.graph.graph.nodes) != summed
    torch.testing.assert_close(found.graph(*inputs)[0], F.linear(x, w, b).relu().sum())


@pytest.mark.parametrize(
    ("target", "dtype", "setting", "cut"),
    [
        (aten.convolution.default, torch.float32, "tf32", True),
        (aten.convolution.default, torch.float32, "ieee", False),
        (aten.convolution.default, torch.float64, "tf32", False),
        (aten.mm.default, torch.float32, "tf32", False),  # products of matrices are told apart from convolutions
        (aten.relu.default, torch.float32, "tf32", False),
    ],
)
def test_what_a_gpu_computes_with_ten_bits(target: object, dtype: torch.dtype, setting: str, cut: bool) -> None:
    graph = torch.fx.Graph()
    factor = graph.placeholder("x")
    with FakeTensorMode():
        factor.meta["val"] = torch.empty(2, 3, 5, 5, dtype=dtype, device="cuda")
    node, convolutions = graph.call_function(target, (factor,)), torch.backends.cudnn.conv  # type: ignore[arg-type, attr-defined]
    before = convolutions.fp32_precision
    try:
        convolutions.fp32_precision = setting
        assert trace_module._as_tf32(node) == cut
        assert trace_module.tf32() == {"products": False, "convolutions": setting == "tf32"}
    finally:
        convolutions.fp32_precision = before


@pytest.mark.parametrize(
    ("rate", "dtype", "turned"), [(0.0, torch.float32, True), (0.5, torch.float32, False), (0.0, torch.bfloat16, False)]
)
def test_products_stay_as_they_are_where_order_in_memory_or_low_precision_matters(rate: float, dtype: torch.dtype, turned: bool) -> None:
    x, w = rows(16, 6).to(dtype), rows(20, 6).to(dtype)
    found = trace(lambda: [F.dropout(F.linear(x, w), rate)], [x, w])
    assert sum(node.target is aten.t.default for node in found.graph.graph.nodes) == (4 if turned else 1)


def test_a_product_that_is_written_twice_is_made_once() -> None:
    x, w, b = rows(5, 4), rows(3, 4), rows(3)
    step = lambda: [F.linear(x / 2, w).exp(), F.linear(x / 2, w) * 2, F.linear(x, w), F.linear(x, w, b), F.linear(x, w, b).sin()]  # noqa: E731
    found = trace(step, [x, w, b])
    made = [node.target for node in found.graph.graph.nodes]
    assert made.count(aten.mm.default) == 2
    assert made.count(aten.addmm.default) == 1
    assert all(torch.equal(one, other) for one, other in zip(found.graph(x, w, b), step(), strict=True))


def test_products_of_different_random_numbers_stay_apart() -> None:
    x, w = rows(5, 4), rows(4, 4)
    found = trace(lambda: [F.dropout(x, 0.5) @ w, F.dropout(x, 0.5) @ w], [x, w])
    assert [node.target for node in found.graph.graph.nodes].count(aten.mm.default) == 2
    one, other = found.graph(x, w)
    assert not torch.equal(one, other)
