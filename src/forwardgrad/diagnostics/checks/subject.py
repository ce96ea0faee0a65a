"""`Subject`: the model, the loss and the estimator that are checked. It is evaluated as often as needed and left unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from forwardgrad.diagnostics import Explanation, copied, explain, shown, unchanged
from forwardgrad.estimators import Estimate, Estimator
from forwardgrad.factored import dense
from forwardgrad.objective import Objective, Point, scalar

Gradients = Mapping[str, Tensor | None]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative differences below are rounding; half precision has 0.05


@dataclass(frozen=True)
class Left:
    """What one evaluation leaves in the model and in the global random state, as copies."""

    loss: Tensor
    buffers: dict[str, Tensor]
    random: list[Tensor]


@dataclass(frozen=True)
class Taken:
    """One estimate, what it leaves, and the bytes saved for a backward pass meanwhile (None: torch would not let them be seen)."""

    record: Estimate
    gradients: Gradients
    left: Left
    generator: Tensor
    saved: int | None


class Subject:
    """A loss at a point and an estimator of its gradient, with a generator and a memory that are copies of those given."""

    def __init__(
        self, loss: Callable[..., Tensor], at: Point, estimator: Estimator, generator: Generator | None, state: Mapping[str, Tensor]
    ) -> None:
        self.objective, self.estimator, self.state = Objective(loss, at), estimator, copied(state)
        given = Generator().manual_seed(0) if generator is None else generator
        self.generator = Generator(given.device)
        self.generator.set_state(given.get_state())
        self._gpus = sorted({p.get_device() for p in self.objective.parameters.values() if p.is_cuda})
        self.lowest = max((p.dtype for p in self.objective.parameters.values()), key=lambda dtype: torch.finfo(dtype).eps)

    def explained(self) -> Explanation:
        """Which way one estimate goes."""
        return explain(self.objective.loss, self.objective.at, self.estimator, generator=self.generator, state=self.state)

    @property
    def tolerance(self) -> float:
        """How far two results of the lowest precision in use may differ by rounding."""
        return TOLERANCE.get(self.lowest, 0.05)

    def name(self, parameter: str) -> str:
        return shown(parameter, self.objective)

    def ordinary(self) -> Left:
        """An ordinary forward pass; whether it draws from the global generators and the lowest precision it computes in are noted."""
        with torch.inference_mode(False), torch.no_grad(), unchanged(self.objective):
            self.before = self._left(torch.zeros(()))
            loss = scalar(self.objective.precise(self.objective.as_it_is()))
            left = self._left(loss)
        self.draws = not all(torch.equal(one, other) for one, other in zip(self.before.random, left.random, strict=True))
        with torch.inference_mode(False), torch.no_grad(), unchanged(self.objective), _Types() as types:
            self.objective.as_it_is()
        self.lowest = max((self.lowest, *types.seen), key=lambda dtype: torch.finfo(dtype).eps)
        return left

    def estimate(self, estimator: Estimator | None = None, *, start: Tensor | None = None, seed: int | None = None) -> Taken:
        """An estimate on a copy of the memory, with all that it leaves.

        `start`: the state that the generator begins in, where it is not to go on. `seed`: of the global generators meanwhile.
        """
        try:
            return self._estimate(estimator or self.estimator, start, seed, watched=True)
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            return self._estimate(estimator or self.estimator, start, seed, watched=False)

    def _estimate(self, estimator: Estimator, start: Tensor | None, seed: int | None, watched: bool) -> Taken:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        if start is not None:
            self.generator.set_state(start)
        state = copied(self.state)
        with torch.inference_mode(False), torch.no_grad(), self._apart():
            if seed is not None:
                self._seed(seed)
            if watched:
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    record, gradients = estimator.estimate(self.objective, self.generator, state)
            else:
                record, gradients = estimator.estimate(self.objective, self.generator, state)
            left = self._left(record.loss)
        return Taken(record, gradients, left, self.generator.get_state(), sum(sizes) if watched else None)

    def again(self) -> tuple[Estimate, Gradients]:
        """The next of many estimates, each on a copy of the memory, with nothing noted."""
        state = copied(self.state)
        with torch.inference_mode(False), torch.no_grad(), self._apart():
            return self.estimator.estimate(self.objective, self.generator, state)

    def parts(self, start: Tensor) -> dict[str, Tensor]:
        """The sum of the parts in which `TrainingStep` takes an estimate, from this state of the generator."""
        self.generator.set_state(start)
        sums: dict[str, Tensor] = {}
        with torch.inference_mode(False), torch.no_grad(), self._apart():
            _, parts = self.estimator.parts(self.objective, self.generator, copied(self.state))
            for name, part in parts:
                sums[name] = sums[name] + dense(part) if name in sums else dense(part).clone()
        return sums

    def learn(self, steps: int) -> None:
        """Let a stateful estimator learn, the weights held still."""
        for _ in range(steps):
            with torch.inference_mode(False), torch.no_grad(), self._apart():
                self.estimator.estimate(self.objective, self.generator, self.state)

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Inside, an estimate leaves no buffers; nor the last bits of parameters that it moves in place, which come back up to rounding."""
        with unchanged(self.objective), held(self.objective) if getattr(self.estimator, "in_place", False) else nullcontext():
            yield

    def _left(self, loss: Tensor) -> Left:
        random = [torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in self._gpus)]
        return Left(loss.detach().clone(), {name: b.detach().clone() for name, b in _buffers(self.objective)}, random)

    def _seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        for gpu in self._gpus:
            torch.cuda.default_generators[gpu].manual_seed(seed)


