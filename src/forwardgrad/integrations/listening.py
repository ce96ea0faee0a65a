"""What a step says besides its loss, as plain values: what it logs, and what else it returns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_map_only

from forwardgrad.forward_mode import levels
from forwardgrad.objective import code_of


class Log(NamedTuple):
    """A call that logs something."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Listener:
    """Listens to the runs of a step in one estimate. The last run counts; for its loss the estimate's own is put."""

    def __init__(self) -> None:
        self._logs: list[Log] = []
        self._output: Any = None

    def log(self, *args: Any, **kwargs: Any) -> None:
        self._logs.append(Log(args, kwargs))

    def listened(self, step: Callable[[], Any]) -> Tensor:
        """Run the step and return its loss."""
        self._logs = []
        output = step()
        loss: Any = output.get("loss") if isinstance(output, Mapping) else output
        if loss is None:
            raise TypeError("training_step returned no loss: a batch that is to be skipped has to be left out of the data")
        self._logs, self._output = _plain((self._logs, dict(output) if isinstance(output, Mapping) else output), loss)
        found: Tensor = loss
        return found

    def logs(self, loss: Tensor) -> Iterator[Log]:
        yield from _filled(self._logs, loss)

    def output(self, loss: Tensor) -> Any:
        """What the step returned."""
        return _filled(self._output, loss)


class _Loss:
    """Stands where the loss is said."""


def _plain(values: Any, loss: Tensor) -> Any:
    """Values without tangents, so that they outlive the evaluation, and without its loss."""
    return tree_map_only(Tensor, lambda t: _Loss() if t is loss else levels.unwrapped(t.detach()), values)


def _filled(values: Any, loss: Tensor) -> Any:
    return tree_map_only(_Loss, lambda _: loss, values)


def estimating(step: Callable[..., Any]) -> Callable[..., Any]:
    """A `training_step` that estimates a gradient where it would only compute a loss."""

    @functools.wraps(step)
    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._listener is not None or self._trainer is None or not self.trainer.training:  # from inside an estimate, or not to train
            return step(self, *args, **kwargs)
        return self._estimate(lambda: step(self, *args, **kwargs), code_of(step))

    training_step.estimates = True  # type: ignore[attr-defined]
    return training_step
