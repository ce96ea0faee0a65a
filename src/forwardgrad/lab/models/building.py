"""From a network's name to the module."""

from __future__ import annotations

from torch import nn

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.models import paper, pretrained
from forwardgrad.lab.models.residual import residual
from forwardgrad.lab.models.tokens import LONGEST, Bert, Gpt
from forwardgrad.lab.models.vgg import vgg
from forwardgrad.lab.studies import Transformer, family_of, transformer_of


def build(name: str, shape: tuple[int, ...], classes: int, *, next_token: bool = False) -> nn.Module:
    """The network `name` for inputs of `shape`: images (channels, height, width), or texts (tokens,).

    With `next_token` the target is the token behind every place of a text, and `classes` is how many tokens there are.

    Raises UserError for a name that there is not, for texts where the network takes images and the other way round, for images that are
    too small and for texts that are too long, for targets of the other kind, and where the package that has a network's weights is missing.
    """
    transformer = transformer_of(name)
    if transformer is not None or name in pretrained.MODELS:
        _check_text(name, shape, LONGEST["gpt" if transformer and transformer.kind == "gpt" else "bert"])
        if next_token and not (transformer and transformer.kind == "gpt"):
            raise UserError(f"the model {name} sorts whole texts, and these data ask for the token behind every place: choose gpt-4x128")
        if transformer is None:
            return pretrained.build(name, classes)
        return _fresh(name, transformer, classes, shape[0] if next_token else None)
    if len(shape) != 3:
        raise UserError(f"the model {name} takes images, but an input here has the shape {shape}: choose other data, or a model for them")
    image = shape[0], shape[1], shape[2]
    if (family := family_of(name)) is None:
        return paper.build(name, image, classes)
    return (residual if family.name == "resnet" else vgg)(family, image, classes)


def _check_text(name: str, shape: tuple[int, ...], longest: int) -> None:
    if len(shape) != 1:
        other = "choose --data movie-reviews, or texts of yours"
        raise UserError(f"the model {name} reads texts, but an input here has the shape {shape}: {other}")
    if shape[0] > longest:
        raise UserError(f"the model {name} reads {longest} tokens at most, but a text here has {shape[0]}")


def _fresh(name: str, found: Transformer, classes: int, places: int | None) -> nn.Module:
    """A transformer with fresh weights; `places` are those of a text where the token behind each is the target."""
    size = found.layers, found.width, found.heads
    if found.kind == "bert":
        return Bert(*size, classes)
    if places is not None:
        return Gpt(*size, classes, places)
    if classes:
        raise UserError(f"the model {name} predicts the next token of a text, and these data have classes: choose bert- in its place")
    return Gpt(*size)
