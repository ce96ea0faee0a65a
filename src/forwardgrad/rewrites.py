"""Operations of a graph that are one where the machine has a kernel for both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from forwardgrad.fused import channels_last

aten = torch.ops.aten


def join_relus(graph: GraphModule) -> None:
    """Let a convolution that is only seen through a ReLU set to zero what it writes: a pass over its output less.

    oneDNN does that to images of float32 on the processor; they are to lie in memory as it wants them, or they would be copied.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return
    for node in list(graph.graph.nodes):
        if node.target is not aten.relu.default or (convolution := _seen_through(node)) is None:
            continue
        x, weight, bias, stride, padding, dilation, _, _, groups = convolution.args
        with graph.graph.inserting_before(node):
            arguments: tuple[Any, ...] = (x, weight, bias, padding, stride, dilation, groups, "relu", [], "")
            joined = graph.graph.call_function(torch.ops.mkldnn._convolution_pointwise.default, arguments)
        joined.meta = dict(node.meta)
        node.replace_all_uses_with(joined)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _seen_through(relu: Node) -> Node | None:
    """The convolution that a ReLU is of, if nothing else sees it and oneDNN can do both."""
    node = relu.args[0]
    while isinstance(node, Node) and len(node.users) == 1 and node.target is aten.detach.default:
        node = node.args[0]
    if not isinstance(node, Node) or len(node.users) != 1 or node.target is not aten.convolution.default or node.args[6]:
        return None
    value = node.meta.get("val")
    fits = isinstance(value, Tensor) and value.device.type == "cpu" and value.dtype == torch.float32 and channels_last(value)
    return node if fits else None
