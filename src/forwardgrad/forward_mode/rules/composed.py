"""Operators that torch has no forward mode for, composed of operators that it has.

A composition takes the arguments of the operator and gives its result. It is made call by call, so each call in it goes by its own rule.
It stands in for the operator only where an argument moves: an ordinary forward pass makes the ordinary call. The numbers are the same but
for rounding. Where backpropagation leaves something out on purpose, a composition leaves out the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from forwardgrad.forward_mode.levels import unwrapped
from forwardgrad.forward_mode.rules import dropout

Composition = Callable[..., Any]


def composition_of(function: Any) -> Composition | None:
    """What stands in for a call of a function; it gives NotImplemented where the call is to be made as it is."""
    return COMPOSED.get(function)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Any:
    if dim == -1:
        return v * (g / torch.linalg.vector_norm(v))
    return v * (g / torch.linalg.vector_norm(v, 2, [d for d in range(v.dim()) if d != dim % v.dim()], keepdim=True))


def _normalize(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None) -> Any:
    """With `out` it is not differentiable, as its documentation says: spectral_norm's power method, whose vectors stand still."""
    if out is None:
        return NotImplemented
    return F.normalize(x.detach(), p, dim, eps, out=out)


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """All differences of rows at once would be as many tensors of the result's size as a row has numbers: they are made part by part."""
    if not (x1.numel() and x2.numel()):
        return torch.cdist(x1.detach(), x2.detach(), p)
    parts = x1.split(max(1, x1.shape[-2] // x1.shape[-1]), -2)
    return torch.cat([torch.linalg.vector_norm(part.unsqueeze(-2) - x2.unsqueeze(-3), p, -1) for part in parts], -2)


def _pdist(x: Tensor, p: float = 2.0) -> Any:
    first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
    if not (first.numel() and x.numel()):
        return F.pdist(x.detach(), p)
    each = max(len(x), first.numel() // x.shape[1])
    pairs = zip(first.split(each), second.split(each), strict=True)
    return torch.cat([torch.linalg.vector_norm(x.index_select(0, a) - x.index_select(0, b), p, -1) for a, b in pairs])


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Torch's own rule would train the row of padding, and count every use of a word in full."""
    if padding_idx is None and not scale_grad_by_freq:
        return NotImplemented
    rows = F.embedding(input, weight, None, max_norm, norm_type)
    if scale_grad_by_freq:
        rows = _by_frequency(rows, input, len(weight))
    return rows if padding_idx is None else torch.where(input.eq(padding_idx % len(weight)).unsqueeze(-1), rows.detach(), rows)


def _by_frequency(rows: Tensor, indices: Tensor, words: int) -> Tensor:
    """Rows that move by their share of the uses of a word: what `scale_grad_by_freq` makes of a gradient, which is no derivative."""
    uses = torch.bincount(indices.flatten(), minlength=words)[indices].unsqueeze(-1)
    still = rows.detach()
    return still + (rows - still) / uses


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    still = weight.detach()
    scales = None if per_sample_weights is None else per_sample_weights.detach()
    _, *rest = torch.embedding_bag(still, indices, offsets, False, mode, False, scales, include_last_offset, padding_idx)
    count = len(offsets) - include_last_offset
    sizes = rest[1][:count].unsqueeze(1)  # of the bags, without padding
    if mode == _MAX:
        winners = rest[2]
        return torch.where(sizes.ne(0), weight.gather(0, winners.clamp(min=0)), 0), rest[0], rest[1], rest[2]
    taken = weight.index_select(0, indices)
    if scale_grad_by_freq:
        taken = _by_frequency(taken, indices, len(weight))
    if per_sample_weights is not None:
        taken = taken * per_sample_weights.unsqueeze(1)
    if padding_idx is not None:
        taken = taken * indices.ne(padding_idx % len(weight)).unsqueeze(1)
    bags = torch.searchsorted(offsets[:count].contiguous(), torch.arange(len(indices), device=indices.device), right=True) - 1
    total = weight.new_zeros(count, weight.shape[1]).index_add(0, bags, taken)
    return (total / sizes.clamp(min=1) if mode == _MEAN else total), rest[0], rest[1], rest[2]


_MEAN, _MAX = 1, 2


def _pack(x: Tensor, lengths: Tensor, batch_first: bool = False) -> tuple[Tensor, Tensor]:
    steps = x.transpose(0, 1) if batch_first else x
    sizes = [int((unwrapped(lengths) > step).sum()) for step in range(len(steps))]
    places = [step * steps.shape[1] + row for step, size in enumerate(sizes) for row in range(size)]
    data = steps.flatten(0, 1).index_select(0, torch.tensor(places, device=x.device))
    return data, torch.tensor([size for size in sizes if size])


def _unpack(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int | None = None
) -> tuple[Tensor, Tensor]:
    sizes: list[int] = unwrapped(batch_sizes).tolist()
    steps, rows = max(len(sizes), total_length or 0), sizes[0]
    begins = [sum(sizes[:step]) for step in range(len(sizes))]
    places = [begins[step] + row if step < len(sizes) and row < sizes[step] else -1 for step in range(steps) for row in range(rows)]
    place = torch.tensor(places, device=data.device)
    there = place.ge(0).view(-1, *[1] * (data.dim() - 1))
    out = torch.where(there, data.index_select(0, place.clamp(min=0)), padding_value).unflatten(0, (steps, rows))
    lengths = torch.tensor([sum(size > row for size in sizes) for row in range(rows)])
    return (out.transpose(0, 1) if batch_first else out), lengths


def _recurrent(name: str) -> Composition:
    """A recurrent layer over a packed sequence, step by step, as torch's own table of decompositions has it."""

    def composition(data: Tensor, batch_sizes: Any, *rest: Any) -> Any:
        if not isinstance(batch_sizes, Tensor) or batch_sizes.is_floating_point():  # not packed
            return NotImplemented
        steps: list[int] = unwrapped(batch_sizes).tolist()
        return getattr(_decompositions(), name)(data, steps, *rest)

    return composition


def _decompositions() -> Any:
    from torch._decomp import decompositions  # beside the compiler, and slow to import

    return decompositions


def _grid_sampler(x: Tensor, grid: Tensor, mode: int, padding_mode: int, align_corners: bool) -> Any:
    """Of images, as torch's own table of decompositions has it; there is none for volumes."""
    if x.dim() != 4:
        return NotImplemented
    return _decompositions()._grid_sampler_2d(x, grid, mode, padding_mode, align_corners, False)


def _conv_tbc(x: Tensor, weight: Tensor, bias: Tensor, pad: int = 0) -> Tensor:
    return F.conv1d(x.permute(1, 2, 0), weight.permute(2, 1, 0), bias, padding=pad).permute(2, 0, 1)


class _Slopes(torch.autograd.Function):
    """The slopes of a random leaky ReLU as an ordinary call draws them, below all levels of torch.func."""

    @staticmethod
    def forward(x: Tensor, lower: float, upper: float, training: bool) -> Tensor:
        return torch.where(x < 0, F.rrelu(x, lower, upper, training) / x, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *rest: Any) -> Any:
        raise NotImplementedError("vmap: we do not yet support aten::rrelu_with_noise of a batch")


def _rrelu(writes: bool) -> Composition:
    def composition(x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False) -> Tensor:
        slopes: Tensor = _Slopes.apply(x.detach(), lower, upper, training)  # type: ignore[no-untyped-call]
        return x.mul_(slopes) if inplace or writes else x * slopes

    return composition


def _multi_margin_loss(
    x: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    if size_average is not None or reduce is not None:
        return NotImplemented
    rows, labels = x.reshape(-1, x.shape[-1]), target.reshape(-1, 1)
    other = torch.ones_like(rows, dtype=torch.bool).scatter(1, labels, False)
    short = (margin - rows.gather(1, labels) + rows).clamp(min=0) ** p
    loss = (short * other * (1 if weight is None else weight[labels])).sum(1) / x.shape[-1]
    return _reduced(loss.reshape(target.shape), reduction)


def _multilabel_margin_loss(
    x: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean"
) -> Any:
    """A target lists labels up to the first −1."""
    if size_average is not None or reduce is not None:
        return NotImplemented
    rows, labels = x.reshape(-1, x.shape[-1]), target.reshape(-1, x.shape[-1])
    listed = labels.lt(0).cumsum(1).eq(0)
    wanted = torch.zeros_like(rows).scatter_add(1, labels.clamp(min=0), listed.to(rows.dtype)).gt(0)
    loss = torch.zeros_like(rows[:, 0])
    for place in range(x.shape[-1]):  # not all at once: of C classes that would be C² numbers a row
        here = listed[:, place : place + 1]
        if not here.any():
            break
        short = (1 - rows.gather(1, labels[:, place : place + 1].clamp(min=0)) + rows).clamp(min=0)
        loss = loss + (short * (here & ~wanted)).sum(1) / x.shape[-1]
    return _reduced(loss.reshape(target.shape[:-1]), reduction)


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def linear_cross_entropy(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Any:
    """Products and losses of a few rows at a time where `options` are given, else of all: no more scores are there at once.

    In parts torch's own forward mode drops the tangent in silence.
    """
    if min(x.dim(), linear_weight.dim()) < 2 or linear_weight.dim() > 2 or reduction not in ("none", "mean", "sum") or not len(x):
        return NotImplemented
    ignored = -100 if ignore_index is None else ignore_index
    how: dict[str, Any] = {"weight": weight, "ignore_index": ignored, "label_smoothing": label_smoothing, "reduction": reduction}
    if options is None:
        return F.cross_entropy(F.linear(x, linear_weight, linear_bias), target, **how)
    size = options.batch_chunk_size or -(-x.numel() // len(linear_weight))  # scores of as many numbers as the input has
    how["reduction"] = "none" if reduction == "none" else "sum"
    each = [
        F.cross_entropy(F.linear(x[start : start + size], linear_weight, linear_bias), target[start : start + size], **how)
        for start in range(0, len(x), size)
    ]
    if reduction == "none":
        return torch.cat(each)
    total = sum(each[1:], start=each[0])
    return total if reduction == "sum" else total / _labelled(target, weight, ignored)


def _labelled(target: Tensor, weight: Tensor | None, ignored: int) -> Any:
    """How many labels there are, or the sum of the weights of their classes: what a mean divides by."""
    if target.is_floating_point():
        return len(target)
    used = target != ignored
    return used.sum() if weight is None else (weight[torch.where(used, target, 0)] * used).sum()


def _at_one(function: Callable[..., Any]) -> Composition:
    """By an index without dimensions, which torch's forward mode with several tangents takes for one of a smaller result."""

    def composition(x: Tensor, dim: int, index: Tensor, *source: Any, **options: Any) -> Any:
        return NotImplemented if index.dim() else function(x, dim, index.reshape(1), *source, **options)

    return composition


COMPOSED: dict[Any, Composition] = {
    torch._weight_norm: _weight_norm,
    F.normalize: _normalize,
    torch.cdist: _cdist,
    torch.pdist: _pdist,
    F.embedding: _embedding,
    F.embedding_bag: dropout.opened(F.embedding_bag),
    torch.embedding_bag: _embedding_bag,
    torch._pack_padded_sequence: _pack,
    torch._pad_packed_sequence: _unpack,
    torch.lstm: _recurrent("lstm_data_impl"),
    torch.gru: _recurrent("gru_impl_data"),
    torch.rnn_tanh: _recurrent("rnn_tanh_data"),
    torch.rnn_relu: _recurrent("rnn_relu_data"),
    F.grid_sample: dropout.opened(F.grid_sample),
    torch.grid_sampler: _grid_sampler,
    torch.conv_tbc: _conv_tbc,
    **dict.fromkeys((F.rrelu, torch.rrelu), _rrelu(False)),
    torch.rrelu_: _rrelu(True),
    F.linear_cross_entropy: linear_cross_entropy,
    F.multi_margin_loss: _multi_margin_loss,
    F.multilabel_margin_loss: _multilabel_margin_loss,
    **{
        function: _at_one(function)
        for name in ("index_select", "index_copy", "index_add", "index_copy_", "index_add_")
        for function in (getattr(torch, name, None), getattr(Tensor, name))
        if function is not None
    },
    torch.cholesky: lambda x, upper=False: torch.linalg.cholesky(x, upper=upper),
}
"""Compositions by the function that they stand in for."""
