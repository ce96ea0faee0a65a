"""Let the update of a weight matrix by a product, W ← W − γ A B, be one product that adds to W, where a graph makes the gradient first.

The gradient is then never written down. On a processor, of five times that as many numbers as the weights have go through memory, two
are left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten
_SAME = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}


_WORTH_IT = 2**16  # numbers in a weight: the call takes longer than to write down the gradient of a smaller one
_library = torch.library.Library("forwardgrad", "FRAGMENT")
_library.define("add_product_(Tensor(a!) weight, Tensor left, Tensor right) -> ()")


def _add_product(weight: Tensor, left: Tensor, right: Tensor) -> None:
    weight.addmm_(left, right)


_library.impl("add_product_", _add_product, "CPU")
_library.impl("add_product_", lambda weight, left, right: None, "Meta")


def fold_updates(graph: GraphModule) -> None:
    """Fold the updates of matrices on a processor."""
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    for copy in [node for node in graph.graph.nodes if node.target is aten.copy_.default]:
        weight: Any = copy.args[0]
        if not _may_fold(weight) or (found := _update(weight, _seen_through(copy.args[1]))) is None:
            continue
        readers = {copy, *found.made}
        last = max((user for user in weight.users if user not in readers), key=order.__getitem__, default=weight)
        _fold(graph.graph, weight, found, max(last, *found.made, key=order.__getitem__))
        graph.graph.erase_node(copy)
    graph.graph.eliminate_dead_code()
    graph.recompile()


class _Update(NamedTuple):
    """W + left · right, or W − rate · left · right, and the nodes that the graph makes of it."""

    left: Any
    right: Any
    rate: Any
    made: list[Any]


def _may_fold(weight: Any) -> bool:
    value = weight.meta.get("val")
    if weight.op != "placeholder" or not isinstance(value, Tensor) or value.device.type != "cpu":
        return False
    return value.dim() == 2 and value.numel() >= _WORTH_IT and value.is_contiguous()


def _update(weight: Any, moved: Any) -> _Update | None:
    """The update, where that is what a weight becomes and nothing else asks for its product."""
    if moved is None or moved.kwargs or not _is(moved.args[0] if moved.args else None, weight):
        return None
    if moved.target is aten.addmm.default:
        return _Update(moved.args[1], moved.args[2], None, [moved, *_views(moved.args[0], weight)])
    if moved.target is not aten.sub.Tensor:
        return None
    scaled = _seen_through(moved.args[1])
    if scaled is None or scaled.target is not aten.mul.Tensor:
        return None
    product, rate = _seen_through(scaled.args[0]), scaled.args[1]
    fits = product is not None and product.target is aten.mm.default and product.meta["val"].dtype == weight.meta["val"].dtype
    single = isinstance(rate, Node) and isinstance(of := rate.meta.get("val"), Tensor) and of.dim() == 0
    return _Update(product.args[0], product.args[1], rate, [moved]) if fits and single else None


def _seen_through(node: Any) -> Any:
    """The node behind views of it, None where somebody else asks for it, or it is none."""
    while isinstance(node, Node) and len(node.users) == 1:
        if node.target not in _SAME:
            return node
        node = node.args[0]
    return None


def _is(node: Any, weight: Any) -> bool:
    """Whether a node is the weight, or the weight seen in its own shape."""
    return node is weight or bool(_views(node, weight))


def _views(node: Any, weight: Any) -> list[Any]:
    own = isinstance(node, Node) and node.target in _SAME and node.args[0] is weight and len(node.users) == 1
    return [node] if own and node.meta["val"].shape == weight.meta["val"].shape else []


def _fold(graph: Graph, weight: Any, found: _Update, after: Node) -> None:
    make = graph.call_function
    with graph.inserting_after(after):
        folded = make(torch.ops.forwardgrad.add_product_.default, (weight, found.left, found.right))
    if found.rate is not None:
        with graph.inserting_before(folded):
            left = make(aten.mul.Tensor, (found.left, make(aten.neg.default, (found.rate,))))
        folded.args = (weight, left, found.right)
