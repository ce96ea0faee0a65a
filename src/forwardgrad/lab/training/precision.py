"""The precision that a run computes in: float32, or bfloat16 with float32 parameters."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from forwardgrad.lab.studies import Precision

Arranged = TypeVar("Arranged", Tensor, nn.Module)


def computing(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Where layers compute in this precision; parameters, losses and updates stay in float32."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, torch.bfloat16)


def arranged(what: Arranged, precision: Precision) -> Arranged:
    """Inputs or a network in the order in memory that convolutions of this precision are fastest in; only images have one."""
    if precision == "float32":
        return what
    if isinstance(what, nn.Module):
        return what.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
    return what.contiguous(memory_format=torch.channels_last) if what.dim() == 4 else what
