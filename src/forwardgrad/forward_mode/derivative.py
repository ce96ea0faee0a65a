"""A loss and its derivatives along tangents of the parameters that are given from the start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp, vmap

from forwardgrad.forward_mode.arbitration import Derived, Outcome, either
from forwardgrad.forward_mode.dual_numbers import Alike
from forwardgrad.forward_mode.explicit import Explicit
from forwardgrad.forward_mode.writes import Live
from forwardgrad.objective import Objective, scalar

DROPPED = (
    "the loss carries no tangent: it does not depend on any trainable parameter, or a detach(), .item() or numpy call on the way dropped it"
)


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
        parameters, live = standing(objective), Live(objective.parameters)
        moving = {id(p): tangents[name] for name, p in parameters.items()}
        with Explicit(count, moving, guarding=parameters.values() if guarded else None, live=live) as evaluation:
            loss, buffers = evaluated(objective, parameters)
            loss = scalar(objective.precise(loss))
            if not evaluation.carries(loss):
                raise RuntimeError(DROPPED)
            derivative = evaluation.derivative(loss)
        return Outcome(
            None, Derived({"loss": loss.detach()}, {"loss": derivative}), buffers, evaluation.path, evaluation.low, evaluation.ways
        )

    def plain() -> Outcome[None]:
        def evaluate(parameters: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            with alike:
                loss, buffers = objective.with_(parameters)
            if forward_ad.unpack_dual(loss).tangent is None:
                raise RuntimeError(DROPPED)
            return loss, buffers

        def along(tangent: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            result: tuple[Tensor, Tensor, dict[str, Tensor]] = jvp(evaluate, (primals,), (tangent,), has_aux=True)  # type: ignore[assignment]
            return result

        primals, alike = {name: p.detach() for name, p in objective.parameters.items()}, Alike(Live(objective.parameters))
        if count == 1:
            loss, derivative, buffers = along({name: v[0] for name, v in tangents.items()})
            derivatives = derivative.reshape(1)
        else:
            loss, derivatives, buffers = vmap(along, out_dims=(None, 0, None), randomness="same")(dict(tangents))  # type: ignore[arg-type]
        return Outcome(None, Derived({"loss": loss}, {"loss": derivatives}), buffers, ways=alike.ways)

    found = either(objective, explicit, plain, "dense", commit).derived
    loss = found.values["loss"]
    return loss, found.derivatives["loss"].to(loss.dtype)


def standing(objective: Objective) -> dict[str, Tensor]:
    """What the parameters are in an explicit evaluation: themselves, unless `functional_call` has to exchange buffers anyway."""
    return {name: p.detach() for name, p in objective.parameters.items()} if objective.buffered else objective.parameters


def evaluated(objective: Objective, parameters: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    return objective.raw(parameters) if objective.buffered else (objective.as_it_is(), {})
