"""The step as a captured CUDA graph."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from forwardgrad.directions import Plan
from forwardgrad.engines.batch import Batch
from forwardgrad.engines.compiled import Compiled, Function
from forwardgrad.engines.graphs import Run
from forwardgrad.engines.reads import Untraceable
from forwardgrad.engines.step_survey import StepSurvey
from forwardgrad.engines.trace import Traced


class Captured(Compiled):
    """Steps that the GPU repeats by itself: the compiled function, or the plain graph where there is no compiler, captured once.

    Directions from a generator on the GPU are drawn inside the graph, which moves the generator on as the eager step does; all others,
    and the batch, are written before each step to where the graph reads them. The loss lies on the device, and nothing waits for it.
    Gradients handed to an optimizer are overwritten by the next step.
    """

    name: ClassVar[str] = "graph"

    def _build(self, survey: StepSurvey, batch: Batch, plan: Plan, moves: bool) -> tuple[Run, torch.dtype]:
        devices = {p.device.type for p in survey.model.tensors}
        if devices != {"cuda"}:
            others = ", ".join(sorted(devices - {"cuda"}))
            raise Untraceable(f"a CUDA graph needs all parameters and buffers on a GPU, and there are some on {others}")
        return super()._build(survey, batch, plan, moves)

    def _pinned(self, survey: StepSurvey, moves: bool) -> Hashable:
        """The graph reads and writes memory, whatever tensor it belongs to."""
        return super()._pinned(survey, moves), tuple(tensor.data_ptr() for tensor in survey.tensors[: survey.given])

    def _function(self, traced: Traced, given: list[Tensor], numbers: list[Tensor], plan: Plan, batch: range) -> Function:
        inputs = [*given, *numbers, *(constant.detach() for constant in traced.constants)]
        if any(not tensor.is_cuda for tensor in inputs):
            raise Untraceable("the batch, the model or the estimator's state keeps numbers on the CPU")
        try:
            function = self._compiled(traced, inputs)
            function(*inputs)
        except Exception:  # no compiler for this GPU, or not in time: its own kernels do
            function = traced.graph
        return capture(function, given, inputs[len(given) + len(numbers) :], plan, batch)


def capture(function: Function, given: list[Tensor], constants: list[Tensor], plan: Plan, batch: range) -> Function:
    """The function as a CUDA graph; the batch is copied to where it reads it, all else that is given has to stay where it is."""
    static = [tensor.clone() if index in batch else tensor for index, tensor in enumerate(given)]
    inside = plan.in_graph()
    outside = {index: draw.again() for index, draw in enumerate(plan.draws) if index not in inside}

    def step() -> Sequence[Any]:
        drawn = [number for index, draw in enumerate(plan.draws) for number in (draw.again() if index in inside else outside[index])]
        return function(*static, *drawn, *constants)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up outside the capture
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for generator in {id(one): one for index in inside for one in plan.draws[index].on or ()}.values():
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        loss, derivatives, *gradients = step()
        results = torch.cat([loss.reshape(1), derivatives])  # one copy takes less time than two

    def replay(*now: Any) -> Sequence[Any]:
        for index in batch:
            static[index].copy_(now[index], non_blocking=True)
        for index, slots in outside.items():
            for slot, number in zip(slots, plan.draws[index].again(), strict=True):
                slot.copy_(number, non_blocking=True)
        graph.replay()
        fresh = results.clone()
        return [fresh[0].to(loss.dtype), fresh[1:].to(derivatives.dtype), *gradients]

    return replay
