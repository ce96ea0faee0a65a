"""Recognise a loss that is a sum of torch's loss functions, c₁·f₁(output) + c₂·f₂(output) + … + the rest, by the arithmetic behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forwardgrad.calls.paths import writes
from forwardgrad.forward_mode.rules import Output

Factor = Tensor | float


@dataclass(frozen=True)
class Scaled:
    """One loss function's part of a sum: its call, the number of the tensor it was given, and what it is multiplied by.

    A result that is not reduced counts as its mean; its factor may then be one number an element.
    """

    output: Output
    index: int
    factor: Factor

    def repeated(self, rows: int) -> Factor:
        """The factor where every example has so many rows."""
        each = isinstance(self.factor, Tensor) and self.factor.dim() > 0
        return self.factor.repeat_interleave(rows) if isinstance(self.factor, Tensor) and each else self.factor

    def error(self, values: Tensor) -> Tensor:
        """The part's derivative with respect to the tensor it was given."""
        error, factor = self.output.error(values), self.factor
        if isinstance(factor, Tensor) and factor.dim():
            factor = factor if factor.dim() == error.dim() else factor.unsqueeze(1 if error.dim() > 1 else 0)
        return error if isinstance(factor, float) and factor == 1.0 else error * factor


@dataclass(frozen=True)
class Sum:
    """A tensor that is a sum of scaled parts and of `rest`, tensors that are not told apart; `shape` of the elements that it has."""

    parts: tuple[Scaled, ...]
    rest: tuple[Tensor, ...]
    shape: torch.Size

    def scaled(self, factor: Factor) -> Sum:
        return Sum(tuple(Scaled(p.output, p.index, p.factor * factor) for p in self.parts), self.rest, self.shape)

    def only(self) -> tuple[tuple[Scaled, ...], list[int]]:
        """The parts with the tensors that they are about counted anew, and the numbers that those had."""
        used = sorted({p.index for p in self.parts})
        return tuple(Scaled(p.output, used.index(p.index), p.factor) for p in self.parts), used


