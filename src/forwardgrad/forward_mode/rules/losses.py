"""Losses whose error at the model's output is known in closed form.

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
    labelled: bool = False

    @property
    def classes(self) -> int:
        """How many classes an example is told apart in."""
        return self.call["input"].shape[1]  # type: ignore[no-any-return]

    @property
    def classifies(self) -> bool:
        """Whether it is the cross-entropy of class indices, one for each row of scores."""
        target, scores = self.call["target"], self.call["input"]
        rows = (*scores.shape[:1], *scores.shape[2:])
        return self.labelled and not target.is_floating_point() and scores.dim() > 1 and target.shape == rows

    def cross_entropy(self, target: Tensor, merged: Tensor | None = None) -> Output:
        """The cross-entropy with the same options, of other logits with this target.

        `merged`: for every class, the one of fewer classes that stands for it; the logits are those of these.
        """
        call = {**self.call, "target": target}
        return Output(call, _cross_entropy, True) if merged is None else Output({**call, "merged": merged}, _merged, True)

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


def _merged(logits: Tensor, call: Mapping[str, Any]) -> Tensor:
    """The error at logits [rows, merged classes]: each of these has as its target the sum of those of the classes that it stands for."""
    target, weight, merged, smoothing = call["target"], call.get("weight"), call["merged"], call.get("label_smoothing", 0.0)
    used = target != call.get("ignore_index", -100)
    labels = torch.where(used, target, 0)
    heavy = used.to(logits.dtype) if weight is None else weight[labels].to(logits.dtype) * used
    wanted = torch.zeros_like(logits).scatter(1, merged[labels].unsqueeze(1), (1 - smoothing) * heavy.unsqueeze(1))
    if smoothing:
        each = logits.new_ones(len(merged)) if weight is None else weight.to(logits.dtype)
        wanted = wanted + smoothing / len(merged) * used.unsqueeze(1) * logits.new_zeros(logits.shape[1]).index_add(0, merged, each)
    error: Tensor = wanted.sum(1, keepdim=True) * logits.softmax(1) - wanted
    reduction = call.get("reduction", "mean")
    return error if reduction == "sum" else error / (heavy.sum() if reduction == "mean" else used.numel())


def _negative_log(logits: Tensor, call: Mapping[str, Any]) -> Tensor:
    """−w at the label, over the number, or the weights, of the labels: the loss is linear in log-probabilities."""
    target, weight = call["target"], call.get("weight")
    axis = 1 if logits.dim() > 1 else 0
    used = target != call.get("ignore_index", -100)
    labels = torch.where(used, target, 0)
    heavy = used.to(logits.dtype) if weight is None else weight[labels].to(logits.dtype) * used
    error = torch.zeros_like(logits).scatter(axis, labels.unsqueeze(axis), -heavy.unsqueeze(axis))
    reduction = call.get("reduction", "mean")
    return error if reduction == "sum" else error / (heavy.sum() if reduction == "mean" else used.numel())


def _by_number(slope: Callable[[Tensor, Mapping[str, Any]], Tensor]) -> _Formula:
    """The error of a loss that is a sum or mean over numbers, from its derivative at each."""

    def formula(output: Tensor, call: Mapping[str, Any]) -> Tensor:
        error = slope(output, call)
        return error if call.get("reduction", "mean") == "sum" else error / output.numel()

    return formula


def _binary(output: Tensor, call: Mapping[str, Any]) -> Tensor:
    target, weight, positive = call["target"], call.get("weight"), call.get("pos_weight")
    if positive is None:
        error: Tensor = output.sigmoid() - target
    else:
        error = output.sigmoid() * (1 - target + positive * target) - positive * target
    return error if weight is None else error * weight


def _of_probabilities(output: Tensor, call: Mapping[str, Any]) -> Tensor:
    error: Tensor = (output - call["target"]) / (output * (1 - output)).clamp(min=1e-12)  # as torch bounds it
    return error if call.get("weight") is None else error * call["weight"]


def _smooth(output: Tensor, call: Mapping[str, Any]) -> Tensor:
    beta, off = call.get("beta", 1.0), output - call["target"]
    error: Tensor = off.sign() if beta == 0 else (off / beta).clamp(-1, 1)
    return error


_Formula = Callable[[Tensor, Mapping[str, Any]], Tensor]
_squared_error = _by_number(lambda output, call: 2 * (output - call["target"]))
_LABELS = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction")
_NUMBERS = ("input", "target", "size_average", "reduce", "reduction")
OUTPUTS: dict[Callable[..., Any], tuple[_Formula, tuple[str, ...]]] = {
    F.cross_entropy: (_cross_entropy, (*_LABELS, "label_smoothing")),
    F.nll_loss: (_negative_log, _LABELS),
    F.mse_loss: (_squared_error, (*_NUMBERS, "weight")),
    F.l1_loss: (_by_number(lambda output, call: (output - call["target"]).sign()), (*_NUMBERS, "weight")),
    F.smooth_l1_loss: (_by_number(_smooth), (*_NUMBERS, "beta")),
    F.huber_loss: (
        _by_number(lambda output, call: (output - call["target"]).clamp(-call.get("delta", 1.0), call.get("delta", 1.0))),
        ("input", "target", "reduction", "delta", "weight"),
    ),
    F.binary_cross_entropy: (_by_number(_of_probabilities), _LABELS[:4] + _LABELS[5:]),
    F.binary_cross_entropy_with_logits: (
        _by_number(_binary),
        ("input", "target", "weight", "size_average", "reduce", "reduction", "pos_weight"),
    ),
}
_LABELLED = (F.cross_entropy, F.nll_loss)
_WEIGHTED = (*_LABELLED, F.binary_cross_entropy, F.binary_cross_entropy_with_logits)


def bind(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Output | None:
    """The output that this call is, None where the function or an option has no closed form here."""
    if function not in OUTPUTS:
        return None
    formula, names = OUTPUTS[function]
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    beyond = {"size_average", "reduce"} | (set() if function in _WEIGHTED else {"weight"})
    if any(call.get(name) is not None for name in beyond) or not isinstance(call.get("input"), Tensor):
        return None
    if function not in _LABELLED and call["target"].shape != call["input"].shape:
        return None
    return Output(call, formula, function in _LABELLED)
