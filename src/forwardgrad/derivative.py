"""Losses and their directional derivatives: the only file that asks for forward mode, and the home of every torch work-around.

There are two ways. The plain one is torch's own: dual numbers under `torch.func.jvp`, and `vmap` for several tangents at once. The
`explicit` one carries tangents as tensors beside the values, and is the faster. It is taken for modules, compared with the plain one
whenever a model takes a new path through its calls, and given up for that model where the two disagree or it cannot follow. Inside
`plainly()` it is never taken.

Each work-around stands in one place and can go when torch no longer needs it:

- `no_grad` is enforced: with live Parameters outside it, `torch.func.jvp` would also record a graph for reverse mode.
- Attention runs on the MATH backend with the fused inference path off: the others have no forward-mode rule.
- CPU LSTM and GRU run without oneDNN, whose recurrent kernels have no forward-mode rule.
- Embeddings hold their padding row still themselves: torch's forward-mode rule would train it.
- Buffers (BatchNorm's statistics) are cloned inside each evaluation and committed once a step.
- `functional_call` is told every place of a tied weight: its own handling spoils a module that is reached under two names.
- Random layers (dropout) see one state of the global generator a step, however many evaluations the step makes.
- A loss whose tangent was dropped on the way (detach, .item(), numpy) is an error: torch itself would answer zero.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from forwardgrad.explicit import Explicit
from forwardgrad.objective import Objective, per_example, scalar

_DROPPED = (
    "the loss carries no tangent: it does not depend on any trainable parameter, or a detach(), .item() or numpy call on the way dropped it"
)


class Source(Protocol):
    """Something that moves a tensor: by one tangent, or by all K at once."""

    def tangent(self, pick: Callable[[Tensor], Tensor]) -> Tensor: ...

    def tangents(self, count: int) -> Tensor: ...

    def add_to_(self, tangents: Tensor) -> None: ...


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


class Derived(NamedTuple):
    """Values of one evaluation by name, and their derivatives [k, ...] along each tangent; "loss" is always there."""

    values: dict[str, Tensor]
    derivatives: dict[str, Tensor]


class _Injection(torch.autograd.Function):
    """Adds a tangent without touching the values, so that K tangents at once still share one primal pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, scale: Tensor, tangent: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def jvp(ctx: Any, carried: Tensor | None, scale: Tensor, tangent: Any) -> Tensor:
        added: Tensor = ctx.saved_tensors[0]
        return added.clone() if carried is None else carried + added


@dataclass(frozen=True)
class Plain:
    """An evaluation by torch's own forward mode, along the one tangent that `pick` takes from a stack."""

    scale: Tensor
    pick: Callable[[Tensor], Tensor]

    def inject(self, tensor: Tensor, source: Source) -> Tensor:
        moved: Tensor = _Injection.apply(tensor, self.scale, source.tangent(self.pick).to(tensor.dtype))  # type: ignore[no-untyped-call]
        return moved

    def carries(self, tensor: Tensor) -> bool:
        return forward_ad.unpack_dual(tensor).tangent is not None

    def primal(self, tensor: Tensor) -> Tensor:
        value: Tensor = forward_ad.unpack_dual(tensor).primal
        return value

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


class Redo(Exception):
    """A watch saw something that it has to know from the start: the evaluation is to be made again."""


W = TypeVar("W")
V = TypeVar("V", bound=Watch)


@dataclass(frozen=True)
class _Outcome(Generic[W]):
    """One evaluation: the watch that saw it, what it derived, the buffers it leaves, and the path of its calls."""

    watch: W
    derived: Derived
    buffers: dict[str, Tensor]
    path: Hashable = None
    low: bool = False  # whether some of it was computed in low precision


