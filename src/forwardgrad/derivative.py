"""Losses and their directional derivatives: the only file that calls forward-mode AD, and the home of every torch work-around.

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

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

_DROPPED = (
    "the loss carries no tangent: it does not depend on any trainable parameter, or a detach(), .item() or numpy call on the way dropped it"
)
Point = nn.Module | Tensor | Sequence[Tensor]
"""Where a loss is evaluated: a module, one tensor, or several tensors."""


class _Evaluation(nn.Module):
    """The loss of a model as a module, so that `functional_call` can exchange the model's parameters under any loss function."""

    def __init__(self, loss: Callable[..., Tensor], model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss_of = loss

    def forward(self) -> tuple[Any, dict[str, Tensor]]:
        loss = self.loss_of(self.model)
        return loss, {place.name: place.tensor for place in _places(self, "_buffers")}  # read again: a model may put a new one there


class _Place(NamedTuple):
    """Where a module keeps a tensor; a module or tensor that is reached under several names has one place for each module alone."""

    name: str
    module: nn.Module
    key: str
    tensor: Tensor


def _places(root: nn.Module, kind: Literal["_parameters", "_buffers"]) -> Iterator[_Place]:
    for prefix, module in root.named_modules():
        for key, tensor in getattr(module, kind).items():
            if tensor is not None:
                yield _Place(f"{prefix}.{key}" if prefix else key, module, key, tensor)


class Objective:
    """A loss as a function of the tensors it is trained by.

    `loss` takes what `at` is: the module, the tensor, or the tensors as separate arguments; it returns a tensor of one element, or of
    one element an example, whose mean is then the loss.
    `parameters` are the live tensors with `requires_grad=True`, by name; tied weights appear once.

    Raises TypeError or ValueError where there is nothing to train, or something that cannot be trained.
    """

    def __init__(self, loss: Callable[..., Tensor], at: Point) -> None:
        if not callable(loss):
            raise TypeError(
                f"the loss must be a function of the model, such as `lambda model: loss_fn(model(x), y)`, not a {type(loss).__name__}"
            )
        self.loss, self.at = loss, at
        self._module = _Evaluation(loss, at) if isinstance(at, nn.Module) else None
        self._tensors = {} if self._module else _named(at)
        named = dict(at.named_parameters(prefix="model")) if isinstance(at, nn.Module) else self._tensors
        self.parameters = {name: p for name, p in named.items() if p.requires_grad}
        if not self.parameters:
            raise ValueError("nothing to train: no parameter has requires_grad=True")
        for name, p in self.parameters.items():
            if not p.is_leaf:
                raise ValueError(f"{name} is the result of a computation, not a leaf: its .grad would never be used")
            if not p.is_floating_point():
                raise TypeError(f"{name} is {p.dtype}: forward gradients need real floating-point parameters")

    def live(self) -> Tensor:
        """The loss of the live tensors: an ordinary forward pass, recorded for reverse mode if the caller's context says so."""
        return _scalar(self.precise(self.loss(self.at) if self._module else self.loss(*self._tensors.values())))

    def with_(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with these tensors in place of the live ones, and the buffers that the evaluation leaves; the model's own stay."""
        loss, buffers = self.raw(parameters)
        return _scalar(self.precise(loss)), buffers

    def raw(self, parameters: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """As `with_`, with whatever the loss function returned."""
        if self._module is None:
            return self.loss(*(parameters.get(name, t) for name, t in self._tensors.items())), {}
        instead = {id(p): parameters[name] for name, p in self.parameters.items()}  # tied weights: one tensor in several places
        for place in _places(self._module, "_buffers"):
            instead.setdefault(id(place.tensor), place.tensor.clone())
        places = [*_places(self._module, "_parameters"), *_places(self._module, "_buffers")]
        state = {place.name: instead[id(place.tensor)] for place in places if id(place.tensor) in instead}
        result: tuple[Any, dict[str, Tensor]] = functional_call(self._module, state, (), tie_weights=False)
        return result

    def precise(self, loss: Any) -> Any:
        """What the loss function returned in no less than the parameters' precision: autocast may have left it, and d, in 8 or 11 bits."""
        most = max((p.dtype for p in self.parameters.values()), key=lambda dtype: dtype.itemsize)
        lacks = isinstance(loss, Tensor) and loss.is_floating_point() and loss.dtype.itemsize < min(most.itemsize, 4)
        return loss.to(most) if lacks else loss

    def commit(self, buffers: Mapping[str, Tensor]) -> None:
        """Make these buffers the model's own."""
        for place in _places(self._module, "_buffers") if self._module else ():
            if 0 in place.tensor.stride():  # an expanded constant cannot be written to, but may have been replaced
                place.module._buffers[place.key] = buffers[place.name]
            else:
                place.tensor.copy_(buffers[place.name])


def _named(at: object) -> dict[str, Tensor]:
    tensors = [at] if isinstance(at, Tensor) else at
    if not isinstance(tensors, Sequence) or not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError(f"expected a module, a tensor, or a list or tuple of tensors to train, not {type(at).__name__}")
    if len({id(t) for t in tensors}) < len(tensors):
        raise ValueError("the same tensor was given twice: its two derivatives could not be told apart")
    return {f"tensor {index}": t for index, t in enumerate(tensors)}


def directional_derivatives(
    objective: Objective, tangents: Mapping[str, Float[Tensor, "k ..."]], *, commit: bool = True
) -> tuple[Float[Tensor, ""], Float[Tensor, " k"]]:
    """The loss and its derivatives d[k] = ∇f · v[k] along k tangents that share one primal pass; nothing is kept for a backward pass.

    `commit=False` leaves the model's buffers and the global random state as they were, so that another evaluation of the same step
    sees the same batch statistics and the same dropout.
    Raises RuntimeError when the loss carries no tangent, NotImplementedError (torch's own) when an operator has no forward-mode rule.
    """
    primals = {name: p.detach() for name, p in objective.parameters.items()}

    def evaluate(parameters: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, buffers = objective.with_(parameters)
        if not carries(loss):
            raise RuntimeError(_DROPPED)
        return loss, buffers

    def along(tangent: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        result: tuple[Tensor, Tensor, dict[str, Tensor]] = jvp(evaluate, (primals,), (tangent,), has_aux=True)  # type: ignore[assignment]
        return result

    count = next(iter(tangents.values())).shape[0]
    with torch.no_grad(), _forward_mode(objective, commit):
        if count == 1:
            loss, derivative, buffers = along({name: v[0] for name, v in tangents.items()})
            derivatives = derivative.reshape(1)
        else:
            loss, derivatives, buffers = vmap(along, out_dims=(None, 0, None), randomness="same")(dict(tangents))  # type: ignore[arg-type]
        if commit:
            objective.commit(buffers)
    return loss, derivatives.to(loss.dtype)


class Watch(Protocol):
    """What stands at every torch call of an evaluation, and puts tangents in where they belong.

    `open` is the context in which the model runs; `close` takes the loss it returned and says what else shall be derived, by name, and
    what of the primal pass shall be kept, by name; `keep` gets the latter back as plain tensors. `silent` tells whether the loss may
    carry no tangent, because what moved was seen elsewhere.
    """

    @property
    def silent(self) -> bool: ...

    def open(self, inject: Inject, pick: Callable[[Tensor], Tensor], parameters: Mapping[str, Tensor]) -> AbstractContextManager[Any]: ...

    def close(self, loss: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...

    def keep(self, tensors: dict[str, Tensor]) -> None: ...


Inject = Callable[[Tensor, Tensor], Tensor]
"""(tensor, tangent) → the tensor with the tangent added to the one it carries; its values stay what they are."""


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


class Derived(NamedTuple):
    """Values of one evaluation by name, and their derivatives [k, ...] along each tangent; "loss" is always there."""

    values: dict[str, Tensor]
    derivatives: dict[str, Tensor]


def derivatives_under(objective: Objective, watch: Watch, count: int, *, commit: bool = True) -> Derived:
    """Evaluate a loss once under a watch that puts in `count` tangents, sharing one primal pass; nothing is kept for a backward pass.

    With count 0 nothing is derived: an ordinary forward pass under the watch. `commit`, and what is raised, as `directional_derivatives`.
    """
    primals = {name: p.detach() for name, p in objective.parameters.items()}

    def evaluate(inject: Inject, pick: Callable[[Tensor], Tensor]) -> tuple[dict[str, Tensor], Any]:
        with watch.open(inject, pick, primals):
            loss, buffers = objective.raw(primals)
        outputs, kept = watch.close(loss)
        outputs = {"loss": _per_example(objective.precise(loss)), **outputs}
        if count and not watch.silent and not carries(outputs["loss"]):
            raise RuntimeError(_DROPPED)
        return outputs, (kept, buffers)

    def along(index: Tensor) -> Any:
        pick = (lambda stack: stack[0]) if count == 1 else (lambda stack: stack.index_select(0, index.reshape(1)).squeeze(0))
        inject: Callable[[Tensor], Inject] = lambda scale: lambda t, v: _Injection.apply(t, scale, v.to(t.dtype))  # type: ignore[no-untyped-call]  # noqa: E731
        return jvp(lambda scale: evaluate(inject(scale), pick), (zero,), (torch.ones_like(zero),), has_aux=True)

    first = next(iter(primals.values()))
    zero = torch.zeros((), dtype=first.dtype, device=first.device)
    with torch.no_grad(), _forward_mode(objective, commit):
        if count == 0:
            values, (kept, buffers) = evaluate(lambda tensor, _: tensor, lambda stack: stack)
            derivatives = {}
        elif count == 1:
            values, derivatives, (kept, buffers) = along(zero)
            derivatives = {name: d.unsqueeze(0) for name, d in derivatives.items()}
        else:
            indices = torch.arange(count, device=first.device)
            values, derivatives, (kept, buffers) = vmap(along, out_dims=(None, 0, None), randomness="same")(indices)  # type: ignore[arg-type]
        if commit:
            objective.commit(buffers)
    watch.keep(kept)
    return Derived(values, derivatives)


def primal(tensor: Tensor) -> Tensor:
    """The values of a tensor without the tangent that it carries."""
    value: Tensor = forward_ad.unpack_dual(tensor).primal
    return value


def carries(tensor: Tensor) -> bool:
    """Whether a tensor carries a tangent."""
    return forward_ad.unpack_dual(tensor).tangent is not None


@contextmanager
def _forward_mode(objective: Objective, commit: bool) -> Iterator[None]:
    """The settings under which torch's forward mode works on ordinary models; all are put back."""
    modules = list(objective.at.modules()) if isinstance(objective.at, nn.Module) else []
    with ExitStack() as stack:
        if not commit:
            cuda = sorted({p.get_device() for p in objective.parameters.values() if p.is_cuda})
            stack.enter_context(torch.random.fork_rng(cuda))
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


def _scalar(loss: Any) -> Tensor:
    each = _per_example(loss)
    return each.mean() if each.dim() else each  # a loss of whole numbers has no mean, and its own error


def _per_example(loss: Any) -> Tensor:
    """The loss as one number, or one number an example."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss must return a tensor, not {type(loss).__name__}")
    if loss.numel() == 0 or (loss.numel() > 1 and loss.dim() > 1):
        raise ValueError(
            f"the loss must have one element, or one an example, not shape {tuple(loss.shape)}: reduce it with mean() or sum()"
        )
    if loss.is_complex():
        raise TypeError("the loss is complex: take its real part or its absolute value")
    return loss.reshape(()) if loss.numel() == 1 else loss
