"""A loss and its derivatives under a watch, which stands at every torch call and lets tensors move where it wants them to."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.func import jvp, vmap

from forwardgrad.forward_mode.arbitration import Derived, Outcome, either
from forwardgrad.forward_mode.derivative import DROPPED, evaluated, standing
from forwardgrad.forward_mode.dual_numbers import Alike, Plain
from forwardgrad.forward_mode.explicit import Explicit
from forwardgrad.objective import Objective, loss_by_example


class Evaluation(Protocol):
    """One evaluation of a loss in forward mode, as a watch sees it."""

    def inject(self, tensor: Tensor, source: Any) -> Tensor:
        """The tensor with what the source moves it by added to how it moves already; its values stay what they are."""

    def carries(self, tensor: Tensor) -> bool:
        """Whether a tensor moves."""

    def primal(self, tensor: Tensor) -> Tensor:
        """The values of a tensor, which do not move."""

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call, moving as its arguments make it."""


class Watch(Protocol):
    """What stands at every torch call of an evaluation, and lets tensors move where they should.

    `open` is the context in which the model runs; `close` takes the loss it returned and says what else shall be derived, by name, and
    what of the primal pass shall be kept, by name; `keep` gets the latter back as plain tensors. `silent` tells whether the loss may
    carry no tangent, because what moved was seen elsewhere. `instead`, once open, are parameters that move from the start, by name.
    """

    instead: dict[str, Tensor]

    @property
    def silent(self) -> bool: ...

    def open(self, evaluation: Evaluation, parameters: Mapping[str, Tensor]) -> AbstractContextManager[Any]: ...

    def close(self, loss: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...

    def keep(self, tensors: dict[str, Tensor]) -> None: ...


V = TypeVar("V", bound=Watch)


def derivatives_under(objective: Objective, watch: Callable[[], V], count: int, key: Hashable, *, commit: bool = True) -> tuple[V, Derived]:
    """Evaluate a loss once under a watch that lets `count` tangents in, sharing one primal pass; nothing is kept for a backward pass.

    `watch` makes a new watch, the same at every call for one `key`; the one that saw the evaluation is returned. With count 0 nothing is
    derived: an ordinary forward pass under the watch. `commit`, and what is raised, as `directional_derivatives`.
    """

    def closed(stands: V, evaluation: Evaluation, loss: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        outputs, kept = stands.close(loss)
        finished = loss_by_example(objective.precise(loss))
        done = loss.dim() == 0 and loss.dtype == finished.dtype
        outputs = {"loss": loss if done else evaluation.call(lambda loss: loss_by_example(objective.precise(loss)), (loss,), {}), **outputs}
        if count and not stands.silent and not evaluation.carries(outputs["loss"]):
            raise RuntimeError(DROPPED)
        return outputs, kept

    def explicit(guarded: bool) -> Outcome[V]:
        stands, parameters = watch(), standing(objective)
        evaluation = Explicit(count, guarding=parameters.values() if guarded else None)
        with evaluation.begun():
            with stands.open(evaluation, parameters), evaluation.guarding():
                loss, buffers = evaluated(objective, parameters)
            values, kept = closed(stands, evaluation, loss)
            derivatives = {name: evaluation.derivative(t) for name, t in values.items()} if count else {}
            derived = Derived({name: t.detach() for name, t in values.items()}, derivatives)
        stands.keep(kept)
        return Outcome(stands, derived, buffers, evaluation.path, evaluation.low, evaluation.ways)

    def plain() -> Outcome[V]:
        stands, alike = watch(), Alike()
        primals = {name: p.detach() for name, p in objective.parameters.items()}

        def evaluate(scale: Tensor, pick: Callable[[Tensor], Tensor]) -> tuple[dict[str, Tensor], Any]:
            evaluation = Plain(scale, pick)
            with alike, stands.open(evaluation, primals):
                loss, buffers = objective.raw({**primals, **stands.instead})
            values, kept = closed(stands, evaluation, loss)
            return values, (kept, buffers)

        def along(index: Tensor) -> Any:
            pick = (lambda stack: stack[0]) if count == 1 else (lambda stack: stack.index_select(0, index.reshape(1)).squeeze(0))
            return jvp(lambda scale: evaluate(scale, pick), (zero,), (torch.ones_like(zero),), has_aux=True)

        first = next(iter(primals.values()))
        zero = torch.zeros((), dtype=first.dtype, device=first.device)
        if count == 1:
            values, derivatives, (kept, buffers) = along(zero)
            derivatives = {name: d.unsqueeze(0) for name, d in derivatives.items()}
        else:
            indices = torch.arange(count, device=first.device)
            values, derivatives, (kept, buffers) = vmap(along, out_dims=(None, 0, None), randomness="same")(indices)  # type: ignore[arg-type]
        stands.keep(kept)
        return Outcome(stands, Derived(values, derivatives), buffers, ways=alike.ways)

    found = either(objective, explicit, plain if count else lambda: explicit(False), key if count else None, commit)
    return found.watch, found.derived
