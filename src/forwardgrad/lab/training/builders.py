"""Builds what a run names: its data, model, loss, estimator and optimizer.

A name is one of the laboratory's, or the import path of a user's own. What a user's own code makes is checked here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forwardgrad.estimators import Estimator, from_config
from forwardgrad.lab import data, models
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import NEXT_TOKEN, Optimizer, Run, import_path, is_path, stream
from forwardgrad.lab.training.norms import trained
from forwardgrad.lab.training.precision import arranged, computing
from forwardgrad.optim import Nesterov

Loss = Callable[..., Tensor]  # of output and target
HELD_OUT = 6  # where a user's data come without a validation split, one example of so many is held out for it


def dataset(run: Run, device: torch.device, data_dir: Any = None) -> data.Dataset:
    """The splits of a run.

    A user's function takes the seed and returns {"train": (inputs, targets), "test": (inputs, targets)}, with "validation" or without: then
    a sixth of the training examples is held out, chosen by the seed.
    """
    found = _named_dataset(run, device, data_dir) if is_path(run.data) else data.load(run.data, run.seed, device, data_dir)
    if run.augment and found.train.inputs.dim() != 4:
        raise UserError(f"augment={run.augment!r} needs images [channels, height, width], but an input of {run.data!r} is {found.shape}")
    return found


def _named_dataset(run: Run, device: torch.device, data_dir: Any) -> data.Dataset:
    found = import_path.find(run.data, "data")(run.seed)
    splits = {name: _split(found, name, run.data, device) for name in ("train", "validation", "test")}
    train, validation, test = splits["train"], splits["validation"], splits["test"]
    if train is None or test is None:
        raise UserError(f"the data {run.data!r} have no {'train' if train is None else 'test'!r} split: return one of inputs and targets")
    if validation is None:
        held = len(train) // HELD_OUT
        train, validation = data.divide(train.inputs, train.labels, (len(train) - held, held), run.seed)
    classes = int(train.labels.max()) + 1 if not train.labels.is_floating_point() and train.labels.dim() == 1 and len(train) else 0
    for name, split in (("train", train), ("validation", validation), ("test", test)):
        if not len(split):
            raise UserError(f"the {name} split of the data {run.data!r} is empty")
    return data.Dataset(run.data, classes, train, validation, test, scale=None)


def _split(found: Any, name: str, path: str, device: torch.device) -> data.Split | None:
    if not isinstance(found, Mapping):
        raise UserError(f"the data {path!r} return {type(found).__name__}: return a dict of splits, each a pair of tensors")
    if name not in found:
        return None
    pair = found[name]
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(part, Tensor) for part in pair)):
        raise UserError(f"the {name} split of the data {path!r} is no pair of tensors: return (inputs, targets)")
    inputs, targets = pair
    if len(inputs) != len(targets):
        raise UserError(f"the {name} split of the data {path!r} has {len(inputs)} inputs and {len(targets)} targets")
    return data.Split(inputs.to(device), targets.to(device))


def model(run: Run, dataset: data.Dataset) -> nn.Module:
    """The network of a run. A user's is called without arguments or, where it requires two, with the shape of an input and the classes."""
    if not is_path(run.model):
        return models.build(run.model, dataset.shape, dataset.classes, next_token=dataset.next_token)
    build = import_path.find(run.model, "model")
    made = build(dataset.shape, dataset.classes) if _required(build) == 2 else build()
    if not isinstance(made, nn.Module):
        raise UserError(f"the model {run.model!r} makes {type(made).__name__}: it has to be or return a torch.nn.Module")
    if not trained(made):
        raise UserError(f"the model {run.model!r} has no parameter to train")
    return made


def initialised_model(run: Run, dataset: data.Dataset, on: torch.device, data_dir: Any = None) -> nn.Module:
    """The network of a run before its first step, initialised by its seed: the global generator is that of the run from here on."""
    torch.manual_seed(stream(run.seed, "initialisation"))
    return arranged(started(run, dataset, data_dir).to(on), run.precision)


