"""Trace a step of training into one graph of plain tensor operations, without Python, forward mode or vmap in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from forwardgrad.engines.reads import Reads, Untraceable, located
from forwardgrad.engines.updates import fold_updates

aten = torch.ops.aten

Step = Callable[[], Sequence[Tensor | None]]


@dataclass(frozen=True)
class Traced:
    """The graph of a step. It takes the inputs and then the `constants`, computes without writing to anything, writes what the step
    changed in place, and returns what the step returned.

    `random`: whether it draws from the global generators. `lowest`: the least precise type that it computes in.
    """

    graph: GraphModule
    constants: list[Tensor]
    random: bool
    lowest: torch.dtype


def trace(step: Step, inputs: Sequence[Tensor]) -> Traced:
    """The graph of what `step` does with the inputs, which it has to know of itself; it is run twice on the way, and writes to them.

    Raises Untraceable where what the step does depends on values of tensors that may change; and whatever the step raises.
    """
    shapes = TracingContext(FakeTensorMode())  # make_fx would make another one, with a look at the whole stack, for every tensor
    with torch.no_grad(), tracing(shapes):
        try:
            with as_compiling():
                graph = make_fx(lambda *_: _seen(step))(*inputs)
        except Untraceable as error:
            raise located(error) from error
        except NotImplementedError as error:
            if "Generator" in str(error):  # torch 2.11 says so itself
                raise Untraceable("the loss or the model draws from a generator of its own") from error
            raise
        constants = _lift_constants(graph)
        with without_autocast():  # what it did is in the graph
            functional = make_fx(functionalize(graph, remove="mutations"))(*(t.detach() for t in (*inputs, *constants)))
    random = any(_tagged(node, torch.Tag.nondeterministic_seeded) for node in functional.graph.nodes)
    _share_products(functional)
    _simplify(functional)
    _loosen_views(functional)
    # what is drawn in a graph is drawn in the order of memory, and a view by strides goes by it
    if not random and not any(node.target is aten.as_strided.default for node in functional.graph.nodes):
        _arrange_products(functional)
    fold_updates(functional)
    types = {value.dtype for node in functional.graph.nodes if (value := _value(node)) is not None and value.is_floating_point()}
    lowest = max(types or {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)
    if lowest == torch.float32 and any(_as_tf32(node) for node in functional.graph.nodes):
        lowest = torch.float16  # which has as many digits
    return Traced(functional, constants, random, lowest)


def _seen(step: Step) -> list[Tensor | None]:
    with Reads():
        return list(step())


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, operations compute in the precision of what they are given."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def as_compiling() -> Iterator[None]:
    """Inside, torch's optimizers keep their count of steps a tensor instead of reading it (`torch.compiler.is_compiling()`)."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def _lift_constants(graph: GraphModule) -> list[Tensor]:
    """Make inputs of the tensors that the step reads from elsewhere, such as the weights of a loss: they may be written to later."""
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    lifted: dict[int, tuple[Tensor, Node]] = {}
    for node in [node for node in graph.graph.nodes if node.op == "get_attr"]:
        tensor = getattr(graph, node.target)
        if not isinstance(tensor, Tensor):
            raise Untraceable("the loss or the model draws from a generator of its own")
        if id(tensor) not in lifted:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(f"constant_{len(lifted)}")
            lifted[id(tensor)] = tensor, last
        node.replace_all_uses_with(lifted[id(tensor)][1])
        graph.graph.erase_node(node)
    graph.recompile()
    return [tensor for tensor, _ in lifted.values()]


def tf32() -> dict[str, bool]:
    """Whether a GPU cuts the factors of float32 products to ten bits; in convolutions it does unless it is told otherwise."""
    convolutions = getattr(torch.backends.cudnn, "conv")  # noqa: B009  # unknown to its types
    kinds = {"products": torch.backends.cuda.matmul, "convolutions": convolutions}
    return {name: kind.fp32_precision == "tf32" for name, kind in kinds.items()}


def _as_tf32(node: Node) -> bool:
    """Whether it does so at this node."""
    factor = _value(node.args[0]) if node.args else None
    if factor is None or factor.device.type != "cuda" or factor.dtype != torch.float32:
        return False
    cut = tf32()
    return (cut["convolutions"] and node.target in _CONVOLUTIONS) or (cut["products"] and node.target in _MATRIX_PRODUCTS)


def _tagged(node: Node, tag: torch.Tag) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and tag in node.target.tags


