"""`FineTuning`: everything that decides what a run of fine-tuning comes to, and the limits of it. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import Precision

Task = Literal["classification", "causal-lm"]
OptimizerKind = Literal["sgd", "adam"]
RateSchedule = Literal["constant", "linear"]
StoredPrecision = Literal["float32", "bfloat16", "float16"]

COLUMNS = {"text": "text", "second": "text2", "label": "label", "prompt": "prompt", "completion": "completion"}
"""The columns of a table: what each is for, and what it is called where the user does not say."""
EPOCHS = 3


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """What is asked for. Two runs with the same fields, the same files and the same machine come to the same bits.

    `columns` are the columns that were named, by what they are for; the others have the names of COLUMNS. `estimator` is its description
    in JSON values, None for the default. The length is one of `epochs`, `steps` and `seconds`; none of them is 3 epochs.
    `score` is an import path or FILE.py:function; it is maximised in place of the loss. `lora` is the rank of adapters, and
    `keep_adapters` saves them as they are. `weights` is what the parameters are kept in, `precision` what layers compute in.
    """

    model: Path
    data: Path
    estimator: dict[str, Any] | None = None
    task: Task | None = None
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    validation: Path | None = None
    held_out: float = 0.1
    lora: int | None = None
    lora_alpha: float | None = None
    keep_adapters: bool = False
    score: str | None = None
    max_length: int | None = None
    max_new_tokens: int = 32
    epochs: int | None = None
    steps: int | None = None
    seconds: float | None = None
    batch_size: int = 16
    optimizer: OptimizerKind | None = None
    lr: float | None = None
    schedule: RateSchedule = "linear"
    clip: float | None = None
    weight_decay: float = 0.0
    dropout: bool = False
    evaluate_every: int | None = None
    precision: Precision = "float32"
    weights: StoredPrecision = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        given = [name for name in ("epochs", "steps", "seconds") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"a run has one length: give one of {', '.join(f'--{name}' for name in given)}")
        counts = ("epochs", "steps", "batch_size", "lora", "max_length", "max_new_tokens", "evaluate_every")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{_option(name)} must be a whole number of at least 1, not {value}")
        for name in ("seconds", "lr", "clip", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{_option(name)} must be a positive number, not {value}")
        if not 0 <= self.held_out < 1:
            raise UserError(f"--held-out must lie in [0, 1), not {self.held_out}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UserError(f"--weight-decay must be zero or positive, not {self.weight_decay}")
        if self.lora is None and (self.lora_alpha is not None or self.keep_adapters):
            raise UserError(
                f"{'--lora-alpha' if self.lora_alpha is not None else '--keep-adapters'} belongs to --lora: give a rank with it"
            )
        if self.precision != "float32" and self.weights != "float32":
            raise UserError(f"--precision {self.precision} is for weights in float32: leave it out where they are in {self.weights}")

    def column(self, what: str) -> str:
        """What the column for this is called."""
        return self.columns.get(what, COLUMNS[what])


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"
