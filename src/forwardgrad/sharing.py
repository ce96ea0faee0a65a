"""An estimate that several processes make together: by a few numbers where directions follow from a seed, else by averaged gradients."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Generator, Tensor

from forwardgrad.empty import estimated
from forwardgrad.estimators import Estimate, Estimator
from forwardgrad.factored import Gradient
from forwardgrad.objective import Objective
from forwardgrad.ranks import ALONE, Distributed, Ranks


def shared_parts(
    estimator: Estimator, objective: Objective, generator: Generator | None, state: dict[str, Tensor]
) -> tuple[Estimate, Iterator[tuple[str, Gradient]]]:
    """The record of a step and its estimate in parts by parameter, the same in all processes of the objective.

    Raises ValueError for an estimator whose directions processes cannot divide, and what `Distributed` raises.
    """
    ranks = objective.ranks
    if not ranks.many:
        return estimated(estimator, objective, state, lambda method, kept: method.parts(objective, generator, kept))
    estimator.check_divided(ranks.directions)
    ranks.check(objective.parameters, generator, repr(estimator))
    if estimator.told_by_numbers:
        told = estimated(estimator, objective, state, lambda method, kept: method.parts(objective, generator, kept))
        ranks.finished()
        return told
    own = generator if estimator.same_draws else ranks.own(generator)
    record, parts = estimated(estimator, objective, state, lambda method, kept: method.parts(objective, own, kept))
    together = list(ranks.gradients(objective.parameters, parts))
    apart = [state[name] for name in estimator.learned_apart(state)]
    for tensor, mean in zip(apart, ranks.mean(apart), strict=True):
        tensor.copy_(mean)
    loss, derivatives = ranks.together(record.loss, record.derivatives)
    ranks.finished()
    return Estimate(loss, derivatives, record.forward_passes), iter(together)


def ranks_of(group: Distributed | None) -> Ranks:
    """The processes of a step; TypeError for a group that is none."""
    if group is not None and not isinstance(group, Distributed):
        raise TypeError(f"group must be a forwardgrad.Distributed(), which may be given a process group, not {type(group).__name__}")
    return ALONE if group is None or not group.many else group
