"""The roll-back of a step: all that it changes is kept, and put back."""

from __future__ import annotations

import torch
from torch import Tensor

from forwardgrad.engines.step_survey import StepSurvey, described


def slots(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What an optimizer remembers, as far as it is tensors."""
    return [slot for kept in optimizer.state.values() for slot in kept.values() if isinstance(slot, Tensor)]


class Snapshot:
    """All that a step changes, as it is now: what rolls the model back, and what the two ways to take a step are compared by."""

    def __init__(self, survey: StepSurvey) -> None:
        step = survey.step
        self._step = step
        self.tensors, self.values = survey.tensors, [t.detach().clone() for t in survey.tensors]
        self._slots = [(slot, slot.clone()) for slot in slots(step.optimizer)]
        self._state = dict(step.state)
        self.gradients = [(p, p.grad) for p in survey.trained]
        self.generator = None if step.generator is None else step.generator.get_state()
        self._global = torch.get_rng_state()
        self._global_gpu = {gpu: torch.cuda.get_rng_state(gpu) for gpu in {t.get_device() for t in survey.tensors if t.is_cuda}}

    @torch.no_grad()
    def keep_state(self) -> None:
        """Let what a step put in the place of a tensor of the state be that tensor's new value: a graph knows no others."""
        state = self._step.state
        for name, kept in self._state.items():
            if (now := state.get(name)) is not None and now is not kept and described(now) == described(kept):
                state[name] = kept.copy_(now)

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, value in zip(self.tensors, self.values, strict=True):
            if 0 not in tensor.stride():  # an expanded constant
                tensor.copy_(value)
        for slot, value in self._slots:
            slot.copy_(value)
        self._step.state.clear()
        self._step.state.update(self._state)
        for p, gradient in self.gradients:
            p.grad = gradient
        if self.generator is not None and self._step.generator is not None:
            self._step.generator.set_state(self.generator)
        torch.set_rng_state(self._global)
        for gpu, state in self._global_gpu.items():
            torch.cuda.set_rng_state(state, gpu)
