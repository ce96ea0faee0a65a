"""What a step is timed on: a network, a batch and an order in memory. They are the same for all arms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forwardgrad.lab import models
from forwardgrad.lab.bench import networks, optimizers
from forwardgrad.lab.bench.optimizers import OptimizerName
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import FAMILIES, family_of, transformer_of

Layout = Literal["fastest", "contiguous", "channels-last"]
LossName = Literal["whole", "parts"]
Sweep = Literal["depth", "convolutions", "width", "batch"]
INPUTS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "logistic": ("mnist", (1, 28, 28)),
    "mlp": ("digits", (1, 8, 8)),
    "nn": ("mnist", (1, 28, 28)),
    "cnn": ("mnist", (1, 28, 28)),
    "cifar-cnn": ("cifar10", (3, 32, 32)),
}
CLASSES = 10
PAPER = "nn,cnn,cifar-cnn"
DEPTHS, WIDTHS, BATCHES = (2, 4, 8, 16, 32, 64), (64, 256, 1024, 4096), (1, 4, 16, 64, 256, 1024, 4096)
CONVOLUTIONS = (4, 8, 16, 32)
SEQUENCE = 128  # tokens of an example of a transformer, unless told otherwise


@dataclass(frozen=True)
class BenchCase:
    """One network at one batch size.

    `layout` is the order in memory of images and convolutions, `optimizer` what takes every step, `sequence` the tokens of an example of a
    transformer. `loss` says whether the scores of all places are there at once, or those of a few: see `Gpt`.
    """

    model: str
    batch: int
    layout: Layout = "fastest"
    optimizer: OptimizerName = "sgd"
    sequence: int | None = None
    loss: LossName = "whole"

    def __post_init__(self) -> None:
        if self.loss == "parts" and not (self._gpt and hasattr(nn, "LinearCrossEntropyOptions")):
            newer = "this torch has no loss in parts: install torch 2.13 or newer"
            lacks = newer if self._gpt else f"{self.model} has few classes: use it with gpt-12x768 or another gpt-"
            raise UserError(f"--loss parts is for the scores of a vocabulary; {lacks}")
        if (transformer := transformer_of(self.model)) is not None:
            most = models.LONGEST[transformer.kind]
            if self.sequence is None or not 1 <= self.sequence <= most:
                raise UserError(f"{self.model} reads 1 to {most:,} tokens an example, not {self.sequence}: choose with --sequence")
            return
        if self.sequence is not None:
            raise UserError(f"--sequence is for transformers, such as gpt-12x768; {self.model} takes no tokens")
        own = networks.MLP.fullmatch(self.model) or networks.is_vgg(self.model)
        if self.model not in INPUTS and not own and family_of(self.model) is None:
            shapes = "mlp-LAYERSxWIDTH such as mlp-64x1024, vgg-LAYERSxWIDTH such as vgg-16x32, its layers a multiple of 4"
            shapes += ", gpt- or bert-LAYERSxWIDTH such as gpt-12x768"
            sized = f"{', '.join(FAMILIES)} with a width or without, such as vgg8b-w4"
            raise UserError(f"unknown model {self.model!r}: choose from {', '.join(INPUTS)}, {shapes}, or {sized}")

    @property
    def data(self) -> str:
        return "tokens" if self.sequence else self._input[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an input."""
        return (self.sequence,) if self.sequence else self.image

    @property
    def image(self) -> tuple[int, int, int]:
        """The shape of an image, of a network that takes images."""
        return self._input[1]

    @property
    def _gpt(self) -> bool:
        transformer = transformer_of(self.model)
        return transformer is not None and transformer.kind == "gpt"

    @property
    def too_wide(self) -> str | None:
        """Why methods that keep numbers for every output and unit are not measured: at a vocabulary they would fill any memory."""
        if not self._gpt:
            return None
        return f"it keeps numbers for each of {models.WORDS['gpt']:,} outputs and every unit, which no memory holds"

    @property
    def _input(self) -> tuple[str, tuple[int, int, int]]:
        colour = family_of(self.model) is not None or networks.is_vgg(self.model)
        return INPUTS.get(self.model) or INPUTS["cifar-cnn" if colour else "nn"]


