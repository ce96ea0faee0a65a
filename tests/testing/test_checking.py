"""check_estimator: what is right passes, and every broken promise is named in a sentence that says what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import SkipTest

import pytest
import torch
from torch import nn

import forwardgrad as fg
from forwardgrad.directions import Gaussian
from forwardgrad.testing import CASES, Case, check_estimator, estimator_checks

ONE = CASES[:1]


@dataclass(frozen=True)
class Right(fg.ForwardGradient):
    """A forward gradient under another name, for the broken ones to be derived from."""

    name: ClassVar[str] = "right"

    def parts(self, *given: Any) -> Any:
        return fg.Estimator.parts(self, *given)


class Short(Right):
    def estimate(self, *given: Any) -> Any:
        return super().estimate(*given)[1]


class Forgetful(Right):
    def estimate(self, *given: Any) -> Any:
        record, gradients = super().estimate(*given)
        return record, {name: g for name, g in gradients.items() if "bias" not in name}


class Flat(Right):
    def estimate(self, *given: Any) -> Any:
        record, gradients = super().estimate(*given)
        return record, {name: g.flatten() for name, g in gradients.items()}


class Endless(Right):
    def estimate(self, *given: Any) -> Any:
        record, gradients = super().estimate(*given)
        return record, {name: g / 0 for name, g in gradients.items()}


class Eager(Right):
    def estimate(self, objective: Any, *given: Any) -> Any:
        record, gradients = super().estimate(objective, *given)
        for name, p in objective.parameters.items():
            p.grad = gradients[name]
        return record, gradients


class Lazy(Right):
    def estimate(self, *given: Any) -> Any:
        record, gradients = super().estimate(*given)
        return record, {name: None if "bias" in name else g for name, g in gradients.items()}


class Overwriting(Right):
    def estimate(self, objective: Any, *given: Any) -> Any:
        record, gradients = super().estimate(objective, *given)
        for p in objective.parameters.values():
            p.grad = None
        return record, gradients


class Unsown(Right):
    def estimate(self, objective: Any, generator: Any, state: Any) -> Any:
        return super().estimate(objective, torch.Generator().manual_seed(torch.Generator().seed()), state)


class Global(Right):
    def estimate(self, objective: Any, generator: Any, state: Any) -> Any:
        return super().estimate(objective, torch.default_generator, state)


class Doubled(Right):
    def estimate(self, *given: Any) -> Any:
        record, gradients = super().estimate(*given)
        return dataclasses.replace(record, loss=2 * record.loss), gradients


class Uncounted(Right):
    def estimate(self, *given: Any) -> Any:
        record, gradients = super().estimate(*given)
        return dataclasses.replace(record, forward_passes=2.0), gradients


class Twice(Right):
    def estimate(self, *given: Any) -> Any:
        super().estimate(*given)
        return super().estimate(*given)


class Recording(Right):
    def estimate(self, objective: Any, *given: Any) -> Any:
        with torch.enable_grad():
            objective.live()
        return super().estimate(objective, *given)


class Backward(fg.Backprop):
    reverse: ClassVar[bool] = False


class Longer(Right):
    def estimate(self, *given: Any) -> Any:
        record, gradients = super().estimate(*given)
        return record, {name: 3.0 * g for name, g in gradients.items()}


class Shared(Right):
    def estimate(self, objective: Any, generator: Any, state: Any) -> Any:
        return super().estimate(objective, torch.Generator().manual_seed(3), state)


class Secretive(Right):
    def estimate(self, objective: Any, generator: Any, state: Any) -> Any:
        state["seen"] = torch.ones(1)
        return super().estimate(objective, generator, state)


class Hooking(Right):
    def estimate(self, objective: Any, *given: Any) -> Any:
        objective.at.register_forward_hook(lambda *_: None)
        return super().estimate(objective, *given)


class Stops(Right):
    def estimate(self, *given: Any) -> Any:
        raise RuntimeError("no such rule")


class Loose(fg.Estimator):
    """A class that nobody decorated."""

    name = "loose"
    unbiased = True  # type: ignore[assignment]
    estimate = fg.Backprop.estimate  # type: ignore[assignment]

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Hidden(Right):
    """A hyperparameter that is not compared."""

    size: int = dataclasses.field(default=1, compare=False)
    things: Any = None


BROKEN: list[tuple[fg.Estimator, str, str]] = [
    (Short(), "returns what grad needs", "estimate returns dict; return two things: the record, an Estimate"),
    (Forgetful(), "returns what grad needs", r"leaves out model.0.bias; give every name in objective.parameters a tensor, or None"),
    (Flat(), "returns what grad needs", r"has shape \(20,\); give it the parameter's, \(5, 4\)"),
    (Endless(), "returns what grad needs", "is not finite"),
    (Eager(), "returns what grad needs", "estimate writes to .grad; return the estimate"),
    (Lazy(), "fills grad and adds to it", "0.bias is trained and has no .grad; return an estimate for every parameter, or let `unbiased`"),
    (Overwriting(), "fills grad and adds to it", "the estimate is not added to what .grad held"),
    (Unsown(), "repeats bit for bit", "the same seed gives other numbers; draw from the generator"),
    (Global(), "passes as an ordinary forward pass", "the global random state is not as after one ordinary forward pass; draw from"),
    (Doubled(), "passes as an ordinary forward pass", "the record says that the loss is .*; report the loss of the batch"),
    (Uncounted(), "passes as an ordinary forward pass", "forward_passes is 2.0; count the primal pass"),
    (Twice(), "updates buffers once", "the buffers are not as after one forward pass; let one evaluation of a step commit"),
    (Recording(), "saves nothing for a backward pass", r"bytes are saved for a backward pass; compute under torch.no_grad\(\)"),
    (Backward(), "saves nothing for a backward pass", "or say `reverse = True`"),
    (Longer(), "means what it says", "bias: the mean of the estimates is not the gradient"),
    (Shared(), "means what it says", "between steps: every step gives the same estimate.*its directions never change"),
    (Secretive(), "remembers in the state", r"Secretive is not stateful, and writes \['seen'\] to the state; let `stateful` return True"),
    (Hooking(), "leaves no trace", r"hooks are left in \[''\]; remove them"),
    (Stops(), "takes some case|returns what grad needs", "it stops with RuntimeError: no such rule; mend that first"),
    (Loose(), "goes through JSON and back", r"Loose can be changed; decorate the class with @dataclass\(frozen=True\)"),
    (Hidden(things=[1]), "goes through JSON and back", "Hidden cannot be hashed"),
    (Hidden(things=3j), "goes through JSON and back", "Hidden has no JSON form .*; let its fields hold plain values"),
    (Hidden(things=(1, 2)), "goes through JSON and back", "the description .* reads as .*; let every hyperparameter be a field"),
]


@pytest.mark.parametrize(("broken", "check", "words"), BROKEN, ids=[f"{type(broken).__name__}-{words[:30]}" for broken, _, words in BROKEN])
def test_every_broken_promise_is_named(broken: fg.Estimator, check: str, words: str) -> None:
    cases = [case for case in CASES if case.name in (["batch norm"] if isinstance(broken, Twice) else ["mlp"])]
    said = []
    for one in estimator_checks(broken, cases=cases):
        if one.name in check.split("|"):
            with contextlib.suppress(SkipTest):
                try:
                    one()
                except AssertionError as error:
                    said.append(str(error))
    assert any(re.search(words, message) for message in said), said
    assert all(message.startswith(type(broken).__name__) and "\n" not in message for message in said)


def test_the_first_broken_promise_is_raised_with_the_name_of_the_estimator() -> None:
    with pytest.raises(AssertionError, match=r"returns dict; return two things") as told:
        check_estimator(Short(), cases=[case for case in CASES if case.name == "mlp"])
    assert str(told.value).startswith("Short")
    assert "\n" not in str(told.value)


@pytest.mark.some(2)
@pytest.mark.parametrize(
    "method",
    [Right(), fg.ForwardGradient(tangents=2, perturb=fg.LowRank(), law=fg.Rademacher()), fg.Backprop(), fg.LearnedFeedback(), fg.Readout()],
    ids=repr,
)
def test_what_is_right_passes_and_leaves_the_global_random_state_alone(method: fg.Estimator) -> None:
    before = torch.get_rng_state()
    results = check_estimator(method, repeats=100)
    assert torch.equal(before, torch.get_rng_state())
    assert {result.case for result in results} == {"", *(case.name for case in CASES)}
    skipped = {result.check for result in results if result.status == "skipped"}
    assert skipped == ({"saves nothing for a backward pass", "records nothing outside"} if isinstance(method, fg.Backprop) else set())


OURS = [
    *(kind() for kind in fg.ESTIMATORS),
    *(fg.ForwardGradient(perturb=kind()) for kind in fg.PERTURBATIONS),
    *(fg.ForwardGradient(tangents=2, law=kind()) for kind in fg.LAWS),
]


@pytest.mark.full
@pytest.mark.parametrize("method", OURS, ids=repr)
def test_all_that_comes_with_the_project_passes(method: fg.Estimator) -> None:
    assert {result.status for result in check_estimator(method, cases=ONE, repeats=100)} <= {"passed", "skipped"}


def regression() -> tuple[nn.Module, Any]:
    return nn.Linear(3, 2), lambda model: model(torch.ones(4, 3, dtype=torch.float64)).square().mean()


def test_a_case_that_is_refused_is_skipped_and_to_refuse_all_is_a_failure() -> None:
    results = check_estimator(fg.LocalLosses(), cases=[*ONE, Case("regression", regression)], repeats=100)
    refused = [result for result in results if result.case == "regression"]
    assert {result.status for result in refused} == {"skipped"}
    assert "the estimator refuses it (LocalLosses needs an F.cross_entropy" in refused[0].message
    with pytest.raises(AssertionError, match=r"it refuses every case .*; give cases= that it is made for"):
        check_estimator(fg.LocalLosses(), cases=[Case("regression", regression)], repeats=100)


@pytest.mark.parametrize("check", estimator_checks(Right(tangents=2), cases=ONE, repeats=100), ids=str)
def test_checks_are_functions_with_names(check: Any) -> None:
    assert str(check).endswith("-Right(tangents=2)")
    assert " case " not in str(check)
    check()


def test_a_check_that_does_not_apply_asks_the_test_runner_to_skip_it() -> None:
    (check,) = [check for check in estimator_checks(fg.Backprop(), cases=ONE) if check.name == "saves nothing for a backward pass"]
    with pytest.raises(SkipTest, match="says that it makes a backward pass"):
        check()


@pytest.mark.full
def test_a_step_is_compiled_on_request_and_fails_where_it_stays_eager() -> None:
    check_estimator(fg.ForwardGradient(), cases=ONE, repeats=100, compiled=True)
    check_estimator(Unfollowed(), cases=ONE, repeats=100)
    with pytest.raises(AssertionError, match="compile: steps stay eager: "):
        check_estimator(Unfollowed(), cases=ONE, repeats=100, compiled=True)


@dataclass(frozen=True)
class Unfollowed(fg.ForwardGradient):
    """Decides by a number that it reads off a tensor, which no graph can hold."""

    name: ClassVar[str] = "unfollowed"
    law: fg.Law = Gaussian()

    def estimate(self, *given: Any) -> Any:
        record, gradients = super().estimate(*given)
        return record, gradients if record.derivatives.abs().sum().item() > 0 else dict.fromkeys(gradients)

    def parts(self, *given: Any) -> Any:
        return fg.Estimator.parts(self, *given)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"on_fail": "warn"}, ValueError, "on_fail must be 'raise' or 'report'"),
        ({"repeats": 50}, ValueError, "repeats must be an even number of at least 100, not 50"),
        ({"repeats": 101}, ValueError, "repeats must be an even number"),
        ({"cases": []}, ValueError, "there is no case"),
        ({"estimator": fg.Backprop}, TypeError, "check an object of a class derived from forwardgrad.Estimator, such as Mine"),
    ],
    ids=str,
)
def test_arguments_outside_their_limits_are_told(options: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"estimator": fg.Backprop(), **options}
    with pytest.raises(error, match=words):
        check_estimator(given.pop("estimator"), **given)