def directional_derivatives(
    objective: Objective, tangents: Mapping[str, Float[Tensor, "k ..."]], *, commit: bool = True
) -> tuple[Float[Tensor, ""], Float[Tensor, " k"]]:
    """The loss and its derivatives d[k] = ∇f · v[k] along k tangents that share one primal pass; nothing is kept for a backward pass.

    `commit=False` leaves the model's buffers and the global random state as they were, so that another evaluation of the same step
    sees the same batch statistics and the same dropout.
    Raises RuntimeError when the loss carries no tangent, NotImplementedError (torch's own) when an operator has no forward-mode rule.
    """
    count = next(iter(tangents.values())).shape[0]

    def explicit(guarded: bool) -> _Outcome[None]:
        parameters = _standing(objective)
        moving = {id(p): tangents[name] for name, p in parameters.items()}
        with Explicit(count, moving, guarding=parameters.values() if guarded else None) as evaluation:
            loss, buffers = _evaluated(objective, parameters)
            loss = scalar(objective.precise(loss))
            if not evaluation.carries(loss):
                raise RuntimeError(_DROPPED)
            derivative = evaluation.derivative(loss)
        return _Outcome(None, Derived({"loss": loss.detach()}, {"loss": derivative}), buffers, evaluation.path, evaluation.low)

    def plain() -> _Outcome[None]:
        def evaluate(parameters: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            loss, buffers = objective.with_(parameters)
            if forward_ad.unpack_dual(loss).tangent is None:
                raise RuntimeError(_DROPPED)
            return loss, buffers

        def along(tangent: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            result: tuple[Tensor, Tensor, dict[str, Tensor]] = jvp(evaluate, (primals,), (tangent,), has_aux=True)  # type: ignore[assignment]
            return result

        primals = {name: p.detach() for name, p in objective.parameters.items()}
        if count == 1:
            loss, derivative, buffers = along({name: v[0] for name, v in tangents.items()})
            derivatives = derivative.reshape(1)
        else:
            loss, derivatives, buffers = vmap(along, out_dims=(None, 0, None), randomness="same")(dict(tangents))  # type: ignore[arg-type]
        return _Outcome(None, Derived({"loss": loss}, {"loss": derivatives}), buffers)

    found = _either(objective, explicit, plain, "dense", commit).derived
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

    def explicit(guarded: bool) -> _Outcome[V]:
        stands, parameters = watch(), _standing(objective)
        evaluation = Explicit(count, guarding=parameters.values() if guarded else None)
        with evaluation.begun():
            with stands.open(evaluation, parameters), evaluation.guarding():
                loss, buffers = _evaluated(objective, parameters)
            values, kept = closed(stands, evaluation, loss)
            derivatives = {name: evaluation.derivative(t) for name, t in values.items()} if count else {}
            derived = Derived({name: t.detach() for name, t in values.items()}, derivatives)
        stands.keep(kept)
        return _Outcome(stands, derived, buffers, evaluation.path, evaluation.low)

    def plain() -> _Outcome[V]:
        stands, primals = watch(), {name: p.detach() for name, p in objective.parameters.items()}

        def evaluate(scale: Tensor, pick: Callable[[Tensor], Tensor]) -> tuple[dict[str, Tensor], Any]:
            evaluation = Plain(scale, pick)
            with stands.open(evaluation, primals):
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
        return _Outcome(stands, Derived(values, derivatives), buffers)

    found = _either(objective, explicit, plain if count else lambda: explicit(False), key if count else None, commit)
    return found.watch, found.derived


def _standing(objective: Objective) -> dict[str, Tensor]:
    """What the parameters are in an explicit evaluation: themselves, unless `functional_call` has to exchange buffers anyway."""
    return {name: p.detach() for name, p in objective.parameters.items()} if objective.buffered else objective.parameters


def _evaluated(objective: Objective, parameters: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    return objective.raw(parameters) if objective.buffered else (objective.as_it_is(), {})


@dataclass
class _Known:
    """What was learned of a model under one loss: the paths on which both ways agree, or that only the plain one will do."""

    paths: set[Hashable] = field(default_factory=set)
    plain: bool = False


_known: WeakKeyDictionary[nn.Module, dict[Hashable, _Known]] = WeakKeyDictionary()
_only_plain: ContextVar[bool] = ContextVar("only plain", default=False)


@contextmanager
def plainly() -> Iterator[None]:
    """Inside, derivatives are torch's own: the reference that the explicit way is tested against."""
    token = _only_plain.set(True)
    try:
        yield
    finally:
        _only_plain.reset(token)


def _either(
    objective: Objective, explicit: Callable[[bool], _Outcome[W]], plain: Callable[[], _Outcome[W]], key: Hashable, commit: bool
) -> _Outcome[W]:
    """The explicit evaluation where it can be trusted, else the plain one; without a key the plain one alone."""
    with torch.no_grad(), _forward_mode(objective, commit):
        if _only_plain.get() or key is None or not isinstance(objective.at, nn.Module):
            found = plain()
        else:
            where = getattr(objective.loss, "__code__", type(objective.loss)), key  # a lambda is new at every step
            known = _known.setdefault(objective.at, {}).setdefault(where, _Known())
            found = plain() if known.plain else _checked(RandomState(objective), explicit, plain, known)
        if commit:
            objective.commit(found.buffers)
    return found


def _checked(random: RandomState, explicit: Callable[[bool], _Outcome[W]], plain: Callable[[], _Outcome[W]], known: _Known) -> _Outcome[W]:
    try:
        first = not known.paths
        found = explicit(first)
        if found.path in known.paths:
            return found
        if not first:
            random.restore()
            found = explicit(True)
    except Redo:
        raise
    except Exception:  # the plain way decides whether something is wrong with the model, or only with following it
        random.restore()
        other = plain()
        known.plain = True
        return other
    random.restore()
    other = plain()
    known.plain = not _agree(found.derived, other.derived, found.low)
    known.paths.add(found.path)
    return other if known.plain else found


def _agree(one: Derived, other: Derived, low: bool) -> bool:
    """Whether two evaluations differ by no more than rounding: of all that was derived, the largest is compared, relative to its norm.

    Rounding moves a few units of a ReLU across zero, and with them their whole tangents: half a percent in 64 layers, in float32.
    """
    if one.derivatives.keys() != other.derivatives.keys():
        return False
    name = max(other.derivatives, key=lambda name: other.derivatives[name].numel())
    found, exact = (d.derivatives[name].double() for d in (one, other))
    eps = torch.finfo(other.values[name].dtype).eps
    return bool((found - exact).norm() <= (0.25 if low or eps > 1e-3 else 0.05 if eps > 1e-10 else 1e-4) * exact.norm() + eps)


class RandomState:
    """The global random state of the devices of a model, to begin again from."""

    def __init__(self, objective: Objective) -> None:
        self._gpus = _gpus(objective)
        self._states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in self._gpus]

    def restore(self) -> None:
        torch.set_rng_state(self._states[0])
        for device, state in zip(self._gpus, self._states[1], strict=True):
            torch.cuda.set_rng_state(state, device)


def _gpus(objective: Objective) -> list[int]:
    return sorted({p.get_device() for p in objective.parameters.values() if p.is_cuda})


@contextmanager
def _forward_mode(objective: Objective, commit: bool) -> Iterator[None]:
    """The settings under which torch's forward mode works on ordinary models; all are put back."""
    modules = list(objective.at.modules()) if isinstance(objective.at, nn.Module) else []
    with ExitStack() as stack:
        if not commit:
            stack.enter_context(torch.random.fork_rng(_gpus(objective)))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if torch.backends.mha.get_fastpath_enabled():
            torch.backends.mha.set_fastpath_enabled(False)
            stack.callback(torch.backends.mha.set_fastpath_enabled, True)
        if any(isinstance(module, nn.RNNBase) for module in modules):
            # not mkldnn.flags(): it also sets, and warns about, settings that are none of our business
            stack.callback(setattr, torch.backends.mkldnn, "enabled", torch.backends.mkldnn.enabled)
            torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        for module in modules:
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                stack.callback(module.register_forward_hook(_still_padding).remove)
        yield


def _still_padding(module: nn.Embedding, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    padding = torch.eq(inputs[0], module.padding_idx or 0).unsqueeze(-1)
    return torch.where(padding, output.detach(), output)