class Sums:
    """The sums that are known in one evaluation, by the tensors that hold them."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Sum, int]] = {}  # with the version of the tensor, which whatever writes to it raises

    def __bool__(self) -> bool:
        return bool(self._known)

    def begin(self, result: Any, output: Output, index: int) -> None:
        """Know the result of a loss function."""
        if isinstance(result, Tensor):
            self._known[id(result)] = result, Sum((Scaled(output, index, 1.0),), (), result.shape), result._version

    def of(self, value: Any) -> Sum | None:
        found = self._known.get(id(value)) if isinstance(value, Tensor) else None
        return None if found is None or found[2] != found[0]._version else found[1]

    def before(self, args: tuple[Any, ...]) -> list[Sum | None]:
        """What is known of the arguments of a call that is about to be made, and may write to them."""
        return [self.of(value) for value in args]

    def follow(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, before: list[Sum | None]
    ) -> None:
        """Know the result of a call, if it is a sum of what was known before it."""
        if not writes(func, args, kwargs):  # forward mode may count a call as a write that leaves the values alone
            for value, known in zip(args, before, strict=True):
                if known is not None:
                    self._known[id(value)] = value, known, value._version
        if (rule := _RULES.get(func)) is None or not isinstance(result, Tensor) or not any(known is not None for known in before):
            return
        made = rule(list(zip(args, before, strict=True)), kwargs, result)
        if made is not None:
            self._known[id(result)] = result, made, result._version


_Operand = tuple[Any, Sum | None]
_Rule = Callable[[list[_Operand], dict[str, Any], Tensor], Sum | None]


def _single(tensor: Tensor | float) -> bool:
    return not isinstance(tensor, Tensor) or tensor.numel() == 1


def _plus(operands: list[_Operand], kwargs: dict[str, Any], result: Tensor, sign: float = 1.0, turned: bool = False) -> Sum | None:
    scale = kwargs.get("alpha", 1)
    if len(operands) != 2 or kwargs.keys() - {"alpha"} or not isinstance(scale, (int, float)):
        return None
    total = Sum((), (), result.shape)
    for (value, known), factor in zip(operands, (sign, 1.0) if turned else (1.0, sign * scale), strict=True):
        if known is not None:
            if known.shape.numel() != result.numel():  # each element would count several times
                return None
            scaled = known if factor == 1.0 else known.scaled(factor)
            total = Sum(total.parts + scaled.parts, total.rest + scaled.rest, result.shape)
        elif isinstance(value, Tensor):
            if value.numel() != result.numel() and not _single(value):
                return None
            total = Sum(total.parts, (*total.rest, value), result.shape)
    return total


def _times(operands: list[_Operand], kwargs: dict[str, Any], result: Tensor) -> Sum | None:
    if len(operands) != 2 or kwargs or (operands[0][1] is None) == (operands[1][1] is None):
        return None
    ((_, known),) = [pair for pair in operands if pair[1] is not None]
    ((factor, _),) = [pair for pair in operands if pair[1] is None]
    return _multiplied(known, factor, result)


def _over(operands: list[_Operand], kwargs: dict[str, Any], result: Tensor) -> Sum | None:
    if len(operands) != 2 or kwargs or operands[1][1] is not None or operands[0][1] is None:
        return None
    return _multiplied(operands[0][1], 1 / operands[1][0], result)


def _multiplied(known: Sum | None, factor: Any, result: Tensor) -> Sum | None:
    if known is None or known.shape.numel() != result.numel() or (known.rest and not _single(factor)):
        return None
    if isinstance(factor, Tensor):
        if factor.is_complex() or not (factor.numel() == 1 or factor.shape == known.shape):
            return None
        factor = factor.detach().reshape(()) if factor.numel() == 1 else factor.detach()
    elif not isinstance(factor, (int, float)):
        return None
    scaled = known.scaled(float(factor) if isinstance(factor, (int, float)) else factor)
    return Sum(scaled.parts, scaled.rest, result.shape)


def _same(operands: list[_Operand], kwargs: dict[str, Any], result: Tensor) -> Sum | None:
    known = operands[0][1]
    if known is None or known.shape.numel() != result.numel() or not result.is_floating_point():
        return None
    if known.shape.numel() > 1 and result.shape != known.shape:  # factors of elements would no longer fit
        return None
    return Sum(known.parts, known.rest, result.shape)


def _negative(operands: list[_Operand], kwargs: dict[str, Any], result: Tensor) -> Sum | None:
    known = operands[0][1]
    return None if known is None else known.scaled(-1.0)


def _mean(operands: list[_Operand], kwargs: dict[str, Any], result: Tensor) -> Sum | None:
    known = operands[0][1]
    if known is None or len(operands) > 1 or kwargs or (known.rest and known.shape.numel() > 1):
        return None
    return Sum(known.parts, known.rest, result.shape)


def _sum(operands: list[_Operand], kwargs: dict[str, Any], result: Tensor) -> Sum | None:
    found, known = _mean(operands, kwargs, result), operands[0][1]
    return None if found is None or known is None else found.scaled(float(known.shape.numel()))


def _minus(operands: list[_Operand], kwargs: dict[str, Any], result: Tensor) -> Sum | None:
    return _plus(operands, kwargs, result, sign=-1.0)


def _minus_turned(operands: list[_Operand], kwargs: dict[str, Any], result: Tensor) -> Sum | None:
    return _plus(operands, kwargs, result, sign=-1.0, turned=True)


_RULES: dict[Callable[..., Any], _Rule] = {
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__), _plus),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__, Tensor.sub_, Tensor.__isub__), _minus),
    **dict.fromkeys((torch.rsub, Tensor.__rsub__), _minus_turned),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__), _times),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__, Tensor.div_, Tensor.__itruediv__, torch.true_divide), _over),
    **dict.fromkeys((torch.neg, Tensor.neg, Tensor.__neg__), _negative),
    **dict.fromkeys((torch.mean, Tensor.mean), _mean),
    **dict.fromkeys((torch.sum, Tensor.sum), _sum),
    **dict.fromkeys((Tensor.float, Tensor.double, Tensor.to, Tensor.reshape, Tensor.view, torch.reshape, Tensor.squeeze), _same),
    **dict.fromkeys((torch.squeeze, Tensor.clone, Tensor.contiguous, Tensor.requires_grad_), _same),
}
