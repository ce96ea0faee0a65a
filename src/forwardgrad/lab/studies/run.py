"""What one training run is: a complete, frozen, JSON-able description, readable without torch.

A run is named by the hash of its description, so the same description is the same run on every machine.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies.families import FAMILIES, TRANSFORMERS, family_of, transformer_of

LARGEST_LR = 1e30  # beyond it a float32 update overflows whatever the gradient
LARGEST_COUNT = 1_000_000  # epochs, steps, or examples a batch
SCHEMA = 1  # raised whenever a stored run of an older version would be read wrongly
LATER = (
    "weight_decay",
    "anneal",
    "cap",
    "options",
    "precision",
    "engine",
    "steps",
    "loss",
    "code",
    "augment",
    "label_smoothing",
    "warm_up",
    "evaluate_every",
    "start",
)  # fields that the first stored runs did not have

DIGEST = re.compile("[0-9a-f]{64}")
IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")

OptimizerName = Literal["sgd", "nesterov", "adam"]
DataName = Literal["digits", "mnist", "cifar10", "movie-reviews", "movie-reviews-16", "drug-reviews", "movie-words", "drug-words"]
NEXT_TOKEN = ("movie-words", "drug-words")  # data whose targets are the tokens behind every place
ModelName = Literal["logistic", "mlp", "nn", "cnn", "cifar-cnn", "minilm", "minilm-lora", "minilm-readout"]
Precision = Literal["float32", "bfloat16"]
Engine = Literal["eager", "compile", "graph"]
Augment = Literal["crop-flip"]


def is_path(name: object) -> bool:
    """Whether a name is an import path, 'package.module:object', of a user's own part."""
    return isinstance(name, str) and ":" in name


def check_part(value: object, kind: object, what: str) -> None:
    """Refuse what is neither a known name nor an import path."""
    if not is_path(value):
        check_choice(value, kind, what)
    elif not IMPORT_PATH.fullmatch(str(value)):
        raise UserError(f"the {what} {value!r} is no import path: write it as package.module:object")


def check_model(name: object) -> None:
    """Refuse what is no network: a named one, one of a family in some size, or an import path."""
    sized = isinstance(name, str) and bool(family_of(name) or transformer_of(name))
    if name not in get_args(ModelName) and not is_path(name) and not sized:
        known = ", ".join((*get_args(ModelName), *TRANSFORMERS, *FAMILIES))
        raise UserError(f"unknown model {name!r}: choose one of {known}, the last four with a width, as vgg8b-w4 or resnet20-x2")
    if is_path(name):
        check_part(name, ModelName, "model")


def check_choice(value: object, kind: object, what: str) -> None:
    known = get_args(kind)
    if value not in known:
        raise UserError(f"unknown {what} {value!r}: choose one of {', '.join(known)}")


