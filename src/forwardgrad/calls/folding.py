"""Several evaluations of one loss as one batch, by `vmap`: whether it can follow the loss is tried, and remembered."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from forwardgrad.forward_mode import Redo, levels
from forwardgrad.objective import Objective, code_of

T = TypeVar("T")

_apart: Any = WeakIdKeyDictionary()  # by what is trained: the losses, by their code, whose evaluations come one after another


class Folding:
    """Whether the evaluations of a step can be one batch. One warning says it where they cannot, since they then take longer."""

    def __init__(self, objective: Objective, what: Hashable) -> None:
        at = objective.at if isinstance(objective.at, torch.nn.Module) else next(iter(objective.parameters.values()))
        if (known := _apart.get(at)) is None:
            known = _apart[at] = set()
        self._known, self._key = known, (code_of(objective.loss), what)
        self._error: Exception | None = None

    def tried(self, evaluate: Callable[[], T]) -> T | None:
        """The result of an evaluation under `vmap`, None where it is known not to work or turns out not to."""
        if self._key in self._known or self._error is not None:
            return None
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)  # of one operation: less than all apart
                return evaluate()
        except Redo:
            raise
        except Exception as error:
            if torch.compiler.is_compiling():
                raise
            self._error = error  # which may be the loss's own: then it comes again without vmap
            return None

    def finish(self) -> None:
        """The evaluations went through one after another: remember it, if they had failed as one batch."""
        if self._error is None:
            return
        self._known.add(self._key)
        text = [*str(self._error).strip().splitlines(), "no reason given"][0]
        self._error = None
        warnings.warn(
            f"directions are evaluated one after another under this loss, since vmap cannot follow it ({text}): the estimate is the same, "
            "and takes longer than as one batch",
            stacklevel=6,
        )


def side_by_side(steps: Sequence[float], count: int, like: Tensor) -> Tensor:
    """The steps of members, `count` with each, in float32 at least; nothing is copied from the host, which a captured graph could not."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.cat([torch.full((count,), step, dtype=dtype, device=like.device) for step in steps])


def beside(tensor: Tensor, member: Tensor) -> Tensor:
    """A copy of a tensor that each member of a batch under `vmap` may write to; `member` is any number of the member's own."""
    copy = tensor.clone()  # the one call that whoever watches calls sees, as in an evaluation alone
    with torch._C.DisableTorchFunction():
        own = torch.where(member.isnan(), copy, copy)
        own.__dict__.update(copy.__dict__)  # by which it is known
        return own


def attention_in_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """`F.scaled_dot_product_attention` of all members of a batch under `vmap` as one call, where it draws nothing."""
    if dropout_p > 0:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    found: Tensor = _Attention.apply(query, key, value, attn_mask, {"is_causal": is_causal, **options})  # type: ignore[no-untyped-call]
    return found


def attention_together(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """As `attention_in_one`, in less time, where no other transform is inside the vmap that is at work."""
    if dropout_p > 0:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    options["is_causal"] = is_causal

    def made(*given: levels.Members) -> Tensor:
        mask, each = (given[3].all, not given[3].shared) if len(given) > 3 else (None, False)
        return _attended([one.all for one in given[:3]], mask if mask is None or each else mask[0], each, options)

    return levels.together(made, query, key, value, *([] if attn_mask is None else [attn_mask]))


def linear_in_one(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of all members of a batch under `vmap` as one product that adds the bias, which vmap would add by itself."""
    if any(levels.hangs_on_member(t) for t in (weight, bias) if t is not None):
        return F.linear(input, weight, bias)

    def made(x: levels.Members) -> Tensor:
        flat = F.linear(x.all.reshape(-1, x.all.shape[-1]), weight, bias)  # of more dimensions torch adds the bias by itself, too
        return flat.view(*x.all.shape[:-1], -1)

    return levels.together(made, input) if levels.hangs_on_member(input) else F.linear(input, weight, bias)


class _Attention(torch.autograd.Function):
    """Kernels of attention have no rule for vmap: their batch takes the members in."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, int]:
        given = [_front(t, dim, info.batch_size) for t, dim in zip((query, key, value), in_dims[:3], strict=True)]
        mask = mask if mask is None or in_dims[3] is None else mask.movedim(in_dims[3], 0)
        return _attended(given, mask, in_dims[3] is not None, options), 0


def _attended(given: list[Tensor], mask: Tensor | None, each: bool, options: dict[str, Any]) -> Tensor:
    """What all members attend to, with the members in front of query, key and value, and of the mask where it is one of `each`."""
    count, lead = len(given[0]), given[0].shape[1:-2]
    wide = [t.unsqueeze(1) if t.dim() == 3 else t for t in given]
    wide = [t.flatten(0, t.dim() - 4) if t.dim() > 4 else t for t in wide]
    if mask is not None and (each or mask.dim() > 2):
        mask = mask if each else _front(mask, None, count)
        mask = mask.reshape(count, *[1] * (len(lead) + 3 - mask.dim()), *mask.shape[1:])
        mask = mask.expand(-1, *lead[:-1], *mask.shape[len(lead) :]) if lead else mask  # heads may share it
        mask = mask.unsqueeze(1) if mask.dim() == 3 else mask.flatten(0, mask.dim() - 4)
    found: Tensor = _Attention.apply(*wide, mask, options)  # type: ignore[no-untyped-call]
    return found.reshape(*given[0].shape[:-1], found.shape[-1])


def _front(tensor: Tensor, dim: int | None, count: int) -> Tensor:
    return tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
