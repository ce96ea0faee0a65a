"""The optimizers that every arm of a case takes its steps with, each in the fastest form that torch has for it.

`sgd` is plain; `momentum` is SGD with momentum 0.9; `adam` and `adamw` have torch's own settings.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from forwardgrad.lab.errors import UserError

OptimizerName = Literal["sgd", "momentum", "adam", "adamw"]
LR = 1e-7  # small, so that no arm diverges while it is timed
MOMENTUM = 0.9


def chosen_optimizers(text: str) -> list[OptimizerName]:
    """The optimizers that a list of names between commas asks for. Raises UserError for one that does not exist."""
    known: dict[str, OptimizerName] = {name: name for name in get_args(OptimizerName)}
    words = list(dict.fromkeys(word.strip() for word in text.split(",")))
    for word in words:
        if word not in known:
            raise UserError(f"unknown optimizer {word!r}: choose from {', '.join(known)}")
    return [known[word] for word in words]


def made(name: OptimizerName, parameters: Iterable[nn.Parameter], *, captured: bool = False) -> torch.optim.Optimizer:
    """An optimizer whose memory is there already, so that no step that is measured has to make it.

    Momentum, Adam and AdamW are torch's fused kernels. With `captured`, Adam and AdamW are those that a compiled step on a GPU can take
    into its graph.
    """
    trained = [p for p in parameters if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(trained, LR)
    if name == "momentum":
        return _begun(torch.optim.SGD(trained, LR, momentum=MOMENTUM, fused=True), trained)
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    if captured and trained and trained[0].is_cuda:
        return _begun(kind(trained, torch.tensor(LR, device=trained[0].device), capturable=True), trained)
    return _begun(kind(trained, LR, fused=True), trained)


def _begun(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer after a step along gradients of zero, which makes its memory."""
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What an optimizer holds between steps, in bytes."""
    kept = [slot for slots in optimizer.state.values() for slot in slots.values() if isinstance(slot, Tensor)]
    return sum(slot.untyped_storage().nbytes() for slot in kept)
