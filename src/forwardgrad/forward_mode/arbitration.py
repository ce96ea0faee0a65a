"""The choice between the two ways of forward mode: the explicit one, or torch's own where the two were seen to differ."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from forwardgrad.forward_mode import regions
from forwardgrad.forward_mode.guard import Unfollowed
from forwardgrad.forward_mode.notes import Way, asked, outside
from forwardgrad.forward_mode.quotients import are_asked, asked_of, lent
from forwardgrad.forward_mode.refusals import place_of, refusal
from forwardgrad.forward_mode.workarounds import RandomState, forward_mode
from forwardgrad.forward_mode.writes import Repeated, frozen_kept
from forwardgrad.objective import Objective, code_of

W = TypeVar("W")


class Redo(Exception):
    """A watch saw something that it has to know from the start: the evaluation is to be made again."""


class Derived(NamedTuple):
    """Values of one evaluation by name, and their derivatives [k, ...] along each tangent; "loss" is always there."""

    values: dict[str, Tensor]
    derivatives: dict[str, Tensor]


@dataclass(frozen=True)
class Outcome(Generic[W]):
    """One evaluation: the watch that saw it, what it derived, the buffers it leaves, and the path of its calls."""

    watch: W
    derived: Derived
    buffers: dict[str, Tensor]
    path: Hashable = None
    low: bool = False  # whether some of it was computed in low precision
    ways: Counter[Way] | None = None  # of its calls, if somebody asks


@dataclass
class _Known:
    """What was learned of a model under one loss: the paths on which both ways agree, or that only the plain one will do, and why."""

    paths: set[Hashable] = field(default_factory=set)
    plain: bool = False
    reason: str = ""


# by model, so that it goes with the model, and then by the code of the loss and what moves
_known: WeakKeyDictionary[nn.Module, dict[tuple[Hashable, Hashable], _Known]] = WeakKeyDictionary()
_only_plain: ContextVar[bool] = ContextVar("only plain", default=False)


@contextmanager
def plainly() -> Iterator[None]:
    """Inside, all derivatives are computed by torch's own forward mode: slower, and what the library's faster way is compared with."""
    token = _only_plain.set(True)
    try:
        yield
    finally:
        _only_plain.reset(token)


def either(
    objective: Objective, explicit: Callable[[bool], Outcome[W]], plain: Callable[[], Outcome[W]], key: Hashable, commit: bool
) -> Outcome[W]:
    """The explicit evaluation where it can be trusted, else the plain one; without a key the plain one alone."""
    known, plain = _Known(plain=True, reason=""), partial(_with_differences, objective, plain)
    with torch.no_grad(), forward_mode(objective, commit), regions.followed(), frozen_kept(objective):
        try:
            if _only_plain.get():
                found, known.reason = plain(), "torch's own forward mode was asked for (plainly, or an ensemble)"
            elif not isinstance(objective.at, nn.Module):
                found, known.reason = plain(), "what is trained is not a module, so nothing can be remembered of it"
            elif key is None:
                found, known.reason = plain(), "nothing moves"
            else:
                known = _known.setdefault(objective.at, {}).setdefault((code_of(objective.loss), key), _Known())
                found = plain() if known.plain else _checked(objective, explicit, plain, known)
        except Redo:
            raise
        except Exception as error:
            if (said := refusal(error, objective.at)) is not None:
                raise said from error
            raise
        if commit:
            objective.commit(found.buffers)
    if (notes := asked.get()) is not None:
        notes.calls.update(found.ways or {})
        notes.passes.append(("dual numbers", known.reason) if known.plain else ("explicit", ""))
    return found


def _with_differences(objective: Objective, plain: Callable[[], Outcome[W]]) -> Outcome[W]:
    """The plain evaluation, made again where it met a custom function that torch refuses, until differences serve all that there are."""
    if not are_asked():
        return plain()
    while True:
        random = RandomState(objective)
        try:
            with lent():
                return plain()
        except RuntimeError as error:
            if not asked_of(error):
                raise
        random.restore()


def _checked(objective: Objective, explicit: Callable[[bool], Outcome[W]], plain: Callable[[], Outcome[W]], known: _Known) -> Outcome[W]:
    # Before every further evaluation the global generators go back: with other dropout masks the two ways would never agree.
    random, writes = RandomState(objective), Repeated()
    try:
        first = not known.paths
        with writes.noted() if first else nullcontext():
            found = explicit(first)
        if found.path in known.paths:
            return found
        if not first:  # this path is new, and nobody guarded it: what passed by unseen would not even show in its calls
            random.restore()
            found = explicit(True)
    except Redo:
        raise
    except Exception as error:  # the plain way decides whether something is wrong with the model, or only with following it
        random.restore()
        writes.again()
        with writes.noted():
            other = plain()
        _give_up(known, objective, _why(error, objective))
        return other
    random.restore()
    writes.again()
    with writes.noted():
        other = plain()
    known.paths.add(found.path)  # once a path: to compare at every step would cost more than the explicit way saves
    if (apart := _disagreement(found.derived, other.derived, found.low)) is None:
        return found
    _give_up(known, objective, apart)
    return other


def _why(error: Exception, objective: Objective) -> str:
    """Why a model could not be followed, as the end of a sentence."""
    text = str(error) if isinstance(error, Unfollowed) else f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    call = getattr(error, "forwardgrad_call", None)
    return f"{text}{'' if call is None or call in text else f' (in the call of {call})'}{place_of(error, objective.at)}"


def _give_up(known: _Known, objective: Objective, reason: str) -> None:
    assert isinstance(objective.at, nn.Module)
    said = any(other.plain for (code, _), other in _known[objective.at].items() if code == code_of(objective.loss))
    known.plain, known.reason = True, reason
    if not said and asked.get() is None:  # whoever asks is told
        warnings.warn(
            f"derivatives of {type(objective.at).__name__} under this loss are made by torch's own forward mode from now on, which is "
            f"slower (a transformer with four tangents takes about twice as long): {reason}. forwardgrad.explain(loss, model) tells more",
            stacklevel=outside(),
        )


def _disagreement(one: Derived, other: Derived, low: bool) -> str | None:
    """How two evaluations differ by more than rounding: of all that was derived, the largest is compared, relative to its norm.

    Rounding moves a few units of a ReLU across zero, and with them their whole tangents: half a percent in 64 layers, in float32.
    """
    if one.derivatives.keys() != other.derivatives.keys():
        return "the explicit way derived other things"
    name = max(other.derivatives, key=lambda name: other.derivatives[name].numel())
    found, exact = (d.derivatives[name].double() for d in (one, other))
    eps = torch.finfo(other.values[name].dtype).eps
    share = 0.25 if low or eps > 1e-3 else 0.05 if eps > 1e-10 else 1e-4
    apart, length = (found - exact).norm(), exact.norm()
    if apart <= share * length + eps:
        return None
    # of one seed the values are the same, unless random numbers went another way: nothing else moves them
    drawn = not torch.allclose(one.values[name], other.values[name], rtol=share, atol=eps)
    cause = "; the values differ too, so a call probably draws its random numbers in another order" if drawn else ""
    return f"the explicit way gave another derivative, {float(apart / length):.2g} of its length away{cause}"
