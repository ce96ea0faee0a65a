"""Losses and their directional derivatives: the only file that calls forward-mode AD, and the home of every torch work-around.

Each work-around stands in one place and can go when torch no longer needs it:

- `no_grad` is enforced: with live Parameters outside it, `torch.func.jvp` would also record a graph for reverse mode.
- Attention runs on the MATH backend with the fused inference path off: the others have no forward-mode rule.
- CPU LSTM and GRU run without oneDNN, whose recurrent kernels have no forward-mode rule.
- Buffers (BatchNorm's statistics) are cloned inside each evaluation and committed once a step.
- Random layers (dropout) see one state of the global generator a step, however many evaluations the step makes.
- A loss whose tangent was dropped on the way (detach, .item(), numpy) is an error: torch itself would answer zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

Point = nn.Module | Tensor | Sequence[Tensor]
"""Where a loss is evaluated: a module, one tensor, or several tensors."""


class _Evaluation(nn.Module):
    """The loss of a model as a module, so that `functional_call` can exchange the model's parameters under any loss function."""

    def __init__(self, loss: Callable[..., Tensor], model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss_of = loss

    def forward(self) -> Tensor:
        return self.loss_of(self.model)


class Objective:
    """A loss as a function of the tensors it is trained by.

    `loss` takes what `at` is: the module, the tensor, or the tensors as separate arguments; it returns a tensor of one element.
    `parameters` are the live tensors with `requires_grad=True`, by name; tied weights appear once.
    """

    def __init__(self, loss: Callable[..., Tensor], at: Point) -> None:
        if not callable(loss):
            raise TypeError(
                f"the loss must be a function of the model, such as `lambda model: loss_fn(model(x), y)`, not a {type(loss).__name__}"
            )
        self.loss, self.at = loss, at
        self._module = _Evaluation(loss, at) if isinstance(at, nn.Module) else None
        self.parameters = {name: p for name, p in self._tensors() if p.requires_grad}
        self.buffers = dict(self._module.named_buffers()) if self._module else {}
        if not self.parameters:
            raise ValueError("nothing to train: no parameter has requires_grad=True")
        for name, p in self.parameters.items():
            if not p.is_leaf:
                raise ValueError(f"{name} is the result of a computation, not a leaf: its .grad would never be used")
            if not p.is_floating_point():
                raise TypeError(f"{name} is {p.dtype}: forward gradients need real floating-point parameters")

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        if isinstance(self.at, nn.Module):
            return ((f"model.{name}", p) for name, p in self.at.named_parameters())
        tensors = [self.at] if isinstance(self.at, Tensor) else list(self.at)
        if not all(isinstance(t, Tensor) for t in tensors):
            raise TypeError(f"expected a module, a tensor or tensors to train, got {type(self.at).__name__}")
        return ((f"tensor {index}", t) for index, t in enumerate(tensors))

    def live(self) -> Tensor:
        """The loss of the live tensors: an ordinary forward pass, recorded for reverse mode if the caller's context says so."""
        if isinstance(self.at, (nn.Module, Tensor)):
            return _scalar(self.loss(self.at))
        return _scalar(self.loss(*self.at))

    def with_(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Tensor:
        """The loss with these tensors in place of the live ones; `buffers` are updated in place as the model updates its own."""
        if self._module is not None:
            return _scalar(functional_call(self._module, {**parameters, **buffers}, ()))
        return _scalar(self.loss(*(parameters.get(name, t) for name, t in self._tensors())))


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
        buffers = {name: b.clone() for name, b in objective.buffers.items()}
        loss = objective.with_(parameters, buffers)
        if forward_ad.unpack_dual(loss).tangent is None:
            raise RuntimeError(
                "the loss carries no tangent: it does not depend on any trainable parameter, or a detach(), .item() or numpy call "
                "on the way dropped it"
            )
        return loss, buffers

    def along(tangent: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss, derivative, buffers = jvp(evaluate, (primals,), (tangent,), has_aux=True)
        return loss, derivative, buffers

    count = next(iter(tangents.values())).shape[0]
    with torch.no_grad(), _forward_mode(objective, commit):
        if count == 1:
            loss, derivative, buffers = along({name: v[0] for name, v in tangents.items()})
            derivatives = derivative.reshape(1)
        else:
            loss, derivatives, buffers = vmap(along, out_dims=(None, 0, None), randomness="same")(dict(tangents))
        if commit:
            for name, b in objective.buffers.items():
                b.copy_(buffers[name])
    return loss, derivatives


@contextmanager
def _forward_mode(objective: Objective, commit: bool) -> Iterator[None]:
    """The settings under which torch's forward mode works on ordinary models; all are put back."""
    with ExitStack() as stack:
        if not commit:
            cuda = sorted({p.get_device() for p in objective.parameters.values() if p.is_cuda})
            stack.enter_context(torch.random.fork_rng(cuda))
        if isinstance(objective.at, nn.Module):
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if torch.backends.mha.get_fastpath_enabled():
                torch.backends.mha.set_fastpath_enabled(False)
                stack.callback(torch.backends.mha.set_fastpath_enabled, True)
            if any(isinstance(module, nn.RNNBase) for module in objective.at.modules()):
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        yield


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss must return a tensor, not {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"the loss must have one element, not shape {tuple(loss.shape)}: reduce it with mean() or sum()")
    return loss.reshape(())
