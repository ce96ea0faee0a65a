"""Losses and their directional derivatives: the only file that asks for forward mode, and the list of all torch work-arounds.

There are two ways. The plain one is torch's own: dual numbers under `torch.func.jvp`, and `vmap` for several tangents at once. The
`explicit` one carries tangents as tensors beside the values, and is the faster. It is taken for modules, compared with the plain one
whenever a model takes a new path through its calls, and given up for that model where the two disagree or it cannot follow, which one
warning says (`arbitration`). Inside `plainly()` it is never taken.

Each work-around stands in one place (here, in `workarounds`, `dropout` or `objective`) and can go when torch no longer needs it:

- `no_grad` is enforced: with live Parameters outside it, `torch.func.jvp` would also record a graph for reverse mode.
- Attention runs on the MATH backend with the fused inference path off: the others have no forward-mode rule.
- CPU LSTM and GRU run without oneDNN, whose recurrent kernels have no forward-mode rule.
- Embeddings hold their padding row still themselves: torch's forward-mode rule would train it.
- Buffers (BatchNorm's statistics) are cloned inside each evaluation and committed once a step.
- `functional_call` is told every place of a tied weight: its own handling spoils a module that is reached under two names.
- Random layers see one state of the global generator a step, however many evaluations the step makes.
- `requires_grad_()` inside a model, with which some prepare for checkpoints, is passed over: `torch.func` refuses it.
- Dropout draws its mask outside of `torch.func`, which would draw another one from the same seed.
- A loss whose tangent was dropped on the way (detach, .item(), numpy) is an error: torch itself would answer zero.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp, vmap

from forwardgrad.forward_mode.arbitration import Derived, Outcome, either
from forwardgrad.forward_mode.arbitration import Redo as Redo
from forwardgrad.forward_mode.arbitration import plainly as plainly
from forwardgrad.forward_mode.dual_numbers import Alike, Plain
from forwardgrad.forward_mode.explicit import Explicit
from forwardgrad.forward_mode.workarounds import RandomState as RandomState
from forwardgrad.objective import Objective, per_example, scalar

_DROPPED = (
    "the loss carries no tangent: it does not depend on any trainable parameter, or a detach(), .item() or numpy call on the way dropped it"
)


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


def directional_derivatives(
    objective: Objective, tangents: Mapping[str, Float[Tensor, "k ..."]], *, commit: bool = True
) -> tuple[Float[Tensor, ""], Float[Tensor, " k"]]:
    """The loss and its derivatives d[k] = ∇f · v[k] along k tangents that share one primal pass; nothing is kept for a backward pass.

    `commit=False` leaves the model's buffers and the global random state as they were, so that another evaluation of the same step
    sees the same batch statistics and the same dropout.
    Raises RuntimeError when the loss carries no tangent, NotImplementedError (torch's own) when an operator has no forward-mode rule.
    """
    count = next(iter(tangents.values())).shape[0]

    def explicit(guarded: bool) -> Outcome[None]:
        parameters = _standing(objective)
        moving = {id(p): tangents[name] for name, p in parameters.items()}
        with Explicit(count, moving, guarding=parameters.values() if guarded else None) as evaluation:
            loss, buffers = _evaluated(objective, parameters)
            loss = scalar(objective.precise(loss))
            if not evaluation.carries(loss):
                raise RuntimeError(_DROPPED)
            derivative = evaluation.derivative(loss)
        return Outcome(
            None, Derived({"loss": loss.detach()}, {"loss": derivative}), buffers, evaluation.path, evaluation.low, evaluation.ways
        )

    def plain() -> Outcome[None]:
        def evaluate(parameters: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            with alike:
                loss, buffers = objective.with_(parameters)
            if forward_ad.unpack_dual(loss).tangent is None:
                raise RuntimeError(_DROPPED)
            return loss, buffers

        def along(tangent: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            result: tuple[Tensor, Tensor, dict[str, Tensor]] = jvp(evaluate, (primals,), (tangent,), has_aux=True)  # type: ignore[assignment]
            return result

        primals, alike = {name: p.detach() for name, p in objective.parameters.items()}, Alike()
        if count == 1:
            loss, derivative, buffers = along({name: v[0] for name, v in tangents.items()})
            derivatives = derivative.reshape(1)
        else:
            loss, derivatives, buffers = vmap(along, out_dims=(None, 0, None), randomness="same")(dict(tangents))  # type: ignore[arg-type]
        return Outcome(None, Derived({"loss": loss}, {"loss": derivatives}), buffers, ways=alike.ways)

    found = either(objective, explicit, plain, "dense", commit).derived
    loss = found.values["loss"]
    return loss, found.derivatives["loss"].to(loss.dtype)


def derivatives_under(objective: Objective, watch: Callable[[], V], count: int, key: Hashable, *, commit: bool = True) -> tuple[V, Derived]:
    """Evaluate a loss once under a watch that lets `count` tangents in, sharing one primal pass; nothing is kept for a backward pass.

    `watch` makes a new watch, the same at every call for one `key`; the one that saw the evaluation is returned. With count 0 nothing is
    derived: an ordinary forward pass under the watch. `commit`, and what is raised, as `directional_derivatives`.
    """

    def closed(stands: V, evaluation: Evaluation, loss: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        outputs, kept = stands.close(loss)
        finished = per_example(objective.precise(loss))
        done = loss.dim() == 0 and loss.dtype == finished.dtype
        outputs = {"loss": loss if done else evaluation.call(lambda loss: per_example(objective.precise(loss)), (loss,), {}), **outputs}
        if count and not stands.silent and not evaluation.carries(outputs["loss"]):
            raise RuntimeError(_DROPPED)
        return outputs, kept

    def explicit(guarded: bool) -> Outcome[V]:
        stands, parameters = watch(), _standing(objective)
        evaluation = Explicit(count, guarding=parameters.values() if guarded else None)
        with evaluation.begun():
            with stands.open(evaluation, parameters), evaluation.guarding():
                loss, buffers = _evaluated(objective, parameters)
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


def _standing(objective: Objective) -> dict[str, Tensor]:
    """What the parameters are in an explicit evaluation: themselves, unless `functional_call` has to exchange buffers anyway."""
    return {name: p.detach() for name, p in objective.parameters.items()} if objective.buffered else objective.parameters


def _evaluated(objective: Objective, parameters: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    return objective.raw(parameters) if objective.buffered else (objective.as_it_is(), {})