def started(run: Run, dataset: data.Dataset, data_dir: Any = None) -> nn.Module:
    """The network of a run, with the kept weights that it starts from. UserError where these are not in the data folder."""
    made = model(run, dataset)
    if run.start is not None:
        models.load_start(made, run.start, data.folder(data_dir))
    return made


def _required(build: Any) -> int:
    """How many arguments a call needs."""
    try:
        found = inspect.signature(build).parameters.values()
    except (ValueError, TypeError):
        return 0
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in found)


def loss(run: Run) -> Loss:
    """What a run is evaluated by: cross-entropy, or the user's function of output and target, a mean over the batch."""
    if run.loss is None:
        return token_cross_entropy if run.data in NEXT_TOKEN else F.cross_entropy
    found: Loss = import_path.find(run.loss, "loss")
    return found


def token_cross_entropy(scores: Tensor, behind: Tensor, **options: Any) -> Tensor:
    """The mean cross-entropy of a token: scores [n, length, words], the token behind every place [n, length], −100 where there is none."""
    return F.cross_entropy(scores.flatten(0, 1), behind.flatten(), **options)


def batch_loss(run: Run) -> Callable[..., Tensor]:
    """The loss of a run as a training step takes it: a function of model, inputs and labels, computed in the run's precision.

    It is the loss of evaluation, but for smoothed labels. A part of a batch has a weight besides.
    """
    measure = partial(loss(run), label_smoothing=run.label_smoothing) if run.label_smoothing else loss(run)

    def of_batch(model: nn.Module, inputs: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        with computing(run.precision, inputs.device):
            found = measure(model(inputs), labels)
            return found if weight is None else found * weight.to(found.dtype)

    return of_batch


def estimator(run: Run) -> Estimator:
    """The estimator of a run; one of a user's, or a component, is a class whose fields are the options of the description."""
    try:
        return from_config(run.estimator, import_path.find)
    except (ValueError, TypeError) as error:
        raise UserError(f"the estimator {run.estimator} cannot be used: {error}") from error


def check_divided(run: Run, parts: int) -> None:
    """UserError where so many ranks cannot divide the directions of a run's estimator among them."""
    try:
        estimator(run).check_divided(parts)
    except ValueError as error:
        raise UserError(f"--directions {parts}: {error}") from error


def generator(run: Run, on: torch.device) -> torch.Generator:
    """The generator that a run draws its directions from."""
    return torch.Generator(on).manual_seed(stream(run.seed, "directions"))


def optimizer(options: Optimizer, model: nn.Module, *, fused: bool = False) -> torch.optim.Optimizer:
    """The optimizer of a run.

    `fused` takes Adam's one kernel for a step: faster, and other bits than the plain form, which float32 runs keep.
    """
    if is_path(options.name):
        return _users_optimizer(options, model)
    if options.name == "sgd":
        return torch.optim.SGD(trained(model), options.lr, momentum=options.momentum)
    if options.name == "nesterov":
        return Nesterov(trained(model), options.lr, options.momentum)
    return torch.optim.Adam(trained(model), options.lr, (options.beta1, options.beta2), fused=fused or None)


def _users_optimizer(options: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """A user's optimizer: called with the parameters, the learning rate and the options of the description."""
    try:
        made = import_path.find(options.name, "optimizer")(trained(model), lr=options.lr, **(options.options or {}))
    except (ValueError, TypeError) as error:
        raise UserError(f"the optimizer {options.name!r} cannot be made: {error}") from error
    if not isinstance(made, torch.optim.Optimizer):
        raise UserError(f"the optimizer {options.name!r} makes {type(made).__name__}: it has to be a torch.optim.Optimizer")
    return made


def lr_schedule(options: Optimizer, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """What sets the learning rate before each of so many steps."""
    if not options.anneal and not options.warm_up:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, math.exp(-options.decay))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(options, steps))


def lr_factor(options: Optimizer, steps: int) -> Callable[[int], float]:
    """What the learning rate is multiplied by at each step of a run of so many."""

    def factor(step: int) -> float:
        rate = math.exp(-options.decay * step)
        if options.anneal:
            rate = rate * (1 + math.cos(math.pi * step / steps)) / 2
        return rate * (step + 1) / options.warm_up if step < options.warm_up else rate

    return factor
