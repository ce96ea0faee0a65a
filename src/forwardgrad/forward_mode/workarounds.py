"""The settings under which torch's forward mode works on ordinary models, and the state of the global generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from forwardgrad.objective import Objective


class RandomState:
    """The global random state of the devices of a model, to begin again from."""

    def __init__(self, objective: Objective) -> None:
        self._gpus = _gpus(objective)
        self._states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in self._gpus]

    def restore(self) -> None:
        torch.set_rng_state(self._states[0])
        for device, state in zip(self._gpus, self._states[1], strict=True):
            torch.cuda.set_rng_state(state, device)


def _gpus(objective: Objective) -> list[int]:
    return sorted({p.get_device() for p in objective.parameters.values() if p.is_cuda})


@contextmanager
def forward_mode(objective: Objective, commit: bool) -> Iterator[None]:
    """The settings under which torch's forward mode works on ordinary models; all are put back."""
    modules = list(objective.at.modules()) if isinstance(objective.at, nn.Module) else []
    with ExitStack() as stack:
        if not commit:
            stack.enter_context(torch.random.fork_rng(_gpus(objective)))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if torch.backends.mha.get_fastpath_enabled():
            torch.backends.mha.set_fastpath_enabled(False)
            stack.callback(torch.backends.mha.set_fastpath_enabled, True)
        if any(isinstance(module, nn.RNNBase) for module in modules):
            # not mkldnn.flags(): it also sets, and warns about, settings that are none of our business
            stack.callback(setattr, torch.backends.mkldnn, "enabled", torch.backends.mkldnn.enabled)
            torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        for module in modules:
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                stack.callback(module.register_forward_hook(_still_padding).remove)
        yield


def _still_padding(module: nn.Embedding, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    padding = torch.eq(inputs[0], module.padding_idx or 0).unsqueeze(-1)
    return torch.where(padding, output.detach(), output)
