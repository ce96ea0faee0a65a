"""Softmax attention by tiles, with K tangents or without: what is held grows with the length of a sequence, not with its square.

With S = s Q Kᵀ + M, P = softmax(S) and O = P V:

    Ṡ = s (Q̇ Kᵀ + Q K̇ᵀ) + Ṁ
    Ȯ = (P∘Ṡ) V − rowsum(P∘Ṡ) O + P V̇

The keys of a row come tile by tile. With m the largest number of the row so far, four sums are kept: those of E = exp(S − m), E V,
E∘Ṡ, and (E∘Ṡ) V + E V̇. They shrink by exp(m − m') when the next tile holds a larger number m'. O and Ȯ follow from their quotients.
Dropout with the factors D makes E∘D of E in front of V and V̇ alone: Σ E is that of all keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from forwardgrad.forward_mode.rules import dropout


class Laid(NamedTuple):
    """Query, key, value and mask, or their tangents, over the same dimensions of a batch."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True)
class AttentionCall:
    """What a call of attention was given, and the dimensions of its batch: those of heads are the last, two where heads share keys."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    drop: float
    causal: bool
    scale: float
    groups: tuple[int, int] | None  # heads of keys, and heads of queries that share one
    batch: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.query.shape[-2]

    @property
    def keys(self) -> int:
        return self.key.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what it returns."""
        batch = self.batch if self.groups is None else (*self.batch[:-2], math.prod(self.groups))
        return (*batch, self.rows, self.value.shape[-1])

    @property
    def precise(self) -> torch.dtype:
        """The type that is computed in: with half the bits torch's own formula sums in float32, too."""
        return self.query.dtype if self.query.dtype.itemsize >= 4 else torch.float32

    def laid(self, tensors: Laid | None = None) -> Laid:
        """What was given, or its tangents [K, ...], as views over the whole batch."""
        ends = [
            (self.rows, self.query.shape[-1]),
            (self.keys, self.key.shape[-1]),
            (self.keys, self.value.shape[-1]),
            (self.rows, self.keys),
        ]
        given = Laid(self.query, self.key, self.value, self.mask)
        found: list[Tensor | None] = []
        for like, tensor, end in zip(given, given if tensors is None else tensors, ends, strict=True):
            if like is None or tensor is None:
                found.append(None)
                continue
            lead = () if tensors is None else tensor.shape[:1]
            tensor = self._grouped(like, tensor)
            own = tensor.shape[len(lead) :]
            wide = tensor.reshape(*lead, *[1] * (len(self.batch) + 2 - len(own)), *own)
            found.append(wide.expand(*lead, *self.batch, *end))
        return Laid(*found)

    def _grouped(self, like: Tensor, tensor: Tensor) -> Tensor:
        if self.groups is None or like.dim() < 3:
            return tensor
        return tensor.unflatten(-3, self.groups) if like.shape[-3] == math.prod(self.groups) else tensor.unsqueeze(-3)


class Cut(NamedTuple):
    """A piece of the result: some of the batch, counted through from `first`, some rows, and the tiles of keys that these see."""

    at: tuple[slice, ...]
    first: int
    heads: int
    rows: slice
    keys: tuple[slice, ...]


