"""What one training run is: a complete, frozen, JSON-able description, readable without torch.

A run is named by the hash of its description, so the same description is the same run on every machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any, Literal, get_args

from forwardgrad.lab.errors import UserError

LARGEST_LR = 1e30  # beyond it a float32 update overflows whatever the gradient
LARGEST_COUNT = 1_000_000  # epochs, or examples a batch
SCHEMA = 1  # raised whenever a stored run of an older version would be read wrongly
LATER = ("weight_decay", "anneal", "cap", "precision", "engine")  # fields that the first stored runs did not have

OptimizerName = Literal["sgd", "nesterov", "adam"]
DataName = Literal["digits", "mnist", "cifar10"]
ModelName = Literal["logistic", "mlp", "nn", "cnn", "cifar-cnn"]
Precision = Literal["float32", "bfloat16"]
Engine = Literal["eager", "compile", "graph"]


def check_choice(value: object, kind: object, what: str) -> None:
    known = get_args(kind)
    if value not in known:
        raise UserError(f"unknown {what} {value!r}: choose one of {', '.join(known)}")


def check_positive(value: float, what: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{what} must be a positive number, not {value}")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer, its schedule, and what keeps its steps in bounds.

    The learning rate at step t of T is γ_t = lr · exp(−decay·t), and where `anneal` also times ½(1 + cos(πt/T)): zero at the end.
    `weight_decay` w ≥ 0 is decoupled: θ ← θ(1 − γ_t·w) before every step, whatever the optimizer. `cap` is the largest relative step
    ‖Δθ‖/‖θ‖, over all parameters together; a longer step is cut back to it (`forwardgrad.cap_step`).
    """

    name: OptimizerName
    lr: float
    decay: float = 0.0
    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    anneal: bool = False
    cap: float | None = None

    def __post_init__(self) -> None:
        check_choice(self.name, OptimizerName, "optimizer")
        check_positive(self.lr, "the learning rate")
        if self.lr > LARGEST_LR:
            raise UserError(f"the learning rate must be at most {LARGEST_LR:g}, not {self.lr}")
        if not (math.isfinite(self.decay) and self.decay >= 0):
            raise UserError(f"the learning-rate decay must be zero or positive, not {self.decay}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0 and self.lr * self.weight_decay < 1):
            raise UserError(f"the weight decay must be zero or positive and below 1/lr, not {self.weight_decay}")
        if self.cap is not None:
            check_positive(self.cap, "the cap of the relative step")
        for what, value in (("momentum", self.momentum), ("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise UserError(f"{what} must lie in [0, 1), not {value}")
        if self.name == "adam" and self.momentum:
            raise UserError(f"Adam takes no momentum, but {self.momentum} was given: set beta1 instead")
        if self.name != "adam" and (self.beta1, self.beta2) != (0.9, 0.999):
            raise UserError(f"{self.name} takes no beta1 or beta2, but {self.beta1} and {self.beta2} were given: they belong to adam")


@dataclasses.dataclass(frozen=True)
class Run:
    """One model trained once. `estimator` holds the estimator's name and fields, e.g. {"name": "forward", "clip": 1.0}.

    `seed` governs everything random: split, initialisation, batch order, directions, dropout.
    `test` is False for tuning trials: they never read the test split. With `precision` bfloat16 the layers compute under autocast, with
    images and filters in the channels-last order and Adam in one kernel; parameters, losses and updates stay in float32.
    `engine` is how steps are taken (`forwardgrad.TrainingStep`): other engines than "eager" compute the same up to rounding.
    """

    data: DataName
    model: ModelName
    estimator: dict[str, Any]
    optimizer: Optimizer
    epochs: int
    batch_size: int = 64
    seed: int = 0
    test: bool = True
    precision: Precision = "float32"
    engine: Engine = "eager"

    def __post_init__(self) -> None:
        check_choice(self.data, DataName, "data set")
        check_choice(self.model, ModelName, "model")
        check_choice(self.precision, Precision, "precision")
        check_choice(self.engine, Engine, "engine")
        if "name" not in self.estimator:
            raise UserError(f"an estimator needs a name, got {self.estimator!r}")
        for what, value in (("epochs", self.epochs), ("the batch size", self.batch_size)):
            if not isinstance(value, int) or not 1 <= value <= LARGEST_COUNT:
                raise UserError(f"{what} must be a whole number of at least 1 and at most {LARGEST_COUNT:,}, not {value}")
        if self.seed < 0:
            raise UserError(f"the seed must be zero or positive, not {self.seed}")

    @property
    def identity(self) -> str:
        """Twelve hexadecimal digits: the name of the run's folder."""
        return identity(to_json(self))


def identity(description: dict[str, Any]) -> str:
    canonical = json.dumps(description, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def to_json(run: Run) -> dict[str, Any]:
    """The description as JSON values; `LATER` fields at their defaults are left out, so that older runs keep their identity."""
    description = {"schema": SCHEMA, **dataclasses.asdict(run)}
    for kind, kept in ((Run, description), (Optimizer, description["optimizer"])):
        for field in dataclasses.fields(kind):
            if field.name in LATER and kept[field.name] == field.default:
                del kept[field.name]
    return description


def from_json(stored: dict[str, Any], where: str = "the run description") -> Run:
    """The inverse of `to_json`; refuses other schemas, missing and unknown fields with one sentence."""
    if stored.get("schema") != SCHEMA:
        raise UserError(
            f"{where} was written by another version of forwardgrad (schema {stored.get('schema')!r}, this one reads {SCHEMA}): "
            "use that version, or choose a new output folder"
        )
    fields = {key: value for key, value in stored.items() if key != "schema"}
    try:
        return Run(**{**fields, "optimizer": Optimizer(**fields["optimizer"])})
    except (TypeError, KeyError) as error:
        raise UserError(f"{where} is damaged ({error}): delete its folder to run it again") from error


def stream(seed: int, purpose: str) -> int:
    """The seed of one independent random stream, e.g. stream(0, "order of epoch 3"): 63 bits of a hash."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "big") >> 1
