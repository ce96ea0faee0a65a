"""What an estimator promises as an object: its JSON form, where it keeps what it remembers, and that its caller's context is left alone."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any
from unittest import SkipTest

import torch
from torch import Generator, Tensor, nn

from forwardgrad.diagnostics.checks import check
from forwardgrad.directions import Law
from forwardgrad.estimators import Estimator, from_config, to_config
from forwardgrad.gradient import estimate_grad_
from forwardgrad.perturbations import Perturbation
from forwardgrad.testing.cases import Case, Loss, gpus
from forwardgrad.testing.evidence import SEED, estimate, gradients, packed
from forwardgrad.testing.promises import ensure

CONTEXTS = ("no_grad", "enable_grad", "inference_mode")


def goes_through_json_and_back(estimator: Estimator) -> None:
    """`from_config(to_config(estimator))` is the estimator, and reading a description does not change it."""
    kind = type(estimator).__name__
    ensure(isinstance(getattr(estimator, "name", None), str), f"{kind} has no name", 'write `name: ClassVar[str] = "..."` in the class')
    frozen = "decorate the class with @dataclass(frozen=True), and let its fields hold plain values"
    try:
        hash(estimator)
        first = next((field.name for field in dataclasses.fields(estimator)), "name")
        setattr(estimator, first, getattr(estimator, first))
    except dataclasses.FrozenInstanceError:
        pass
    except TypeError as error:
        raise AssertionError(f"{kind} cannot be hashed ({error}); {frozen}") from None
    else:
        raise AssertionError(f"{kind} can be changed; {frozen}")
    try:
        text = json.dumps(config := to_config(estimator))
    except (TypeError, ValueError) as error:
        fields = "let its fields hold plain values, laws, perturbations and estimators"
        raise AssertionError(f"{kind} has no JSON form ({error}); {fields}") from None
    read = json.loads(text)
    again = from_config(read, lambda path, what: _classes(estimator)[path])
    ensure(json.loads(text) == read, "reading a description changes it", "copy in `__post_init__` what you change")
    same = again == estimator and hash(again) == hash(estimator)
    ensure(same, f"the description {config} reads as {again!r}", "let every hyperparameter be a field, and compare by its value")


def _classes(value: Any) -> dict[str, type]:
    """The classes of an estimator and of its components, by import path: nothing has to be imported."""
    found = {f"{type(value).__module__}:{type(value).__qualname__}": type(value)}
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        if isinstance(part, (Estimator, Law, Perturbation)):
            found |= _classes(part)
    return found


def remembers_in_the_state(estimator: Estimator, model: nn.Module, loss: Loss) -> None:
    """What is remembered lies in `state`, as plain tensors; an estimator without a memory leaves it empty and can do without."""
    kind = type(estimator).__name__
    state: dict[str, Tensor] = {}
    estimate_grad_(loss, model, estimator, generator=Generator().manual_seed(0), state=state)
    plain = all(type(value) is Tensor and not value.requires_grad for value in state.values())
    ensure(plain, "the state holds something else than plain tensors", "keep detached tensors there, under names of your own")
    if not estimator.stateful:
        ensure(state == {}, f"{kind} is not stateful, and writes {sorted(state)} to the state", "let `stateful` return True")
        estimate_grad_(loss, model, estimator, generator=Generator().manual_seed(0))
        return
    try:
        estimate_grad_(loss, model, estimator, generator=Generator().manual_seed(0))
    except ValueError as error:
        ensure("learns from step to step" in str(error), f"without a state it stops with {error}", "let `stateful` return True")
    else:
        raise AssertionError(f"{kind} is stateful, and works without a state; let `stateful` return False")


def ignores_the_callers_context(estimator: Estimator, case: Case, outer: str, device: str = "cpu") -> None:
    """The estimate is the same under torch.no_grad, enable_grad and inference_mode, and can be changed in place afterwards."""
    (model, loss), (usual, _) = case.build(device), case.build(device)
    with torch.random.fork_rng(devices=gpus(device)):
        with getattr(torch, outer)():
            record = estimate(estimator, model, loss)
        estimate(estimator, usual, loss)
    remedy = "leave grad mode as `estimate_grad_` sets it, or set it yourself for your own work alone"
    found, expected = gradients(model), gradients(usual)
    same = found.keys() == expected.keys() and all(torch.equal(g, expected[name]) for name, g in found.items())
    ensure(same, f"under torch.{outer} the estimate is another", remedy)
    for grad in (p.grad for p in model.parameters() if p.grad is not None):
        ensure(not grad.is_inference(), f"under torch.{outer} .grad cannot be changed in place", remedy)
        grad.mul_(0.5)  # as clip_grad_norm_ does
    ensure(not record.loss.requires_grad, f"under torch.{outer} the loss hangs on a graph", "detach it")


def records_nothing_outside_what_is_trained(estimator: Estimator) -> None:
    """Live parameters that the loss uses, and that are not trained here, save nothing for a backward pass either."""
    if estimator.reverse:
        raise SkipTest(f"{type(estimator).__name__} says that it makes a backward pass")
    x = torch.arange(24, dtype=torch.float64).sin().reshape(6, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        head, backbone = nn.Linear(3, 1).double(), nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
        _, saved = packed(lambda: estimate(estimator, head, lambda m: m(backbone(x)).square().mean()))
    ensure(saved == (0, 0), f"{saved} tensors and bytes are saved for a backward pass", "compute under torch.no_grad()")


def means_what_it_says(estimator: Estimator, model: nn.Module, loss: Loss, repeats: int, compiled: bool = False) -> None:
    """`forwardgrad.check` finds no fault: directions are independent, parts add up, and an estimator that says so is unbiased.

    A correct estimator fails in less than 1 of 1,000 checks, and since the seed is fixed it fails always or never. How small a bias is
    seen depends on `repeats`: with 400 estimates of one tangent, about a factor of two on the length of a parameter's gradient.
    `compiled`: the step must also become one compiled function that agrees with the eager one.
    """
    found = check(loss, model, estimator, generator=Generator().manual_seed(0), repeats=repeats, compile=compiled)
    for finding in found.findings:
        stays = compiled and finding.name == "compile" and finding.status == "note"
        if finding.status == "fault" or stays:
            raise AssertionError(f"{finding.name}: {finding.found}; {finding.remedy or 'mend that'}")


def leaves_no_trace(estimator: Estimator, case: Case, device: str = "cpu") -> None:
    """After an estimate plain backpropagation gives what it always gives, and the model can be copied."""
    (model, loss), (fresh, _) = case.build(device), case.build(device)
    with torch.random.fork_rng(devices=gpus(device)):
        estimate(estimator, model, loss)
        state = copy.deepcopy(model).state_dict()
    ensure(list(state) == list(fresh.state_dict()), "the model has another state_dict", "leave nothing in the model: `state` is for that")
    hooks = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    ensure(not hooks, f"hooks are left in {hooks}", "remove them when the estimate is made")
