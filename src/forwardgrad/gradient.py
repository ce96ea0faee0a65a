"""One call in place of `loss.backward()`: the only place that writes `.grad`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from forwardgrad.estimators.base import Estimate, Estimator
from forwardgrad.estimators.forward import ForwardGradient
from forwardgrad.objective import Objective, Point


def estimate_grad_(
    loss: Callable[..., Tensor],
    at: Point,
    estimator: Estimator | None = None,
    *,
    generator: Generator | None = None,
    state: dict[str, Tensor] | None = None,
) -> Estimate:
    """Evaluate a loss and add an estimate of its gradient to the `.grad` of what it is trained by.

    It stands where `loss.backward()` stands, so any `torch.optim` optimizer, scheduler, `clip_grad_norm_` and accumulation over several
    batches work after it. Formula, bias, variance and cost are those of the estimator.

    Args:
        loss: a function of `at` that returns a tensor of one element: `lambda model: loss_fn(model(x), y)` for a module, `f(t)` for a
            tensor, `f(a, b)` for a sequence of two.
        at: what is trained: a module, a leaf tensor, or a sequence of leaf tensors. Tensors with `requires_grad=False` are left alone.
        estimator: the method; `ForwardGradient()` if left out.
        generator: where directions are drawn from; the global generator is never used for them. Backprop needs none.
        state: what an estimator remembers from step to step, for those that learn as they go: begin with `state = {}` and pass the same
            dictionary at every step. It holds tensors by name, so `torch.save` keeps it beside the model.

    Returns the loss, the directional derivatives and the number of forward passes, as tensors on the device.

    Raises ValueError or TypeError for a loss that is not one number, for parameters that cannot be trained, or for a missing generator
    or state; RuntimeError where the loss carries no tangent.

    >>> xy = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> step = estimate_grad_(lambda t: (t**2).sum(), xy, generator=torch.Generator().manual_seed(0))
    >>> float(step.loss), step.forward_passes
    (5.0, 2)
    """
    chosen = ForwardGradient() if estimator is None else estimator
    if not isinstance(chosen, Estimator):
        raise TypeError(f"the estimator must be an object such as ForwardGradient(), not {chosen!r}")
    if chosen.stateful and state is None:
        raise ValueError(f"{type(chosen).__name__} learns from step to step: begin with state = {{}} and pass state=state at every step")
    with torch.inference_mode(False), torch.no_grad():  # a gradient made in inference mode could never be used outside it
        objective = Objective(loss, at)
        record, gradients = chosen.estimate(objective, generator, {} if state is None else state)
        for name, parameter in objective.parameters.items():
            gradient = gradients[name]
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient.to(parameter.dtype)  # a layer under autocast has its own in a lower precision
            else:
                parameter.grad.add_(gradient)
    return record
