"""Models, batches and steps that the tests of pipelines have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tests.support.cases import seeded
from torch import Tensor, nn

import forwardgrad as fg

BATCH, EXAMPLES, CLASSES = 8, 21, 3  # the last batch has 5


def perceptron() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.Tanh()),
        *(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, CLASSES)),
    )


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, CLASSES)),
    )


def smoothed(output: Tensor, labels: Tensor) -> Tensor:
    return 0.5 * F.cross_entropy(output, labels, label_smoothing=0.1)


Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
MODELS = {"perceptron": perceptron, "convolutional": convolutional}
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "none": lambda parameters: torch.optim.SGD(parameters or [torch.zeros(())]),
    "ahead": lambda parameters: fg.Nesterov(parameters, 0.05, 0.9),
}
CASES = [
    ("perceptron", "sgd", torch.float64),
    ("perceptron", "adam", torch.float32),
    ("perceptron", "ahead", torch.float64),
    ("convolutional", "adam", torch.float64),
    ("convolutional", "sgd", torch.float32),
]
METHOD = fg.LocalLosses(feedback=True, head="pooled", cells=2, head_rate=0.02, similarity=0.25)


def made(name: str, dtype: torch.dtype, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name]().to(dtype)


def batches(name: str, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    shape = (6,) if name == "perceptron" else (1, 10, 10)
    x, y = torch.randn(EXAMPLES, *shape, dtype=dtype, generator=seeded(1)), torch.arange(EXAMPLES) % CLASSES
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def pipeline(stage: nn.Module, optimizer: str = "sgd", **options: Any) -> fg.PipelineStep:
    given: dict[str, Any] = {"classes": CLASSES, "generator": seeded(2), "state": {}, **options}
    return fg.PipelineStep(smoothed, stage, OPTIMIZERS[optimizer](list(stage.parameters())), given.pop("method", METHOD), **given)


def train(step: fg.PipelineStep, name: str, dtype: torch.dtype, passes: int) -> list[Any]:
    return [step(*batch) if step.rank == 0 else step() for _ in range(passes) for batch in batches(name, dtype)]


def alone(name: str, optimizer: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor], list[Tensor]]:
    """The same training in one process: the model, the state, and the losses."""
    model, state = made(name, dtype), dict[str, Tensor]()
    method = OPTIMIZERS[optimizer](list(model.parameters()))
    step = fg.TrainingStep(lambda m, x, y: smoothed(m(x), y), model, method, METHOD, generator=seeded(2), state=state)
    return model, state, [step(*batch).loss for _ in range(3) for batch in batches(name, dtype)]


def said(call: Callable[[], object]) -> str:
    """What a call raises, empty where it raises nothing."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
