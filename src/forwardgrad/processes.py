"""Training in several processes of torch.distributed: refused until the user says how the processes work together."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch.distributed
from torch import nn

from forwardgrad.objective import Point

_independent: ContextVar[bool] = ContextVar("independent ranks", default=False)


@contextmanager
def independent_ranks() -> Iterator[None]:
    """Inside, each process of a torch.distributed group trains on its own: nothing is exchanged between the processes.

    For sweeps under `torchrun`, and for loops that average `.grad` over the processes by themselves after each estimate. Processes that
    train one model together are a `Distributed`.
    """
    token = _independent.set(True)
    try:
        yield
    finally:
        _independent.reset(token)


def several() -> bool:
    """Whether torch.distributed runs several processes, and nobody said that each of them trains on its own."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1 and not _independent.get()


def check_processes(at: Point, *, reverse: bool, eager: bool = True, together: bool = False) -> None:
    """Raise RuntimeError where an estimate would be wrong without a word, as several processes take part in it.

    `together`: whether they exchange what they find out, as a `Distributed`;
    `reverse`: whether the estimate is a backward pass, whose hooks average it over the processes of a DistributedDataParallel module;
    `eager`: whether those hooks are run.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if any(_sharded(module) for module in _modules(at)):
        raise RuntimeError(
            "the parameters of a module under FSDP are not where they are used, so no estimate can move them: "
            "pass the module as it was before it was sharded"
        )
    if any(_divided(parameter) for module in _modules(at) for parameter in module.parameters(recurse=False)):
        raise RuntimeError(
            "a parameter is divided among processes (a DTensor, as of tensor parallelism), so no estimate can move it: "
            "pass the module as it was before it was divided"
        )
    ranks = torch.distributed.get_world_size()
    if ranks < 2 or (reverse and eager and not together and isinstance(at, nn.parallel.DistributedDataParallel)):
        return
    wrapped = any(isinstance(module, nn.parallel.DistributedDataParallel) for module in _modules(at))
    if wrapped and together:
        raise RuntimeError("a group averages by itself: pass the module that DistributedDataParallel wraps (model.module)")
    if wrapped:
        raise RuntimeError(
            f"DistributedDataParallel averages gradients over its {ranks} processes in the backward pass alone, and here there is none: "
            "pass the module that it wraps (model.module) with group=forwardgrad.Distributed(), or train it with Backprop() "
            'and engine="eager"'
        )
    if not _independent.get() and not together:
        raise RuntimeError(
            f"torch.distributed runs {ranks} processes, and estimates are not exchanged between them, so their weights would drift apart: "
            "pass group=forwardgrad.Distributed() to let them train one model, or train inside `with forwardgrad.independent_ranks():` if "
            "each process has a model of its own or you average .grad yourself"
        )


def _modules(at: Point) -> Iterator[nn.Module]:
    return at.modules() if isinstance(at, nn.Module) else iter(())


def _divided(parameter: nn.Parameter) -> bool:
    """Whether each process has a part of a parameter. As below, nothing is loaded for that."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(parameter, tensors.DTensor)


def _sharded(module: nn.Module) -> bool:
    """Whether a module is under FSDP, of which nothing is loaded here: who uses it has loaded it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, (fsdp.FullyShardedDataParallel, fsdp.FSDPModule))
