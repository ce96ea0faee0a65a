"""What a measurement leaves behind: the entries of bench.json and quality.json. Loads without torch."""

from __future__ import annotations

from typing import Any, TypedDict


class ValueWithInterval(TypedDict):
    """A value with its 95 % interval; where it is refused, all three are None and `refused` says why."""

    value: float | None
    low: float | None
    high: float | None
    refused: str | None


class Worth(TypedDict):
    """How noisy one estimate is.

    `variance` is relative to ‖g‖²; `low` and `high` are its interval, empty where a formula gives it. `length` is m·g/‖g‖² and `square`
    is ‖m‖²/‖g‖², m the mean of the estimates. `limit` is the cosine with g that the mean of many estimates tends to.
    """

    variance: float
    low: float
    high: float
    length: float
    square: float
    limit: float
    biased: bool


class CosinePrice(TypedDict):
    """What it takes until the mean of the estimates has a cosine with the gradient; None where no number of estimates is enough.

    `low` and `high` are the estimates at the ends of the variance's interval.
    """

    cosine: float
    estimates: int | None
    low: int | None
    high: int | None
    seconds: float | None


class ArmHead(TypedDict):
    """Which arm an entry is about; `failed` says what kept it from taking a step."""

    name: str
    label: str
    kind: str
    spec: str | None
    engine: str
    failed: str | None


class ArmRecord(ArmHead, total=False):
    """One arm of one case; where it failed, nothing but its head is there."""

    times: list[float]
    seconds: ValueWithInterval
    to_backprop: ValueWithInterval | None
    to_best_backprop: ValueWithInterval | None
    to_plain: ValueWithInterval | None
    further: ValueWithInterval | None
    examples_per_second: float
    peak_bytes: int | None
    process: dict[str, Any] | None
    drawing: dict[str, ValueWithInterval] | None
    roofline: dict[str, Any] | None
    worth: Worth | None
    worth_failed: str | None
    to_cosine: list[CosinePrice]
    joules: dict[str, ValueWithInterval]  # of a step, by counter; absent where the machine does not tell


class CaseRecord(TypedDict):
    """One case with all its arms.

    `tried` has the seconds of backpropagation in each order in memory, where a choice was made. `optimizer_bytes` is what the optimizer
    holds from step to step, which is in no arm's peak. Older files have neither of the optimizer's two fields: they took steps of SGD.
    `sequence` is the tokens of an example, None where inputs are images; `loss`: whether all scores are there at once ("whole") or a few
    ("parts"). Older files have neither.
    """

    layout: str
    tried: dict[str, float]
    model: str
    data: str
    batch: int
    sequence: int | None
    loss: str
    accelerator: str
    optimizer: str
    optimizer_bytes: int
    parameters: int
    rounds: int
    seed: int
    repeats: int
    arms: list[ArmRecord]
    command: str
    ceilings: dict[str, float]


class PeakHead(TypedDict):
    """Which arm an entry of memory.json is about; `failed` says what kept it from its step."""

    name: str
    label: str
    kind: str
    spec: str | None
    failed: str | None


class PeakRecord(PeakHead, total=False):
    """The most bytes above parameters and input during one step: what torch's allocator gave out, and the peak of the process."""

    peak_bytes: int
    process_bytes: int


class MemoryRecord(TypedDict):
    """One case of memory.json with all its arms; fields as in CaseRecord."""

    model: str
    data: str
    batch: int
    layout: str
    optimizer: str
    sequence: int | None
    loss: str
    accelerator: str
    parameters: int
    threads: int
    arms: list[PeakRecord]
    command: str


class EstimateRecord(TypedDict):
    """One estimator with one number of tangents; `quality` is what `forwardgrad.quality` found, None where it failed."""

    label: str
    tangents: int | None
    estimator: dict[str, Any]
    failed: str | None
    quality: dict[str, Any] | None


class SettingRecord(TypedDict):
    """One setting with all its estimates."""

    model: str
    data: str
    batch: int
    repeats: int
    warm_up: int
    learn: int
    seed: int
    parameters: int
    loss: float
    estimates: list[EstimateRecord]
