"""Steps as a user would write them in plain torch today, without this library: what its arms are compared with.

Each takes (model, loss, optimizer) and returns a step that takes no arguments; `loss` is a function of the model alone. Directions come
from the global generator, as in the code that is usually shown.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp

PeerStep = Callable[[], Tensor]
PeerLoss = Callable[[Callable[..., Tensor]], Tensor]
"""The loss of a model, or of anything that can be called in its place."""


def backpropagation(model: nn.Module, loss: PeerLoss, optimizer: torch.optim.Optimizer) -> PeerStep:
    """`loss.backward()` and `optimizer.step()`."""

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def func_jvp(model: nn.Module, loss: PeerLoss, optimizer: torch.optim.Optimizer) -> PeerStep:
    """`torch.func.jvp` of a functional call, with a dense Gaussian tangent.

    The parameters are live, that is, they require gradients, and nothing says no_grad: torch also records a graph for reverse mode.
    """
    parameters = dict(model.named_parameters())

    def of(parameters: dict[str, Tensor]) -> Tensor:
        return loss(lambda *inputs: functional_call(model, parameters, inputs))

    def step() -> Tensor:
        tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
        value, derivative = jvp(of, (parameters,), (tangents,))  # type: ignore[misc]
        optimizer.zero_grad()
        for name, p in parameters.items():
            p.grad = derivative.detach() * tangents[name]
        optimizer.step()
        detached: Tensor = value.detach()
        return detached

    return step


def dual_numbers(model: nn.Module, loss: PeerLoss, optimizer: torch.optim.Optimizer) -> PeerStep:
    """The dual-number loop of `torch.autograd.forward_ad`, under no_grad: the leanest that plain torch gives for dense tangents."""
    parameters = dict(model.named_parameters())

    @torch.no_grad()
    def step() -> Tensor:
        tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
        value: Tensor
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(p, tangents[name]) for name, p in parameters.items()}
            value, derivative = forward_ad.unpack_dual(loss(lambda *inputs: functional_call(model, duals, inputs)))
        optimizer.zero_grad()
        for name, p in parameters.items():
            p.grad = derivative * tangents[name]
        optimizer.step()
        return value

    return step


def two_passes(model: nn.Module, loss: PeerLoss, optimizer: torch.optim.Optimizer, epsilon: float = 1e-3) -> PeerStep:
    """MeZO's step (Malladi et al. 2023, algorithm 1): the parameters walk to θ + εz, to θ − εz and back, z drawn from its seed each time.

    Its update is that of SGD along (f(θ + εz) − f(θ − εz))/2ε · z, written into the parameters as z is drawn a fourth time. Any other
    optimizer is given that product as a gradient.
    """
    parameters = list(model.parameters())
    plain = isinstance(optimizer, torch.optim.SGD) and not any(group["momentum"] for group in optimizer.param_groups)

    def walk(seed: int, length: float) -> None:
        torch.manual_seed(seed)
        for p in parameters:
            p.add_(torch.randn_like(p), alpha=length)

    @torch.no_grad()
    def step() -> Tensor:
        seed = int(torch.randint(2**31 - 1, ()))
        walk(seed, epsilon)
        up = loss(model)
        walk(seed, -2 * epsilon)
        down = loss(model)
        walk(seed, epsilon)
        slope = float(up - down) / (2 * epsilon)
        if plain:
            walk(seed, -optimizer.param_groups[0]["lr"] * slope)
            return (up + down) / 2
        torch.manual_seed(seed)
        for p in parameters:
            p.grad = torch.randn_like(p).mul_(slope)
        optimizer.step()
        return (up + down) / 2

    return step


PEERS: dict[str, Callable[[nn.Module, PeerLoss, torch.optim.Optimizer], PeerStep]] = {
    "backpropagation": backpropagation,
    "func-jvp": func_jvp,
    "dual-numbers": dual_numbers,
    "two-passes": two_passes,
}
