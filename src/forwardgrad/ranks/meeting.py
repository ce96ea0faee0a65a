"""How processes that torchrun started come together, the first time and after torchrun has started them again."""

from __future__ import annotations

import hashlib
import secrets
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_PAUSE = 0.02  # seconds between two looks


def join_ranks(timeout: float | None = None) -> None:
    """Make the processes that torchrun started the default group, by gloo: in place of `torch.distributed.init_process_group("gloo")`.

    After `torchrun --max-restarts` has started all of them again they share a store with those that have ended, and may take the addresses
    of these for one another's: then `init_process_group` ends with "Connection refused". Here processes that live find one another first.

    Args:
        timeout: seconds that a process waits for the others, here and in every exchange; None: those of `init_process_group`.

    Raises ValueError for a timeout that is no time, or where torchrun's variables are not set; RuntimeError where not all processes are
    there in time, or there is a group already.
    """
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout must be a number of seconds above 0, or None, not {timeout!r}")
    if dist.is_initialized():
        raise RuntimeError("the processes have joined a group already: leave init_process_group out, or join_ranks")
    limit = dist.default_pg_timeout if timeout is None else timedelta(seconds=timeout)
    store, rank, size = next(dist.rendezvous("env://", timeout=limit))  # type: ignore[attr-defined]
    name = meeting(store, rank, size, limit.total_seconds())
    apart = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=apart, rank=rank, world_size=size, timeout=limit)


def meeting(store: Any, rank: int, size: int, seconds: float) -> str:
    """A word that so many processes have in common, and no earlier ones that used the same store.

    Each leaves a random token. The word is made of the tokens of all, and counts once each process has seen the same ones: one that has
    ended cannot have seen those that came later.
    """
    store.set(f"token {rank}", secrets.token_hex(8))
    until = time.monotonic() + seconds
    while True:
        tokens = b" ".join(store.get(f"token {other}") for other in range(size))
        word = hashlib.blake2b(tokens, digest_size=8).hexdigest()
        store.set(f"{word} {rank}", "")
        if store.check([f"{word} {other}" for other in range(size)]):
            return word
        if time.monotonic() > until:
            raise RuntimeError(f"rank {rank} of {size} waited in vain for all others to be there: start them again")
        time.sleep(_PAUSE)
