"""What one evaluation has seen of the loss: what its functions were given, the sum that it is, and the calls behind the last layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from forwardgrad.calls.replay import LossOf, Recording, Slot, Unrepeatable
from forwardgrad.calls.retakes import OtherPath
from forwardgrad.calls.sums import Scaled, Sums
from forwardgrad.forward_mode.rules import Output
from forwardgrad.perturbations import Reading


class LossSeen:
    """The loss as a watch sees it come, and at its end the tensors that it is read at.

    outputs, beside: what known loss functions were given, and besides, which must not follow from what moves.
    classified: how many of them have class indices for targets.
    recording: the calls from the last layer on, where the reading goes by them.
    transformed: whether some of those calls were made inside a transform of torch.func.
    parts, loss_of, constants: what was read, see `Pass`; `flaw` is why the calls behind the last layer cannot be made again.
    """

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self.outputs, self.beside, self.sums = list[Tensor](), list[Tensor](), Sums()
        self.classified, self.transformed = 0, False
        self.recording: Recording | None = None
        self.parts: tuple[Scaled, ...] = ()
        self.loss_of: LossOf | None = None
        self.constants: dict[Slot, Tensor] = {}
        self.flaw = ""

    def called(self, count: int, inside: bool) -> bool:
        """A call comes, the one of this number, perhaps `inside` a transform. Whether the recording begins with it."""
        behind = self._reading.since is not None and count > self._reading.since
        if inside:
            self.transformed |= behind
            if self.recording is not None:
                self.recording.flaw = "a transform of torch.func is at work"
        elif behind and self.recording is None:
            self.recording = Recording()
            return True
        return False

    def function(self, output: Output) -> int:
        """A loss function is called: the number of what it is given, which it shares with others that are given the same."""
        given = output.call["input"]
        self.classified += output.classifies
        self.beside += [value for key, value in output.call.items() if key != "input" and isinstance(value, Tensor)]
        index = next((index for index, known in enumerate(self.outputs) if known is given), len(self.outputs))
        if index == len(self.outputs):
            self.outputs.append(given)
        return index

    def made(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, known: list[Any]) -> None:
        """A call was made; `known` are the sums that its arguments were."""
        if known:
            self.sums.follow(func, args, kwargs, result, known)
        if self.recording is not None:
            self.recording.add(func, args, kwargs, result)

    def read(self, loss: Any, primal: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The tensors that the loss is read at; OtherPath where it cannot be read as it was found out."""
        reading, found = self._reading, self.sums.of(loss)
        if found is not None:
            self.parts, used = found.only()
            if reading.way == "outputs":
                return [self.outputs[index] for index in used]
        elif reading.way == "outputs" and reading.path is not None:
            raise OtherPath(None)
        if reading.way == "replay" and self.recording is not None:
            try:
                self.loss_of, others = self.recording.again(reading.cut, loss)
            except Unrepeatable as flaw:
                self.flaw = str(flaw)
                if reading.path is None:  # which is being found out
                    return []
                raise OtherPath(None) from flaw
            self.constants = {slot: primal(t) if t.is_floating_point() else t for slot, t in others.items()}
            return [self.recording.given[slot] for slot in reading.cut]
        return []

    def forget(self) -> None:
        """Hold no tensor of the evaluation any more but constants."""
        self.outputs, self.beside, self.recording, self.sums = [], [], None, Sums()
