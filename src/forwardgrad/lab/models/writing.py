"""A text written on by a network that predicts the next token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


@torch.no_grad()
def written(
    model: nn.Module,
    tokens: Sequence[int],
    *,
    count: int,
    places: int,
    stop: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[int]:
    """The tokens that a network writes behind others: `count`, or those ahead of the token `stop`.

    Each is drawn with softmax(scores / temperature), or is the likeliest one where the temperature is 0. The network sees the last `places`
    tokens.
    """
    row = list(tokens)
    while len(row) < len(tokens) + count:
        scores = model(torch.tensor([row[-places:]]))[0, -1]
        if temperature:
            drawn = int(torch.multinomial(torch.softmax(scores.double() / temperature, 0), 1, generator=generator))
        else:
            drawn = int(scores.argmax())
        if drawn == stop:
            break
        row.append(drawn)
    return row[len(tokens) :]
