"""`estimate_grad_` in place of `loss.backward()`: evaluate a loss and add an estimate of its gradient to `.grad`, for one model or many."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from forwardgrad.empty import check_value, estimated, instead, is_empty
from forwardgrad.ensemble import Ensemble, unbatched
from forwardgrad.estimators import Backprop, Estimate, Estimator, ForwardGradient
from forwardgrad.factored import dense
from forwardgrad.objective import Objective, Point
from forwardgrad.processes import check_processes
from forwardgrad.ranks import Distributed
from forwardgrad.sharing import ranks_of, shared_parts


def estimate_grad_(
    loss: Callable[..., Tensor],
    at: Point,
    estimator: Estimator | None = None,
    *,
    generator: Generator | None = None,
    state: dict[str, Tensor] | None = None,
    group: Distributed | None = None,
) -> Estimate:
    """Evaluate a loss and add an estimate of its gradient to the `.grad` of what it is trained by.

    It stands where `loss.backward()` stands, so any `torch.optim` optimizer, scheduler, `clip_grad_norm_` and accumulation over several
    batches work after it. Formula, bias, variance and cost are those of the estimator.

    Args:
        loss: a function of `at` that returns a tensor of one element: `lambda model: loss_fn(model(x), y)` for a module, `f(t)` for a
            tensor, `f(a, b)` for a sequence of two. A step evaluates it several times: take the batch ahead of it.
        at: what is trained: a module, a leaf tensor, or a sequence of leaf tensors. Tensors with `requires_grad=False` are left alone.
        estimator: the method; `ForwardGradient()` if left out.
        generator: where directions are drawn from; the global generator is never used for them. Backprop needs none.
        state: what an estimator remembers from step to step, for those that learn as they go: begin with `state = {}` and pass the same
            dictionary at every step. It holds tensors by name, so `torch.save` keeps it beside the model.
        group: processes that make the estimate together, each from its part of the batch or of the directions. None: this one alone.

    Returns the loss, the directional derivatives and the number of forward passes, as tensors on the device.

    Raises ValueError or TypeError for a loss that is not one number, or has none as the batch is empty, for parameters that cannot be
    trained, or for a missing generator or state; RuntimeError where the loss carries no tangent, or where torch.distributed runs several
    processes and nobody said how they work together (by `group`, or `independent_ranks`).

    >>> xy = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> step = estimate_grad_(lambda t: (t**2).sum(), xy, generator=torch.Generator().manual_seed(0))
    >>> float(step.loss), step.forward_passes
    (5.0, 2)
    """
    chosen = ForwardGradient() if estimator is None else estimator
    if not isinstance(chosen, Estimator):
        raise TypeError(f"the estimator must be an object such as ForwardGradient(), not {chosen!r}")
    ranks = ranks_of(group)
    check_processes(at, reverse=isinstance(chosen, Backprop), together=group is not None)
    if chosen.stateful and state is None:
        raise ValueError(f"{type(chosen).__name__} learns from step to step: begin with state = {{}} and pass state=state at every step")
    with torch.inference_mode(False), torch.no_grad():  # a gradient made in inference mode could never be used outside it
        objective, kept = Objective(loss, at, ranks=ranks), {} if state is None else state
        if ranks.many:
            record, parts = shared_parts(chosen, objective, generator, kept)
            for name, part in parts:
                _add(objective.parameters[name], dense(part))
            return record
        record, gradients = estimated(chosen, objective, kept, lambda method, kept: method.estimate(objective, generator, kept))
        for name, parameter in objective.parameters.items():
            gradient = gradients[name]
            if gradient is not None:
                _add(parameter, gradient)
    return record


def estimate_grads_(
    loss: Callable[..., Tensor],
    ensemble: Ensemble,
    batch: Sequence[Tensor],
    estimator: Estimator | None = None,
    *,
    generators: Sequence[Generator] | None = None,
) -> Estimate:
    """`estimate_grad_` for every replica of an ensemble, as one program: adds to the `.grad` of each model's parameters.

    Every replica gets what `estimate_grad_` would give it alone: the same directions, the same numbers up to the rounding of a batched
    matrix product. A replica whose numbers are not finite disturbs no other.

    Args:
        loss: a function `loss(model, *batch)` of one replica and its batch: `lambda model, x, y: loss_fn(model(x), y)`.
        ensemble: the replicas.
        batch: tensors [replicas, ...], each replica's own examples; `expand` one batch for all.
        estimator: Backprop, or a ForwardGradient without a control variate (combine="projection" with Dense alone); `ForwardGradient()`
            if left out.
        generators: where each replica's directions are drawn from, one for every replica. Backprop needs none.

    Returns the record of `estimate_grad_` with replicas as the first dimension of `loss` and `derivatives`; `forward_passes` are those of
    one replica.

    Raises ValueError for an estimator without a batched form, a batch of another size or missing generators; RuntimeError where the
    model draws random numbers as it runs (dropout), since replicas would share them; and what vmap raises for operators it cannot batch.

    >>> models = [torch.nn.Linear(2, 1) for _ in range(3)]
    >>> generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    >>> record = estimate_grads_(lambda m, x: m(x).square().mean(), Ensemble(models), [torch.ones(3, 5, 2)], generators=generators)
    >>> record.loss.shape, record.derivatives.shape, models[2].weight.grad.shape
    (torch.Size([3]), torch.Size([3, 1]), torch.Size([1, 2]))
    """
    chosen = ForwardGradient() if estimator is None else estimator
    if not isinstance(chosen, Estimator):
        raise TypeError(f"the estimator must be an object such as ForwardGradient(), not {chosen!r}")
    for model in ensemble.models:
        check_processes(model, reverse=False)
    records, empty = [], is_empty(batch)
    with torch.inference_mode(False), torch.no_grad():
        for part in ensemble.estimates(loss, batch, instead(chosen) if empty and unbatched(chosen) is None else chosen, generators):
            if empty:
                check_value(part.estimate.loss)
            records.append(part.estimate)
            live = ensemble.live(part.replicas)
            for name, stack in part.gradients.items():
                for own, gradient in zip(live, stack.unbind(), strict=True):
                    _add(own[name.removeprefix("model.")], gradient)
    loss_of, derivatives = (torch.cat([getattr(record, field) for record in records]) for field in ("loss", "derivatives"))
    return Estimate(loss_of, derivatives, records[0].forward_passes)


def _add(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)  # a layer under autocast has its own in a lower precision
    else:
        parameter.grad.add_(gradient)