def chosen_cases(
    names: str | None,
    batches: str,
    sweep: Sweep | None,
    layout: Layout,
    optimizer: str = "sgd",
    sequence: int | None = None,
    loss: LossName = "whole",
) -> list[BenchCase]:
    """The cases that a command asks for. A sweep takes the place of the option that it varies.

    `sequence` is for the transformers among them.
    """
    if names is not None and sweep in ("depth", "convolutions", "width"):
        raise UserError(f"--sweep {sweep} has its own networks: leave --models out")
    own = {
        "depth": [f"mlp-{depth}x1024" for depth in DEPTHS],
        "convolutions": [f"vgg-{depth}x32" for depth in CONVOLUTIONS],
        "width": [f"mlp-3x{width}" for width in WIDTHS],
    }
    chosen = own.get(sweep or "") or _words(names or ("nn" if sweep == "batch" else PAPER))
    sizes = list(BATCHES) if sweep == "batch" else [_size(word) for word in _words(batches)]
    steps = optimizers.chosen_optimizers(optimizer)
    tokens = {network: sequence or SEQUENCE for network in chosen if transformer_of(network)}
    if sequence is not None and not tokens:
        raise UserError("--sequence is for transformers: name one with --models, such as gpt-12x768")
    return [BenchCase(network, size, layout, step, tokens.get(network), loss) for network in chosen for size in sizes for step in steps]


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",")))


def _size(word: str) -> int:
    if not word.isdecimal() or not 1 <= int(word) <= 1_000_000:
        raise UserError(f"--batch-size takes whole numbers from 1 to 1,000,000 separated by commas, not {word!r}")
    return int(word)


@dataclass(frozen=True)
class BuiltCase:
    """A case that is ready to be timed: its network, a batch of inputs and labels, and the optimizers, which all arms share."""

    case: BenchCase
    model: nn.Module
    inputs: Tensor
    labels: Tensor
    _optimizers: dict[bool, torch.optim.Optimizer] = field(default_factory=dict)

    def optimizer(self, *, captured: bool = False) -> torch.optim.Optimizer:
        """The optimizer of eager steps, or of those that are one graph. One for all arms: what it remembers does not change their time."""
        if captured not in self._optimizers:
            self._optimizers[captured] = optimizers.made(self.case.optimizer, self.model.parameters(), captured=captured)
        return self._optimizers[captured]

    @property
    def loss(self) -> Callable[..., Tensor]:
        """The loss of a model, inputs and labels."""
        return loss_in_parts if self.case.loss == "parts" else loss

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def build_case(case: BenchCase, on: torch.device) -> BuiltCase:
    """The network with its weights at their start, and a batch of random inputs with random labels.

    All are drawn from the global generator.
    """
    if case.sequence:
        return _of_tokens(case, on)
    shape = case.image
    model = networks.of_own_shape(case.model, shape, CLASSES) or models.build(case.model, shape, CLASSES)
    model, inputs = model.to(on), torch.rand(case.batch, *shape, device=on)
    if case.layout == "channels-last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    return BuiltCase(case, model, inputs, torch.randint(CLASSES, (case.batch,), device=on))


def _of_tokens(case: BenchCase, on: torch.device) -> BuiltCase:
    """A transformer and a batch of random tokens, none of them padding; the labels are classes of texts, or the token behind each."""
    transformer = transformer_of(case.model)
    assert transformer is not None
    words = models.WORDS[transformer.kind]
    model = models.build(case.model, case.shape, 0 if transformer.kind == "gpt" else CLASSES).to(on)
    tokens = torch.randint(1, words, (case.batch, *case.shape), device=on)
    most, shape = (words, tokens.shape) if transformer.kind == "gpt" else (CLASSES, tokens.shape[:1])
    labels = torch.randint(most, shape, device=on)
    return BuiltCase(case, model, tokens, labels)


def loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, a mean over all predictions: one an example, or one a token."""
    scores = model(inputs)
    return F.cross_entropy(scores, labels) if labels.dim() == 1 else F.cross_entropy(scores.flatten(0, 1), labels.flatten())


def loss_in_parts(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The same, as a network makes it that never has all scores at once."""
    value: Tensor = model(inputs, labels)
    return value


def layouts(case: BenchCase, on: torch.device) -> Sequence[BenchCase]:
    """The case in every order in memory that it leaves open. A network without convolutions has one order alone."""
    if case.layout != "fastest":
        return [case]
    convolves = any(p.dim() == 4 for p in build_case(case, torch.device("meta")).model.parameters())
    options: tuple[Layout, ...] = ("contiguous", "channels-last") if convolves else ("contiguous",)
    return [dataclasses.replace(case, layout=layout) for layout in options]