def _value(node: Any) -> Tensor | None:
    """A tensor without numbers, of the shape and type of a node's result."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


_ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
_KEEP_ZERO = {
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default, aten.permute.default, aten.t.default),
    *(aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.select.int, aten.slice.Tensor),
    *(aten.alias.default, aten.clone.default, aten.detach.default, aten._to_copy.default),
}
_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.convolution.default}
_CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}
_MATRIX_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default}


def _share_products(graph: GraphModule) -> None:
    """Make a product of matrices once that is written down twice, as in two evaluations that begin with the same input.

    What else is written twice stays: its memory may be meant to be freed in between, and the compiler makes it part of what uses it.
    """
    numbers: dict[str, Node] = {}  # by what they compute from the inputs: the first node that does
    same: dict[Node, Node] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target._schema.is_mutable:
            break  # what the step changed is written at the end
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            continue
        args, kwargs = map_arg((node.args, node.kwargs), lambda arg: same.get(arg, arg))
        first = numbers.setdefault(f"{node.target} {args} {kwargs}", node)
        if first is not node:
            same[node] = first
            if node.target in (aten.mm.default, aten.addmm.default):
                node.replace_all_uses_with(first)
    graph.graph.eliminate_dead_code()


def _simplify(graph: GraphModule) -> None:
    """Leave out products with the tangent of what does not move, which forward mode writes down as zeros, and let a product of a column
    and a row be one of elements, which the compiler makes part of what uses it: the update of a rank-one step is one pass."""
    zeros: set[Node] = set()
    for node in list(graph.graph.nodes):
        operands = [arg for arg in node.args if isinstance(arg, Node)]
        if node.target in _ZEROS or (node.target in _KEEP_ZERO and operands[0] in zeros):
            zeros.add(node)
        elif node.target in _PRODUCTS and any(arg in zeros for arg in node.args[:2]) and (out := _value(node)) is not None:
            if node.target is aten.convolution.default and node.args[2] is not None:
                continue
            with graph.graph.inserting_before(node):
                like: dict[str, Any] = {"dtype": out.dtype, "device": out.device}
                zero = graph.graph.call_function(aten.zeros.default, (list(out.shape),), like)
            zero.meta = dict(node.meta)
            node.replace_all_uses_with(zero)
            zeros.add(zero)
        elif node.target is aten.add.Tensor and len(operands) == 2:
            other = operands[1] if operands[0] in zeros else operands[0]
            scaled = other is operands[1] and node.kwargs.get("alpha", 1) != 1
            if zeros & set(operands) and not scaled and _same_kind(_value(other), _value(node)):
                node.replace_all_uses_with(other)
            else:
                _write_out_factor(graph, node)
        elif node.target is aten.mm.default and (left := _value(node.args[0])) is not None and left.shape[1] == 1:
            node.target = aten.mul.Tensor  # [m, 1] times [1, n] broadcasts to the product
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _write_out_factor(graph: GraphModule, node: Node) -> None:
    """Write x + αy as a sum with a product: torch 2.13's compiler makes x + α(a b) of matrices a product that has lost its α."""
    if node.kwargs.get("alpha", 1) == 1:
        return
    with graph.graph.inserting_before(node):
        product = graph.graph.call_function(aten.mul.Tensor, (node.args[1], node.kwargs["alpha"]))
    product.meta = dict(node.args[1].meta) if isinstance(node.args[1], Node) else {}
    node.args, node.kwargs = (node.args[0], product), {}


def _loosen_views(graph: GraphModule) -> None:
    """Let views be copies where order in memory asks for it: the compiler's own passes, and those here, may choose another order."""
    for node in graph.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    graph.recompile()


def _arrange_products(graph: GraphModule) -> None:
    """Write products of few rows or columns as what takes less time on their device."""
    for node in list(graph.graph.nodes):
        if node.target in (aten.mm.default, aten.addmm.default) and not node.kwargs:
            x, weight = (_value(arg) for arg in node.args[-2:])
            if x is not None and weight is not None and x.dtype.itemsize >= 4:
                (_turn if x.device.type == "cpu" else _add_up)(graph, node, x, weight)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _add_up(graph: GraphModule, node: Node, x: Tensor, weight: Tensor) -> None:
    """Let a small product with few columns be a sum of products of elements on a GPU: its library takes several kernels for it (17 µs on an
    H100 with a factor of 1,024 × 10), where a compiler makes one of it and of what comes before and after."""
    if weight.shape[1] <= _FEW and x.shape[0] * weight.numel() <= _SMALL:
        _replace_by_sum(graph, node)


def _replace_by_sum(graph: GraphModule, node: Node) -> None:
    make = graph.graph.call_function
    with graph.graph.inserting_before(node):
        left = make(aten.unsqueeze.default, (node.args[-2], 1))
        right = make(aten.unsqueeze.default, (make(aten.t.default, (node.args[-1],)), 0))
        total = make(aten.sum.dim_IntList, (make(aten.mul.Tensor, (left, right)), [2]))
        if node.target is aten.addmm.default:
            total = make(aten.add.Tensor, (total, node.args[0]))
        total.meta = dict(node.meta)
    node.replace_all_uses_with(total)


def _turn(graph: GraphModule, node: Node, x: Tensor, weight: Tensor) -> None:
    """Let a product x Wᵀ of few rows, or with few columns, be (W xᵀ)ᵀ on a processor: as many numbers, in down to a quarter of the time.

    Libraries of products cut their left factor into tiles of some sixteen rows, and rows that fill no tile are computed with one by one.
    With one column and few numbers the call takes longer than the sums, which the compiler writes out.
    """
    if weight.shape[1] == 1 and x.numel() <= _TINY:
        _replace_by_sum(graph, node)
        return
    if weight.stride(0) != 1 or weight.stride(1) < weight.shape[0]:
        return
    rows, columns = x.shape[0], weight.shape[1]
    if not (_FEW <= rows <= _SOME or columns <= _FEW < rows):
        return
    make = graph.graph.call_function
    with graph.graph.inserting_before(node):
        product = make(aten.mm.default, tuple(make(aten.t.default, (arg,)) for arg in reversed(node.args[-2:])))
        turned = make(aten.t.default, (product,))
        if node.target is aten.addmm.default:
            turned = make(aten.add.Tensor, (turned, node.args[0]))
        product.meta["val"], turned.meta = node.meta["val"].t(), dict(node.meta)
    node.replace_all_uses_with(turned)


_SMALL, _TINY = 2**22, 2**14  # elements multiplied, on a GPU and on a processor
_FEW, _SOME = 12, 48  # rows: measured from 256 × 256 to 4096 × 4096 with the library that torch's own products come from


def _same_kind(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
