"""The tasks that records are held on: data, networks, and what is to be best. Plain data; loads without torch.

A task fixes data, network and loss (cross-entropy). Estimator, optimizer, length, batch size, precision, engine, augmentation and label
smoothing are the claimant's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import DataName, ModelName, Run

Measure = Literal["accuracy", "seconds", "passes"]
LEAST_SEEDS = 3  # of a claim, and of its verification
USUAL = 0.01, 0.2  # resolutions: of an accuracy, and of seconds and passes as a share
DIGITS = 0.05, 0.6  # whose test split has 360 images, and whose seeds scatter


@dataclass(frozen=True)
class RecordTask:
    """What is to be trained, and what of it is a record.

    `measure` "accuracy": the highest test accuracy, mean over seeds. "seconds", "passes": the fewest seconds of training, or forward passes
    of work (a backward pass counts as two), to the first evaluation with the validation accuracy `target`, mean over seeds. Every run has
    to come there.
    `resolution`: by how much a claim that is too good has to be noticed before a verification may say that it holds: in accuracy, else as a
    share of the figure.
    """

    name: str
    title: str
    data: DataName
    models: tuple[ModelName, ...]
    measure: Measure
    target: float | None = None
    resolution: float = USUAL[0]

    def check(self, run: Run) -> None:
        """Raise UserError where a run is not one of this task."""
        wrong = [
            f"{what} {mine!r} in place of {' or '.join(map(repr, wanted))}"
            for what, mine, wanted in (("data", run.data, (self.data,)), ("model", run.model, self.models), ("loss", run.loss, (None,)))
            if mine not in wanted
        ]
        if wrong:
            raise UserError(f"the run does not match the task {self.name}: it has {', '.join(wrong)}; name the task of these runs")
        if run.start is not None:
            raise UserError(
                f"the run starts from the weights of another run, and how those came about cannot be seen: a run of {self.name} "
                "begins with the network of its name; train it without --start-from"
            )
        if not run.test:
            raise UserError(
                f"a run of the task {self.name} has to read the test split at its end: trials of a search do not, final runs do"
            )


def _three(target: float, name: str, title: str, data: DataName, model: ModelName) -> tuple[RecordTask, ...]:
    """The tasks of one network."""
    points, share = DIGITS if data == "digits" else USUAL
    return (
        RecordTask(f"{name}-accuracy", title, data, (model,), "accuracy", resolution=points),
        RecordTask(f"{name}-seconds", title, data, (model,), "seconds", target, share),
        RecordTask(f"{name}-passes", title, data, (model,), "passes", target, share),
    )


TASKS: dict[str, RecordTask] = {
    task.name: task
    for task in (
        *_three(0.90, "digits-mlp", "small MLP, handwritten digits of scikit-learn", "digits", "mlp"),  # to try a claim in seconds
        *_three(0.975, "mnist-nn", "the paper's NN, MNIST", "mnist", "nn"),
        *_three(0.985, "mnist-cnn", "the paper's CNN, MNIST", "mnist", "cnn"),
        *_three(0.70, "cifar10-cnn", "the paper's CNN, CIFAR-10", "cifar10", "cifar-cnn"),
        RecordTask(
            "movie-reviews-minilm-accuracy",
            "sentiment of movie reviews, MiniLM with its pretrained weights",
            "movie-reviews",
            ("minilm", "minilm-lora", "minilm-readout"),
            "accuracy",
        ),
    )
}


def record_task(name: str) -> RecordTask:
    """The task of this name; UserError, naming all, where there is none."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]