def cuts(call: AttentionCall) -> list[Cut]:
    """The pieces that a call is made in. They follow from shapes alone: dropout draws a mask for each tile, in this order."""
    heads, most = math.prod(call.batch), _MOST.get(call.query.device.type, _MOST_ELSEWHERE)
    if heads * call.rows * call.keys <= most:
        return [Cut(tuple(slice(None) for _ in call.batch), 0, heads, slice(0, call.rows), (slice(0, call.keys),))]
    height = min(call.rows, max(_ROWS, most // call.keys))
    width = min(call.keys, max(1, most // height))
    found, first = [], 0
    for at, count in _parts_of(call.batch, max(1, most // (height * call.keys)) if height == call.rows and width == call.keys else 1):
        for start in range(0, call.rows, height):
            stop = min(start + height, call.rows)
            end = min(call.keys, stop) if call.causal else call.keys
            tiles = tuple(slice(key, min(key + width, end)) for key in range(0, end, width))
            found.append(Cut(at, first, count, slice(start, stop), tiles))
        first += count
    return found


_MOST = {"cpu": 2**18}
"""Numbers in a tile: as many as stay in the cache of a processor, elsewhere what keeps a GPU busy."""
_MOST_ELSEWHERE = 2**24
_ROWS = 256  # of a tile, where its keys are many


def _parts_of(batch: tuple[int, ...], most: int) -> Iterator[tuple[tuple[slice, ...], int]]:
    """Parts of a batch of at most so many heads, in order, with how many they have."""
    inner, whole = 1, len(batch)
    while whole and inner * batch[whole - 1] <= most:
        whole -= 1
        inner *= batch[whole]
    rest = tuple(slice(None) for _ in batch[whole:])
    if not whole:
        yield rest, inner
        return
    step = max(1, most // inner)
    for lead in product(*map(range, batch[: whole - 1])):
        for start in range(0, batch[whole - 1], step):
            stop = min(start + step, batch[whole - 1])
            yield (*(slice(i, i + 1) for i in lead), slice(start, stop), *rest), (stop - start) * inner


def _part(tensor: Tensor, cut: Cut, rows: slice, precise: torch.dtype, lead: int = 0) -> Tensor:
    """Some rows of some heads as one batch of matrices, behind K tangents where there are any."""
    part = tensor[(*[slice(None)] * lead, *cut.at, rows)]
    return part.reshape(*part.shape[:lead], cut.heads, *part.shape[-2:]).to(precise)


def _scores(call: AttentionCall, mask: Tensor | None, cut: Cut, keys: slice, query: Tensor, key: Tensor) -> Tensor:
    """S of one tile. Where a row does not see a key, −∞ is added, as torch does it: what is not a number stays so."""
    scores = torch.bmm(query, key.mT)
    if mask is not None:
        part = mask[(*cut.at, cut.rows, keys)]
        added = _hiding(part, scores.dtype) if part.dtype == torch.bool else part.to(scores.dtype)
        scores = (scores.view(*part.shape) + added).view(scores.shape)
    if call.causal and keys.stop > cut.rows.start + 1:
        first = max(keys.start, cut.rows.start)  # all rows see the keys in front
        part = scores[..., first - keys.start :]
        part += _hiding(torch.ones(part.shape[-2:], dtype=torch.bool, device=part.device).tril(cut.rows.start - first), part.dtype)
    return scores


def _hiding(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(seen.logical_not(), -math.inf)


def _softmax(scores: Tensor, masked: bool) -> Tensor:
    """Of whole rows. A row of which all is masked has no weights."""
    weights = torch.softmax(scores, -1)
    return weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0) if masked else weights


def _shift(top: Tensor, masked: bool) -> Tensor:
    """What is subtracted from the scores of rows before exp: their largest number, as long as there is one."""
    return top.masked_fill(top == -math.inf, 0.0) if masked else top


def values(call: AttentionCall) -> Tensor:
    """The result alone, by calls that torch's transforms and dual numbers go through; nothing is written in place."""
    laid, plan = call.laid(), cuts(call)
    blocks: list[Tensor] = []
    parts: list[Tensor] = []
    for cut in plan:
        blocks.append(_values(call, laid, cut))
        if cut.rows.stop == call.rows:
            parts.append(blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1))
            blocks = []
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.view(call.shape).to(call.query.dtype)


def _values(call: AttentionCall, laid: Laid, cut: Cut) -> Tensor:
    assert laid.query is not None
    assert laid.key is not None
    assert laid.value is not None
    masked = laid.mask is not None
    query = _part(laid.query, cut, cut.rows, call.precise) * call.scale
    total = summed = top = query.new_zeros(())
    for index, keys in enumerate(cut.keys):
        key, value = (_part(tensor, cut, keys, call.precise) for tensor in (laid.key, laid.value))
        scores = _scores(call, laid.mask, cut, keys, query, key)
        if len(cut.keys) == 1:
            return torch.bmm(_dropped(_softmax(scores, masked), call.drop), value)
        before, top = top, scores.detach().amax(-1, keepdim=True)
        top = torch.maximum(before, top) if index else top
        shift = _shift(top, masked)
        weights = (scores - shift).exp()
        more, along = weights.sum(-1, keepdim=True), torch.bmm(_dropped(weights, call.drop), value)
        shrink = (before - shift).exp()
        total, summed = (total * shrink + more, summed * shrink + along) if index else (more, along)
    return summed / total.masked_fill(total == 0, 1.0)


def _dropped(weights: Tensor, p: float) -> Tensor:
    return dropout.masked(torch.dropout, (weights, p, True), {}) if p else weights


def with_tangents(call: AttentionCall, moves: Laid, count: int) -> tuple[Tensor, Tensor]:
    """The result, and how it moves along K tangents [K, *shape]."""
    laid, moving, plan = call.laid(), call.laid(moves), cuts(call)
    if len(plan) == 1:
        out, moved = _Sums(call, laid, moving, plan[0], count).result()
    else:
        shape = (math.prod(call.batch), call.rows, call.value.shape[-1])
        out, moved = call.query.new_empty(shape), call.query.new_empty((count, *shape))
        for cut in plan:
            part = slice(cut.first, cut.first + cut.heads)
            out[part, cut.rows], moved[:, part, cut.rows] = _Sums(call, laid, moving, cut, count).result()
    return out.to(call.query.dtype).view(call.shape), moved.to(call.query.dtype).view(count, *call.shape)


class _Sums:
    """The sums over the keys of some rows, tile by tile; each tile of E and of E∘Ṡ is gone when the next one comes."""

    def __init__(self, call: AttentionCall, laid: Laid, moving: Laid, cut: Cut, count: int) -> None:
        assert laid.query is not None
        self.call, self.laid, self.moving, self.cut, self.count = call, laid, moving, cut, count
        self.query = _part(laid.query, cut, cut.rows, call.precise) * call.scale
        self.query_moves = self._moves(moving.query, cut.rows)
        if self.query_moves is not None:
            self.query_moves = self.query_moves * call.scale
        wide = (*self.query.shape[:-1], call.value.shape[-1])
        self.summed = self.query.new_zeros(wide)  # Σ E V
        self.moved = self.query.new_zeros((count, *wide))  # Σ (E∘Ṡ) V + E V̇
        self.drift = self.query.new_zeros((count, *wide[:-1], 1))  # Σ E∘Ṡ
        self.top: Tensor | None = None
        self.total: Tensor | None = None  # Σ E; None where E is P already

    def _moves(self, tensor: Tensor | None, rows: slice) -> Tensor | None:
        return None if tensor is None else _part(tensor, self.cut, rows, self.call.precise, 1)

    def result(self) -> tuple[Tensor, Tensor]:
        for keys in self.cut.keys:
            self._add(keys)
        if self.total is None:
            return self.summed, self.moved.sub_(self.drift * self.summed)
        total = self.total.masked_fill_(self.total == 0, 1.0)  # of a row of which all is masked
        out = self.summed.div_(total)
        return out, self.moved.sub_(self.drift * out).div_(total)

    def _add(self, keys: slice) -> None:
        """One tile."""
        assert self.laid.key is not None
        assert self.laid.value is not None
        key, value = (_part(tensor, self.cut, keys, self.call.precise) for tensor in (self.laid.key, self.laid.value))
        weights = self._weights(_scores(self.call, self.laid.mask, self.cut, keys, self.query, key))
        kept, factor = dropout.with_mask(torch.dropout, weights, self.call.drop) if self.call.drop else (weights, None)
        self.summed.baddbmm_(kept, value)
        key_moves, value_moves = self._moves(self.moving.key, keys), self._moves(self.moving.value, keys)
        for k in range(self.count):
            scores = self._score_moves(k, keys, key, None if key_moves is None else key_moves[k])
            if scores is not None:
                scores.mul_(weights)
                self.drift[k].add_(scores.sum(-1, keepdim=True))
                self.moved[k].baddbmm_(scores if factor is None else scores.mul_(factor), value)
            if value_moves is not None:
                self.moved[k].baddbmm_(kept, value_moves[k])

    def _weights(self, scores: Tensor) -> Tensor:
        """E of a tile, with all sums relative to the largest number so far; P where the tile is all there is."""
        masked = self.laid.mask is not None
        if len(self.cut.keys) == 1:
            return _softmax(scores, masked)
        before, top = self.top, scores.amax(-1, keepdim=True)
        self.top = top if before is None else torch.maximum(before, top)
        shift = _shift(self.top, masked)
        weights = scores.sub_(shift).exp_()
        more = weights.sum(-1, keepdim=True)
        if before is None or self.total is None:
            self.total = more
            return weights
        shrink = (before - shift).exp_()
        self.total = self.total.mul_(shrink).add_(more)
        for kept in (self.summed, self.moved, self.drift):
            kept.mul_(shrink)
        return weights

    def _score_moves(self, k: int, keys: slice, key: Tensor, key_moves: Tensor | None) -> Tensor | None:
        """Ṡ of a tile along one tangent, None where it is zero."""
        scores = None if self.query_moves is None else torch.bmm(self.query_moves[k], key.mT)
        if key_moves is not None:
            scores = torch.bmm(self.query, key_moves.mT) if scores is None else scores.baddbmm_(self.query, key_moves.mT)
        if self.moving.mask is not None:
            part = self.moving.mask[k][(*self.cut.at, self.cut.rows, keys)].to(self.call.precise)
            whole = part.reshape(*self.query.shape[:-1], part.shape[-1])
            scores = whole.clone() if scores is None else scores.add_(whole)
        return scores
