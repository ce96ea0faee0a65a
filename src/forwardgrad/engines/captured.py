"""The step as a captured CUDA graph."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from forwardgrad.engines.compiled import Compiled, Function, compiled
from forwardgrad.engines.pieces import Batch, Survey
from forwardgrad.estimators.base import Estimate
from forwardgrad.trace import Traced, Untraceable


class Captured(Compiled):
    """Steps that the GPU repeats by itself: the compiled function, or the plain graph where there is no compiler, captured once.

    Before each step the batch and the random numbers are written to where the graph reads them. Directions are drawn outside the graph:
    their seeds follow from the generator on the host, and a graph that drew them would draw the same ones at every step. The loss lies on
    the device, and nothing waits for it. Gradients handed to an optimizer are overwritten by the next step.
    """

    name: ClassVar[str] = "graph"

    def take(self, batch: Batch) -> Estimate:
        devices = {p.device.type for p in self.pieces.model.parameters()}
        if devices != {"cuda"} and not self._given_up:
            self._give_up(f"a CUDA graph needs all parameters on a GPU, and there are some on {', '.join(sorted(devices - {'cuda'}))}")
        return super().take(batch)

    def _pinned(self, survey: Survey, moves: bool) -> Hashable:
        """The graph reads and writes memory, whatever tensor it belongs to."""
        return super()._pinned(survey, moves), tuple(tensor.data_ptr() for tensor in survey.tensors[: survey.given])

    def _function(self, traced: Traced, inputs: list[Tensor], changing: range) -> Function:
        if any(not tensor.is_cuda for tensor in inputs):
            raise Untraceable("the batch, the model or the estimator's state keeps numbers on the CPU")
        try:
            function = compiled(traced, inputs)
            function(*inputs)
        except Exception:  # no compiler for this GPU: its own kernels do
            function = traced.graph
        return capture(function, inputs, changing)


def capture(function: Function, inputs: list[Tensor], changing: range) -> Function:
    """The function as a CUDA graph; inputs that change are copied to where it reads them, the others have to stay where they are."""
    static = [tensor.clone() if index in changing else tensor for index, tensor in enumerate(inputs)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up outside the capture
        for _ in range(2):
            function(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function(*static)

    def replay(*given: Any) -> Sequence[Any]:
        for index in changing:
            static[index].copy_(given[index], non_blocking=True)
        graph.replay()
        return [found[0].clone(), found[1].clone(), *found[2:]]

    return replay