def check_positive(value: float, what: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{what} must be a positive number, not {value}")


def named(estimator: Mapping[str, Any], where: str = "estimator") -> Iterator[tuple[str, str]]:
    """Where a name stands in the description of an estimator, and the name: its own, and that of every component written with options.

    >>> list(named({"name": "forward", "law": {"name": "mine:Law"}}))
    [('estimator', 'forward'), ('estimator.law', 'mine:Law')]
    """
    if isinstance(name := estimator.get("name"), str):
        yield where, name
    for key, value in estimator.items():
        if isinstance(value, Mapping):
            yield from named(value, f"{where}.{key}")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer, its schedule, and what keeps its steps in bounds.

    The learning rate at step t of T is γ_t = lr · exp(−decay·t), and where `anneal` also times ½(1 + cos(πt/T)): zero at the end. In the
    first `warm_up` steps it is also times (t + 1)/warm_up.
    `weight_decay` w ≥ 0 is decoupled: θ ← θ(1 − γ_t·w) before every step, whatever the optimizer; "adam" with it is AdamW.
    `cap` is the largest relative step ‖Δθ‖/‖θ‖, over all parameters together; a longer step is cut back to it (`forwardgrad.cap_step`).
    A `name` with a colon is the import path of a user's own, called with the parameters, `lr` and `options`; the fields of the named
    optimizers are not for it.
    """

    name: str
    lr: float
    decay: float = 0.0
    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    anneal: bool = False
    cap: float | None = None
    warm_up: int = 0
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_part(self.name, OptimizerName, "optimizer")
        check_positive(self.lr, "the learning rate")
        if self.lr > LARGEST_LR:
            raise UserError(f"the learning rate must be at most {LARGEST_LR:g}, not {self.lr}")
        if not (math.isfinite(self.decay) and self.decay >= 0):
            raise UserError(f"the learning-rate decay must be zero or positive, not {self.decay}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0 and self.lr * self.weight_decay < 1):
            raise UserError(f"the weight decay must be zero or positive and below 1/lr, not {self.weight_decay}")
        if not isinstance(self.warm_up, int) or not 0 <= self.warm_up <= LARGEST_COUNT:
            raise UserError(f"warm_up must be a whole number of steps from 0 to {LARGEST_COUNT:,}, not {self.warm_up}")
        if self.cap is not None:
            check_positive(self.cap, "the cap of the relative step")
        for what, value in (("momentum", self.momentum), ("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise UserError(f"{what} must lie in [0, 1), not {value}")
        if self.options is not None and not is_path(self.name):
            raise UserError(f"{self.name} takes no further options, but {self.options} were given: they belong to an optimizer of your own")
        if is_path(self.name) and self.momentum:
            raise UserError(f"the momentum of {self.name} belongs among its options")
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
    `steps`, where given, is how many optimizer steps the run takes, in place of `epochs`.
    `augment` "crop-flip" moves every training image by up to four pixels and mirrors half of them (`forwardgrad.lab.data.crop_flip`).
    `label_smoothing` s in [0, 1) trains on targets that give s/classes to every class (Szegedy et al., 2016). Evaluation has neither.
    `evaluate_every`, where given, is how many steps lie between two evaluations, in place of the usual ones (`training.schedule`).
    `start`, where given, is the digest of the weights that the run starts from, in place of fresh ones (`models.keep_start`).
    `data`, `model`, `loss` (cross-entropy where it is None), the estimator's name, those of its components, as {"law": {"name": ...}}, and
    the optimizer's may be import paths of a user's own
    (`forwardgrad.lab.training.builders` says what each has to be); `code` is then the digest of their source.
    """

    data: str
    model: str
    estimator: dict[str, Any]
    optimizer: Optimizer
    epochs: int = 1
    batch_size: int = 64
    seed: int = 0
    test: bool = True
    precision: Precision = "float32"
    engine: Engine = "eager"
    steps: int | None = None
    loss: str | None = None
    code: str | None = None
    augment: Augment | None = None
    label_smoothing: float = 0.0
    evaluate_every: int | None = None
    start: str | None = None

    def __post_init__(self) -> None:
        check_part(self.data, DataName, "data set")
        check_model(self.model)
        if self.loss is not None and not IMPORT_PATH.fullmatch(str(self.loss)):
            raise UserError(f"the loss {self.loss!r} is no import path: write it as package.module:object, or leave it out")
        if self.augment is not None:
            check_choice(self.augment, Augment, "augmentation")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing must lie in [0, 1), not {self.label_smoothing}")
        if self.label_smoothing and self.loss is not None:
            raise UserError("label_smoothing belongs to cross-entropy: leave it out, or the loss")
        if self.start is not None and not DIGEST.fullmatch(str(self.start)):
            raise UserError(f"start must be a digest of weights, 64 hexadecimal digits, not {self.start!r}")
        check_choice(self.precision, Precision, "precision")
        check_choice(self.engine, Engine, "engine")
        if not isinstance(self.estimator, dict) or not isinstance(self.estimator.get("name"), str):
            raise UserError(f"an estimator needs a name, got {self.estimator!r}")
        for _, name in named(self.estimator):
            if is_path(name) and not IMPORT_PATH.fullmatch(name):
                raise UserError(f"the estimator's {name!r} is no import path: write it as package.module:object")
        counts = (
            ("epochs", self.epochs),
            ("the batch size", self.batch_size),
            *([("steps", self.steps)] if self.steps is not None else []),
            *([("evaluate_every", self.evaluate_every)] if self.evaluate_every is not None else []),
        )
        for what, value in counts:
            if not isinstance(value, int) or not 1 <= value <= LARGEST_COUNT:
                raise UserError(f"{what} must be a whole number of at least 1 and at most {LARGEST_COUNT:,}, not {value}")
        if self.seed < 0:
            raise UserError(f"the seed must be zero or positive, not {self.seed}")

    @functools.cached_property
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
