"""Losses whose error at the model's output is known in closed form, and what each example contributes to a derivative.

The error e = ∂f/∂output needs no reverse pass: softmax − onehot for the cross-entropy, the difference for the squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Output:
    """A call of a loss function: what it was given beside the model's output, and its error as a function of the output."""

    call: Mapping[str, Any]
    formula: Callable[[Tensor, Mapping[str, Any]], Tensor]

    def error(self, output: Tensor) -> Tensor:
        """∂f/∂output, of the output's shape, in float32 at least; a loss that is not reduced counts as the mean of its elements."""
        with torch.autocast(output.device.type, enabled=False):
            return self.formula(output.to(torch.promote_types(output.dtype, torch.float32)), self.call)

    def derivative(self, output: Tensor, moved: Tensor) -> Tensor:
        """That of the loss [K] along K tangents [K, *output] of the output, summed in the precision of the error."""
        return (self.error(output) * moved).flatten(1).sum(1)


def _cross_entropy(logits: Tensor, call: Mapping[str, Any]) -> Tensor:
    """With targets q (smoothed) and class weights w: e = (Σ w q) softmax(z) − w q over the number, or the weights, of the targets."""
    target, weight = call["target"], call.get("weight")
    axis = 1 if logits.dim() > 1 else 0
    classes, smoothing = logits.shape[axis], call.get("label_smoothing", 0.0)
    indexed = target.shape != logits.shape or not target.is_floating_point()
    if indexed and weight is None and not smoothing:
        return _of_labels(logits, target, axis, call)
    if indexed:
        used = target != call.get("ignore_index", -100)
        labels = torch.where(used, target, 0)
        wanted = torch.zeros_like(logits).scatter(axis, labels.unsqueeze(axis), 1.0)
    else:
        wanted = target.to(logits.dtype)
    wanted = wanted * (1 - smoothing) + smoothing / classes
    if weight is not None:
        wanted = wanted * weight.reshape(-1, *[1] * (logits.dim() - axis - 1))
    error: Tensor = wanted.sum(axis, keepdim=True) * logits.softmax(axis) - wanted
    if indexed:
        error = error * used.unsqueeze(axis)
        count = (used if weight is None else weight[labels] * used).sum()
    else:
        count = torch.tensor(logits.numel() // classes)
    reduction = call.get("reduction", "mean")
    if reduction == "none":
        count = torch.tensor(logits.numel() // classes)
    return error if reduction == "sum" else error / count


def _of_labels(logits: Tensor, target: Tensor, axis: int, call: Mapping[str, Any]) -> Tensor:
    """The same for labels alone, which most losses are: softmax(z) less one at the label, in few operations."""
    used = target != call.get("ignore_index", -100)
    hit = used.unsqueeze(axis).to(logits.dtype)
    labels = torch.where(used, target, 0).unsqueeze(axis)
    if torch.compiler.is_compiling():  # element by element it is part of what uses it
        classes = torch.arange(logits.shape[axis], device=logits.device).view(-1, *[1] * (logits.dim() - 1 - axis % logits.dim()))
        error: Tensor = (logits.softmax(axis) - (labels == classes).to(logits.dtype)) * hit
    else:
        error = (logits.softmax(axis) * hit).scatter_add_(axis, labels, -hit)
    reduction = call.get("reduction", "mean")
    return error if reduction == "sum" else error / (hit.sum() if reduction == "mean" else used.numel())


def _squared_error(output: Tensor, call: Mapping[str, Any]) -> Tensor:
    error: Tensor = 2 * (output - call["target"])
    return error if call.get("reduction", "mean") == "sum" else error / output.numel()


def _binary(output: Tensor, call: Mapping[str, Any]) -> Tensor:
    error: Tensor = output.sigmoid() - call["target"]
    return error if call.get("reduction", "mean") == "sum" else error / output.numel()


_Formula = Callable[[Tensor, Mapping[str, Any]], Tensor]
OUTPUTS: dict[Callable[..., Any], tuple[_Formula, tuple[str, ...]]] = {
    F.cross_entropy: (
        _cross_entropy,
        ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing"),
    ),
    F.mse_loss: (_squared_error, ("input", "target", "size_average", "reduce", "reduction", "weight")),
    F.binary_cross_entropy_with_logits: (
        _binary,
        ("input", "target", "weight", "size_average", "reduce", "reduction", "pos_weight"),
    ),
}
_SUPPORTED: dict[_Formula, set[str]] = {_cross_entropy: {"weight"}, _squared_error: set(), _binary: set()}


def bind(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Output | None:
    """The output that this call is, None where the function or an option has no closed form here."""
    if function not in OUTPUTS:
        return None
    formula, names = OUTPUTS[function]
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    beyond = {"size_average", "reduce", "weight", "pos_weight"} - _SUPPORTED[formula]
    if any(call.get(name) is not None for name in beyond):
        return None
    if formula is not _cross_entropy and call["target"].shape != call["input"].shape:
        return None
    return Output(call, formula)


def spread(rows: Tensor, count: int) -> Tensor:
    """Derivatives [k, n] of n loss terms as what belongs to each of `count` examples of a layer, [k, count].

    With as many terms as examples each has its own; several terms of one example (the words of a sentence) add up; several rows of one
    example (its patches) share; where neither count divides the other, no row can be told from another and all get the sum.
    """
    terms = rows.shape[1]
    if terms == count:
        return rows
    if terms % count == 0:
        return rows.reshape(len(rows), count, -1).sum(2)
    if count % terms == 0:
        return rows.repeat_interleave(count // terms, dim=1)
    return rows.sum(1, keepdim=True).expand(-1, count)


def shared_out(parts: Tensor, count: int) -> Tensor:
    """What `parts` [k, n] predict of n groups of examples as what they predict of each of `count` groups, [k, count]: the sum stays."""
    groups = parts.shape[1]
    if count % groups == 0:
        return parts.repeat_interleave(count // groups, dim=1) / (count // groups)
    return spread(parts, count)
