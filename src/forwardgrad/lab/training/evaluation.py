"""How good a network is: its loss and accuracy over a whole split, and the reading that the paper prints instead."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forwardgrad.lab import data
from forwardgrad.lab.data import IGNORED
from forwardgrad.lab.studies import Precision, stream
from forwardgrad.lab.training import builders
from forwardgrad.lab.training.builders import Loss
from forwardgrad.lab.training.precision import arranged, computing
from forwardgrad.lab.training.training import Training

PLACES = 4000  # of tokens to predict in one batch of an evaluation: the scores of a vocabulary are many numbers a place
PUBLISHED_READING = 16  # images in the one mini-batch whose loss the paper's Table I shows as 'test loss'


def evaluate(training: Training) -> None:
    """Add a row to a run's evaluations, of the validation split.

    The relative step in it is the root mean square of those measured since the last row. The walk has its row of this step by then.
    """
    state = training.state
    validation = training.dataset.validation
    measured = losses_on(training, validation)
    loss, accuracy = summary(measured)
    balanced = balanced_accuracy(measured[1], validation.labels)
    stride = math.sqrt(sum(stride**2 for stride in state.strides) / len(state.strides))
    epochs = state.step / training.schedule.per_epoch
    state.evaluations.append([state.step, epochs, state.seconds, loss, accuracy, state.walk[-1][1], stride, balanced])
    state.strides = []


def losses_on(training: Training, split: data.Split) -> tuple[Tensor, Tensor]:
    """The loss of every example of a split under a run's network as it is now, and whether each was classified rightly."""
    run = training.run
    return losses_of(training.state.model, training.dataset, split, run.precision, loss=builders.loss(run))


@torch.no_grad()
def losses_of(
    model: nn.Module,
    dataset: data.Dataset,
    split: data.Split,
    precision: Precision = "float32",
    batch: int = 1000,
    loss: Loss = F.cross_entropy,
) -> tuple[Tensor, Tensor]:
    """The loss of every example of a split (float64) and whether it was classified rightly.

    Where the token behind every place is the target, each such token is an example, and those places are none that have no target.
    A user's loss gives only means over batches, so every example of a batch gets the batch's mean. Where targets are no classes, the second
    tensor holds NaN.
    """
    training = model.training
    model.eval()
    losses, right = [], []
    if dataset.next_token:
        batch = max(1, PLACES // split.labels.shape[1])
    for inputs, labels in zip(split.inputs.split(batch), split.labels.split(batch), strict=True):
        with computing(precision, inputs.device):
            output = model(arranged(dataset.for_model(inputs), precision))
            output = output.float() if isinstance(output, Tensor) else output
            if loss is builders.token_cross_entropy:
                output, labels = _predicted(output, labels)
            if loss in (F.cross_entropy, builders.token_cross_entropy):
                losses.append(F.cross_entropy(output, labels, reduction="none").double())
            else:
                losses.append(loss(output, labels).double().expand(len(labels)))
        right.append(_right(output, labels, dataset.classes))
    model.train(training)
    return torch.cat(losses), torch.cat(right)


def _predicted(scores: Tensor, behind: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [tokens, words] and targets [tokens] of the places that have a target."""
    there = behind != IGNORED
    return scores[there], behind[there]


def _right(output: object, labels: Tensor, classes: int) -> Tensor:
    if classes and isinstance(output, Tensor) and output.dim() == 2:
        return output.argmax(1) == labels
    return torch.full((len(labels),), math.nan)


def summary(measured: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The mean loss and the accuracy."""
    losses, right = measured
    return float(losses.mean()), float(right.double().mean())


def balanced_accuracy(right: Tensor, labels: Tensor) -> float:
    """The share that was classified rightly of each class, averaged over the classes that occur.

    NaN where targets are no classes of examples: none, or the tokens behind every place.
    """
    if right.is_floating_point() or labels.dim() > 1:
        return math.nan
    return float(torch.stack([right[labels == one].double().mean() for one in labels.unique()]).mean())


def published_reading(losses: Tensor, seed: int) -> dict[str, float | None]:
    """The loss of one mini-batch of 16 shuffled test images, and the range of such readings of this same network.

    The range runs from the 5th to the 95th percentile of 1,000 such mini-batches.
    """
    generator = torch.Generator().manual_seed(stream(seed, "published reading"))
    losses = losses.cpu()
    if len(losses) < PUBLISHED_READING:
        return dict.fromkeys(("last16", "last16_low", "last16_high"))
    draws = torch.stack([torch.randperm(len(losses), generator=generator)[-PUBLISHED_READING:] for _ in range(1000)])
    readings = losses[draws].mean(1)
    low, high = torch.quantile(readings, torch.tensor([0.05, 0.95], dtype=readings.dtype)).tolist()
    return {"last16": finite(float(readings[0])), "last16_low": finite(low), "last16_high": finite(high)}


def finite(value: float) -> float | None:
    """A number as JSON can hold it: None where it is infinite or NaN."""
    return value if math.isfinite(value) else None
