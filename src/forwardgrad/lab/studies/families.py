"""Networks that come in sizes, by name: a family, its depth and its width, as `vgg8b-w4` or `resnet32-x2`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from forwardgrad.lab.errors import UserError

FAMILIES = ("vgg8b", "vgg16", "vgg19", "resnet20")  # as they are listed; any other depth 6n + 2 goes for resnet
SIZED = re.compile(r"(?P<name>vgg8b|vgg16|vgg19|resnet(?P<depth>[1-9]\d*))(-(?P<how>[wx])(?P<factor>[1-9]\d*))?")
LARGEST_FACTOR, LARGEST_DEPTH = 64, 1202  # the deepest network of He et al. (2016)


@dataclass(frozen=True)
class Family:
    """A network's family and its size: `name` without digits of the depth for resnet, widths times `times` over `parts`."""

    name: str
    depth: int = 0
    times: int = 1
    parts: int = 1

    def wide(self, channels: int) -> int:
        """The width of a layer that has so many channels in the network's usual size; at least 1."""
        return max(1, channels * self.times // self.parts)


def family_of(name: str) -> Family | None:
    """The family that a network's name means; None where it means none. UserError for a size that there is not.

    >>> family_of("vgg8b-w4").wide(128), family_of("resnet32-x2").wide(16), family_of("nn")
    (32, 32, None)
    """
    if (found := SIZED.fullmatch(name)) is None:
        return None
    depth, factor = int(found["depth"] or 0), int(found["factor"] or 1)
    if found["depth"] and ((depth - 2) % 6 or not 8 <= depth <= LARGEST_DEPTH):
        raise UserError(f"the model {name!r} has no such depth: a resnet has 6n + 2 layers, from 8 to {LARGEST_DEPTH}, as resnet20 has")
    if found["how"] and not 2 <= factor <= LARGEST_FACTOR:
        raise UserError(f"the model {name!r} has no such width: write a factor from 2 to {LARGEST_FACTOR}, as vgg8b-w4 or resnet20-x2")
    times, parts = (factor, 1) if found["how"] == "x" else (1, factor)
    return Family("resnet" if depth else found["name"], depth, times, parts)


TRANSFORMERS = ("bert-6x384",)  # as they are listed; any layers and width go
TRANSFORMER = re.compile(r"(?P<kind>bert|gpt)-(?P<layers>[1-9]\d{0,2})x(?P<width>[1-9]\d{0,4})")
HEAD_WIDTH = 64  # of a head of attention in BERT and in GPT-2; MiniLM's are half as wide


@dataclass(frozen=True)
class Transformer:
    """A transformer: its kind ("bert" reads a whole text, "gpt" predicts the next token), its blocks, and the numbers that a token has."""

    kind: str
    layers: int
    width: int

    @property
    def heads(self) -> int:
        """Heads of attention: of 64 numbers each, one at least."""
        return max(1, self.width // HEAD_WIDTH)


def transformer_of(name: str) -> Transformer | None:
    """The transformer that a name means, such as `gpt-12x768`; None where it means none. UserError for a width without heads.

    >>> transformer_of("gpt-12x768"), transformer_of("bert-6x384").heads, transformer_of("nn")
    (Transformer(kind='gpt', layers=12, width=768), 6, None)
    """
    if (found := TRANSFORMER.fullmatch(name)) is None:
        return None
    made = Transformer(found["kind"], int(found["layers"]), int(found["width"]))
    if made.width % made.heads:
        raise UserError(f"the model {name!r} has no such width: its heads have {HEAD_WIDTH} numbers each, so write a multiple of that")
    return made
