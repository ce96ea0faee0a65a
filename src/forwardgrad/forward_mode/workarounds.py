"""The settings under which torch's forward mode works on ordinary models, and the state of the global generators.

What torch needs to be worked around for, each in one place, and to go when torch no longer needs it:

here
- Attention runs on the MATH backend with the fused inference path off: the others have no forward-mode rule. A call of many numbers is
  made by tiles instead, whichever way derivatives go (`rules.attention`): that backend would hold T × T of them.
- CPU LSTM and GRU run without oneDNN, whose recurrent kernels have no forward-mode rule.
- Random layers see one state of the global generator a step, however many evaluations the step makes (`RandomState`).

in `arbitration`
- `no_grad` is enforced: with live Parameters outside it, `torch.func.jvp` would also record a graph for reverse mode.
- Buffers (BatchNorm's statistics) are written to the model once a step, from the evaluation that counts.

in `objective`
- Buffers are cloned inside each evaluation that goes through `functional_call`.
- `functional_call` is told every place of a tied weight: its own handling spoils a module that is reached under two names.

in `dual_numbers` and `rules.dropout`
- `requires_grad_()` inside a model, with which some prepare for checkpoints, is passed over: `torch.func` refuses it.
- Dropout draws its mask outside of `torch.func`, which would draw another one from the same seed.

in `rules.composed`
- Operators without a forward-mode rule are made of others that have one.
- Embeddings hold their padding row still themselves: torch's forward-mode rule would train it.

in `derivative` and `watching`
- A loss whose tangent was dropped on the way (detach, .item(), numpy) is an error: torch itself would answer zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
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
        stack.enter_context(one_by_one())
        if any(isinstance(module, nn.RNNBase) for module in modules):
            # not mkldnn.flags(): it also sets, and warns about, settings that are none of our business
            stack.callback(setattr, torch.backends.mkldnn, "enabled", torch.backends.mkldnn.enabled)
            torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        yield


@contextmanager
def one_by_one() -> Iterator[None]:
    """Inside, attention and transformer layers make their calls one by one: fused ones are no layers to whoever watches calls."""
    with ExitStack() as stack:
        if torch.backends.mha.get_fastpath_enabled():
            torch.backends.mha.set_fastpath_enabled(False)
            stack.callback(torch.backends.mha.set_fastpath_enabled, True)
        yield
