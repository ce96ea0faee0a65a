"""Steps whose numbers are written down, and the same steps taken again from these: one and the same move, and so the same bits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from forwardgrad.empty import estimated
from forwardgrad.engines.plain_sgd import descend, is_plain_sgd
from forwardgrad.estimators import UNLOGGABLE, Estimate, Estimator, add, needed, to_config, twin
from forwardgrad.journal import StepLog
from forwardgrad.objective import Objective
from forwardgrad.optim import Replayed
from forwardgrad.ranks import ALONE, Ranks
from forwardgrad.recipe import Measured

_SHOWN = 3  # buffers that a warning names


def move_by(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    estimator: Estimator,
    generator: Generator,
    measure: Callable[[], tuple[Tensor, Measured]],
) -> None:
    """Take a step by what `measure` gives, the loss and what was found out: the directions are drawn again, and the optimizer moves.

    `generator` stands where it stood before the passes, and is left where they left it. An optimizer that looks ahead moves the parameters
    before it lets `measure` be called.
    """
    if not isinstance(optimizer, Replayed) and not is_plain_sgd(optimizer):
        _step(optimizer, parameters, estimator, generator, measure)
        return
    optimizer.zero_grad()
    with torch.inference_mode(False), torch.no_grad():
        _, found = measure()
        if isinstance(optimizer, Replayed):
            optimizer.follow(parameters, estimator.sown(parameters, found, generator))
            return
        with _precise(parameters):
            descend(optimizer, ((parameters[name], part) for name, part in estimator.again(parameters, found, generator)))


def _step(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    estimator: Estimator,
    generator: Generator,
    measure: Callable[[], tuple[Tensor, Measured]],
) -> None:
    """The step of an optimizer that is handed a gradient."""
    who, asked = type(optimizer).__name__, 0

    def closure() -> Tensor:
        nonlocal asked
        asked += 1
        if asked > 1:
            raise RuntimeError(f"{who} asks for more than one gradient in a step, and here one is measured: take another optimizer")
        optimizer.zero_grad()
        with torch.inference_mode(False), torch.no_grad():
            loss, found = measure()
            gradients: dict[str, Tensor | None] = {}
            with _precise(parameters):
                for name, part in estimator.again(parameters, found, generator):
                    add(gradients, {name: part})
            for name, gradient in gradients.items():
                if gradient is not None:
                    parameters[name].grad = gradient.to(parameters[name].dtype)
            return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    if not asked:
        raise TypeError(f"{who}.step did not call the closure that it was given: call it first, as torch's own optimizers do")


def _precise(parameters: Mapping[str, Tensor]) -> torch.autocast:
    """The sum belongs to the gradient, not to the user's forward pass."""
    return torch.autocast(next(iter(parameters.values())).device.type, enabled=False)


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of an optimizer's groups as plain JSON values; what is none, such as a function, is left out."""
    known = (
        {name: _plain(value) for name, value in group.items() if name != "params" and _is_plain(value)} for group in optimizer.param_groups
    )
    return list(known)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(one) for one in value)
    return value is None or isinstance(value, (bool, int, float, str)) or (isinstance(value, Tensor) and value.numel() == 1)


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    return value.item() if isinstance(value, Tensor) else value


def about(optimizer: torch.optim.Optimizer, estimator: Estimator) -> dict[str, Any]:
    """Which training this is, as plain JSON: the estimator, the optimizer, and how many parameters each of its groups has."""
    kind = type(optimizer)
    window = {"window": optimizer.window} if isinstance(optimizer, Replayed) else {}
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    return {"estimator": to_config(estimator), "optimizer": f"{kind.__module__}.{kind.__qualname__}", "groups": sizes, **window}


def check_told(estimator: Estimator, ranks: Ranks) -> None:
    """ValueError where several processes would take steps by numbers that they never told one another."""
    if ranks.many and not estimator.told_by_numbers:
        raise ValueError(f"{estimator!r} does not tell its numbers to other ranks, so no steps of a group can be made again from them")


class Logging:
    """Takes the steps of a training, and writes down what they were taken by.

    Raises ValueError for a method, a generator or an optimizer whose steps cannot be taken again, and for a log that belongs elsewhere.
    """

    def __init__(
        self,
        log: StepLog,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        estimator: Estimator,
        generator: Generator | None,
        ranks: Ranks = ALONE,
    ) -> None:
        if not estimator.loggable:
            raise ValueError(UNLOGGABLE.format(estimator))
        check_told(estimator, ranks)
        if needed(generator).device.type != "cpu":
            raise ValueError("directions of a generator on a GPU are not drawn again for a log: pass a generator of the CPU")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("LBFGS asks for more than one gradient in a step, and a log holds one: take another optimizer, or no log")
        self.log, self.model, self.optimizer, self.estimator, self.generator = log, model, optimizer, estimator, needed(generator)
        self.ranks = ranks
        state = self.generator.get_state()
        log.begin(model, about(optimizer, estimator), settings_of(optimizer), bytes(state.tolist()))
        self._left = state if log.since is None else None  # where the last step left the generator
        self._buffers: dict[str, Tensor] | None = {name: b.clone() for name, b in model.named_buffers()}  # ahead of the first step
        self._known: tuple[Measured, dict[str, Any]] | None = None

    def take(self, loss: Callable[[nn.Module], Tensor], state: dict[str, Tensor]) -> Estimate:
        """Take a step, and write it down."""
        objective, began = Objective(loss, self.model, ranks=self.ranks), self.generator.get_state()
        self.ranks.check(objective.parameters, self.generator, repr(self.estimator))
        settings, again = settings_of(self.optimizer), twin(self.generator)
        seen: list[tuple[Estimate, Measured]] = []

        def measure() -> tuple[Tensor, Measured]:
            seen.append(estimated(self.estimator, objective, state, self._measured(objective)))
            self.ranks.finished()
            return seen[-1][0].loss, seen[-1][1]

        move_by(self.optimizer, objective.parameters, self.estimator, again, measure)
        record, found = seen[-1]
        moved = None if self._left is not None and torch.equal(began, self._left) else bytes(began.tolist())
        self.log.write_step(record.loss, found.weights, self._outline(found), list(objective.parameters), settings, moved)
        self._left = again.get_state()
        self._look_at_buffers()
        return record

    def _measured(self, objective: Objective) -> Callable[[Estimator, dict[str, Tensor]], tuple[Estimate, Measured]]:
        def measured(method: Estimator, kept: dict[str, Tensor]) -> tuple[Estimate, Measured]:
            if method != self.estimator:
                raise ValueError("the batch has no examples, and a log has no step of such batches: leave them out")
            return method.measured(objective, self.generator, kept)

        return measured

    def _outline(self, found: Measured) -> dict[str, Any]:
        """What moved; the same object as long as it is the same."""
        if self._known is None or self._known[0].passes != found.passes:
            self._known = found, found.outline()
        return self._known[1]

    def _look_at_buffers(self) -> None:
        """Say once that a replay cannot know what the first step has left in buffers."""
        before, self._buffers = self._buffers, None
        changed = [name for name, b in self.model.named_buffers() if name in before and not torch.equal(b, before[name])] if before else []
        if changed:
            more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            warnings.warn(
                f"steps change buffers of the model ({', '.join(changed[:_SHOWN])}{more}): these follow from the data and are not in the "
                "log, so a replay leaves them as they are",
                stacklevel=4,
            )