def _buffers(objective: Objective) -> Iterator[tuple[str, Tensor]]:
    for root in (objective.at, objective.loss):
        if isinstance(root, nn.Module):
            yield from root.named_buffers()


class _Types(TorchDispatchMode):
    """The floating-point types of all that is computed inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= {t.dtype for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()}
        return result


class Held:
    """The parameters, their `.grad` and the modes of the modules as they are now, to be compared with and put back."""

    def __init__(self, objective: Objective) -> None:
        everything = objective.at.named_parameters() if isinstance(objective.at, nn.Module) else objective.parameters.items()
        self._parameters = [(name, p, p.detach().clone(), p.requires_grad, p.grad) for name, p in everything]
        self._gradients = [None if p.grad is None else p.grad.detach().clone() for _, p, *_ in self._parameters]
        roots = [root for root in (objective.at, objective.loss) if isinstance(root, nn.Module)]
        self._modes = [(module, module.training) for root in roots for module in root.modules()]

    def changed(self) -> list[str]:
        """The parameters that are not what they were, and those whose `.grad` is not."""
        found = []
        for (name, p, value, trained, gradient), kept in zip(self._parameters, self._gradients, strict=True):
            if not _same(p.detach(), value) or p.requires_grad != trained:
                found.append(name)
            if p.grad is not gradient or (gradient is not None and kept is not None and not _same(gradient, kept)):
                found.append(f"{name}.grad")
        return found

    def restore(self) -> None:
        with torch.no_grad():
            for (_, p, value, trained, gradient), kept in zip(self._parameters, self._gradients, strict=True):
                if not _same(p.detach(), value):
                    p.detach().copy_(value)
                p.requires_grad_(trained)
                if gradient is not None and kept is not None and not _same(gradient, kept):
                    gradient.detach().copy_(kept)
                p.grad = gradient
        for module, mode in self._modes:
            module.training = mode


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, numbers that are none included."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


@contextmanager
def held(objective: Objective) -> Iterator[Held]:
    """Inside, the model may be spoiled; afterwards it is what it was."""
    before = Held(objective)
    try:
        yield before
    finally:
        before.restore()
