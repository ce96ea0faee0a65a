"""`replay`: the steps of a log taken again, without the data and without evaluating the loss."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from forwardgrad.engines import about, move_by
from forwardgrad.estimators import Estimator, from_config
from forwardgrad.journal import Journal, JournalError, digest_of, read_journal
from forwardgrad.ranks import Distributed
from forwardgrad.recipe import Measured


class _Replaying:
    """A training that is taken again step by step. Arguments and errors are those of `replay`."""

    def __init__(
        self,
        path: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        until: int | None,
        since: int,
        generator: Generator | None,
        estimator: Estimator | None,
    ) -> None:
        self.journal = read_journal(path, until)
        self.until = len(self.journal.steps) if until is None else until
        self.journal.check_length(self.until)
        if not 0 <= since <= self.until:
            raise ValueError(f"since must be a step from 0 to {self.until}, the last one to be taken, not {since!r}")
        if since and generator is None:
            raise ValueError("a replay from a checkpoint needs the generator as it was at that step: pass generator=")
        self.model, self.optimizer, self.taken = model, optimizer, since
        self.estimator = estimator_of(self.journal) if estimator is None else estimator
        self.generator = Generator() if generator is None else generator
        if self.generator.device.type != "cpu":
            raise ValueError("a log's directions are drawn on the CPU: pass a generator of the CPU")
        self._named = dict(model.named_parameters(prefix="model"))
        self._check()
        if not since:
            self.generator.set_state(_bytes(self.journal.generator))
        self._set([(index, name, value) for index, group in enumerate(self.journal.settings(since)) for name, value in group.items()])

    def prepare(self) -> None:
        """Give the optimizer the settings of the next step."""
        self._set(self.journal.steps[self.taken].settings)

    def take(self) -> None:
        """Take the next step. JournalError where the parameters come out different from those that were logged."""
        one = self.journal.steps[self.taken]
        if one.generator is not None:
            self.generator.set_state(_bytes(one.generator))
        if lacking := [name for name in one.trained if name not in self._named]:
            raise JournalError(f"the log moves {lacking[0].removeprefix('model.')}, which the model does not have: build the model it was")
        parameters = {name: self._named[name] for name in one.trained}
        home = next(iter(parameters.values())).device
        found = Measured.of_outline(one.places, one.weights.to(home))
        move_by(self.optimizer, parameters, self.estimator, self.generator, lambda: (one.loss.to(home), found))
        self.taken += 1
        if one.digest is not None and one.digest != digest_of(self.model):
            self._differs(f"after step {self.taken}")

    def settle(self) -> None:
        """Compare the parameters between two steps, or at the end, where the log was closed or went on there."""
        known = self.journal.steps[self.taken - 1].between
        if known is not None and known != digest_of(self.model):
            self._differs(f"between step {self.taken} and what came after it")

    def _check(self) -> None:
        """JournalError unless model and optimizer are those that the log was written with, as they were at the step that it begins at."""
        header, here = self.journal.header, about(self.optimizer, self.estimator)
        for name in ("optimizer", "groups", "window"):
            if header.get(name) != here.get(name):
                raise JournalError(f"the log was written with {name} {header.get(name)!r}, and this one has {here.get(name)!r}")
        known = self.journal.steps[self.taken - 1].between if self.taken else self.journal.digest
        if known is not None and known != digest_of(self.model):
            at = f"after step {self.taken}" if self.taken else "at its start"
            raise JournalError(f"the model's parameters are not those that {self.journal.path} has {at}: give it those to begin with")

    def _differs(self, where: str) -> None:
        earlier = [number for number, one in enumerate(self.journal.steps[: self.taken - 1], 1) if one.digest is not None]
        good = f"those after step {earlier[-1]} were the same" if earlier else "no earlier ones were compared"
        raise JournalError(
            f"the parameters {where} are not those of the training, and {good}: other versions of torch, another processor or another "
            "number of threads round differently"
        )

    def _set(self, settings: list[tuple[int, str, Any]]) -> None:
        for index, name, value in settings:
            group = self.optimizer.param_groups[index]
            before = group.get(name)
            if isinstance(before, Tensor):
                before.fill_(value)
            else:
                group[name] = tuple(value) if isinstance(value, list) else value


def replay(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    until: int | None = None,
    since: int = 0,
    generator: Generator | None = None,
    estimator: Estimator | None = None,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    group: Distributed | None = None,
) -> int:
    """Take the steps of a log again: the parameters get the bits that the training gave them, without its data.

    Cost: a draw of each direction and the optimizer's move for every step, and no forward pass.

    Args:
        path: what a `StepLog` wrote.
        model: the model as it was at the start of the log, or at a checkpoint of step `since`. Its parameters are moved; buffers, which
            follow from data, are left as they are.
        optimizer: one of the class and the groups that it was trained with, over its parameters; its settings are taken from the log.
            With `since` it has the state of the checkpoint, too.
        until: the last step that is taken; None: the last one in the log.
        since: the steps that are not taken, as the model has them already.
        generator: on the CPU; it is left where the training left it, to go on from there. With `since` it has to be given, in the state
            of the checkpoint.
        estimator: the method, where it or a part of it is your own, and the log can only name it.
        around: what the training loop does around each step, where it moves parameters there, too, as a function that returns a context:
            `lambda: fg.cap_step(model.parameters(), 1e-3)`.
        group: ranks that go on together. Each may have a log at `path`, and need not: what the one has that is furthest is written there on
            all of them, and taken. They take no steps where none has a log.

    Returns the number of steps that were taken.

    Raises JournalError (a ValueError) for a file that is damaged or no log, for another model or optimizer, and at the first digest that
    the parameters do not have; ValueError for steps that are not there or a generator that is missing.

    >>> import tempfile
    >>> from forwardgrad import ForwardGradient, StepLog, TrainingStep
    >>> models = [torch.nn.Linear(2, 1) for _ in range(2)]
    >>> models[1].load_state_dict(models[0].state_dict())
    <All keys matched successfully>
    >>> descents = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with StepLog(f"{folder}/steps.log") as log:
    ...         generator = torch.Generator().manual_seed(0)
    ...         step = TrainingStep(lambda m, x: m(x).sum(), models[0], descents[0], ForwardGradient(), generator=generator, log=log)
    ...         losses = [step(torch.ones(3, 2)).loss for _ in range(4)]
    ...     replay(f"{folder}/steps.log", models[1], descents[1])
    4
    >>> torch.equal(models[0].weight, models[1].weight)
    True
    """
    if group is not None and not _furthest(Path(path), group):
        return 0
    steps = _Replaying(path, model, optimizer, until, since, generator, estimator)
    while steps.taken < steps.until:
        steps.prepare()
        with around():
            steps.take()
        steps.settle()
    return steps.taken - since


def _furthest(path: Path, group: Distributed) -> bool:
    """Write the log of the rank that is furthest over that of this one; returns whether there is any. A damaged one counts as none."""
    steps, content, error = 0, path.read_bytes() if path.exists() else b"", None
    try:
        steps = 1 + len(read_journal(path).steps) if content else 0
    except JournalError as damage:
        error = damage
    best = group.furthest(steps, content if steps else b"")
    if not best and error is not None:
        raise error
    if best and best != content:
        whole = path.with_name(f".{path.name}.{os.getpid()}")
        whole.write_bytes(best)
        whole.replace(path)
    return bool(best)


def estimator_of(journal: Journal) -> Estimator:
    """The method of a log. JournalError where it is a user's own: nothing that a file names is ever imported."""
    try:
        return from_config(journal.header["estimator"])
    except (KeyError, TypeError, ValueError) as error:
        raise JournalError(f"{journal.path} names a method that cannot be made here ({error}): pass estimator=") from error


def _bytes(state: bytes) -> Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8).clone()
