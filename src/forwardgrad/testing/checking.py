"""All checks of an estimator: as one call, or as a list of functions for a test runner."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Literal
from unittest import SkipTest

from forwardgrad.estimators import Estimator, check_count
from forwardgrad.testing import promises, standing
from forwardgrad.testing.cases import CASES, Case
from forwardgrad.testing.evidence import PromiseEvidence, gather

PROMISES: dict[str, Callable[[PromiseEvidence], None]] = {
    "repeats bit for bit": promises.repeats_bit_for_bit,
    "fills grad and adds to it": promises.fills_grad_and_adds_to_it,
    "passes as an ordinary forward pass": promises.passes_as_an_ordinary_forward_pass,
    "updates buffers once": promises.updates_buffers_once,
    "saves nothing for a backward pass": promises.saves_nothing_for_a_backward_pass,
}
"""What is read off a few estimates on every case, by the name of the check."""

REPEATS = 400


@dataclasses.dataclass(frozen=True)
class Result:
    """What one check of one estimator found; `message` is the sentence of one that failed or was skipped, else ''."""

    estimator: str
    check: str
    case: str
    status: Literal["passed", "failed", "skipped"]
    message: str = ""


@dataclasses.dataclass(frozen=True)
class EstimatorCheck:
    """One check of one estimator, on one case or on none: a call raises AssertionError where it fails, SkipTest where it does not apply."""

    estimator: Estimator
    name: str
    case: Case | None
    work: Callable[[], None]

    def __call__(self) -> None:
        where = described(self.estimator) + (f" on the case {self.case}" if self.case else "")
        try:
            self.work()
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from error.__cause__
        except SkipTest as reason:
            raise SkipTest(f"{where}: {reason}") from None
        except Exception as error:  # the estimator is the author's, and may raise anything
            said = " ".join(str(error).split()) or "no message"
            raise AssertionError(f"{where}: it stops with {type(error).__name__}: {said}; mend that first") from error

    def __str__(self) -> str:
        words = (self.name, *([self.case.name] if self.case else []))
        return "-".join([*(word.replace(" ", "_") for word in words), described(self.estimator)])

    def result(self, on_fail: Literal["raise", "report"] = "report") -> Result:
        """The check's outcome as a value, or its failure as an exception."""
        outline = described(self.estimator), self.name, str(self.case or "")
        try:
            self()
        except AssertionError as error:
            if on_fail == "raise":
                raise
            return Result(*outline, "failed", str(error))
        except SkipTest as reason:
            return Result(*outline, "skipped", str(reason))
        return Result(*outline, "passed")


def check_estimator(
    estimator: Estimator,
    *,
    cases: Sequence[Case] = CASES,
    repeats: int = REPEATS,
    compiled: bool = False,
    device: str = "cpu",
    on_fail: Literal["raise", "report"] = "raise",
) -> list[Result]:
    """Check that an estimator keeps the promises that every estimator makes, on a few small models.

    On every case: the estimate has the form that `.grad` needs. It is added to `.grad`, with dtype, device and shape of the parameter.
    Frozen parameters are left alone, and tied ones have one estimate. The same seed gives the same bits. The loss is that of the batch, and
    the global random state is as after one forward pass. Buffers are updated once. Nothing is saved for a backward pass, unless the
    estimator's `reverse` is True. On the first case alone: `forwardgrad.check` finds no fault, so directions are independent and, where
    `unbiased` is True, the mean of the estimates is the gradient. What is remembered lies in the state. The caller's grad mode makes no
    difference. Without a case: the description of the estimator reads as the estimator.

    False alarms: all checks but the one of the mean are exact. That one faults a correct estimator in less than 1 of 1,000 checks; its seed
    is fixed, so it gives the same answer every time. More `repeats` see a smaller bias.

    A case that the estimator refuses with a ValueError is skipped: not every method is for every model. To refuse all is a failure.
    A perturbation or a law is checked in an estimator that uses it: `check_estimator(ForwardGradient(perturb=Mine()))`.

    Args:
        estimator: the object, with the hyperparameters that are to be checked.
        cases: models and losses; the first is the one that many estimates are made on.
        repeats: how many, an even number of at least 100.
        compiled: also compile a step, which takes seconds to minutes; it fails where the step stays eager or disagrees.
        device: where the models are, such as "cuda".
        on_fail: "raise" the first failure as an AssertionError, or "report" all of them in the list.

    Returns a result for every check. Raises TypeError for a class in place of an object, ValueError for arguments outside their limits.

    >>> from forwardgrad import ForwardGradient
    >>> results = check_estimator(ForwardGradient(tangents=2), cases=CASES[:1], repeats=100)
    >>> {result.status for result in results}
    {'passed'}
    """
    if on_fail not in ("raise", "report"):
        raise ValueError(f"on_fail must be 'raise' or 'report', not {on_fail!r}")
    checks = estimator_checks(estimator, cases=cases, repeats=repeats, compiled=compiled, device=device)
    return [check.result(on_fail) for check in checks]


def estimator_checks(
    *estimators: Estimator, cases: Sequence[Case] = CASES, repeats: int = REPEATS, compiled: bool = False, device: str = "cpu"
) -> list[EstimatorCheck]:
    """The checks of `check_estimator` one by one, for a test runner: each is a function without arguments, and `str` names it.

    With pytest:

        @pytest.mark.parametrize("check", estimator_checks(Mine(), Mine(tangents=4)), ids=str)
        def test_contract(check):
            check()
    """
    check_count("repeats", repeats)
    if repeats < 100 or repeats % 2:
        raise ValueError(f"repeats must be an even number of at least 100, not {repeats}")
    if not cases:
        raise ValueError("there is no case to check anything on")
    for estimator in estimators:
        if not isinstance(estimator, Estimator):
            raise TypeError(f"check an object of a class derived from forwardgrad.Estimator, such as Mine(), not {estimator!r}")
    return [check for estimator in estimators for check in _Checked(estimator, tuple(cases), device).checks(repeats, compiled)]


class _OnCase:
    """An estimator on one case: what is found out once and read by several checks."""

    def __init__(self, estimator: Estimator, case: Case, device: str) -> None:
        self.estimator, self.case, self.device = estimator, case, device

    @cached_property
    def refusal(self) -> str:
        """What the estimator says against the case, '' where it takes it."""
        try:
            promises.returns_what_grad_needs(self.estimator, self.case, self.device)
        except ValueError as error:
            return " ".join(str(error).split()) or "no reason given"
        except Exception:  # the check of the form says so
            return ""
        return ""

    @cached_property
    def evidence(self) -> PromiseEvidence:
        return gather(self.estimator, self.case, self.device)

    def taken(self) -> None:
        if self.refusal:
            raise SkipTest(f"the estimator refuses it ({self.refusal})")


class _Checked:
    """An estimator and the cases that it is checked on."""

    def __init__(self, estimator: Estimator, cases: tuple[Case, ...], device: str) -> None:
        self.estimator, self.device = estimator, device
        self.on = [_OnCase(estimator, case, device) for case in cases]

    def checks(self, repeats: int, compiled: bool) -> Iterator[EstimatorCheck]:
        yield self._check("goes through JSON and back", None, lambda: standing.goes_through_json_and_back(self.estimator))
        yield self._check("takes some case", None, self._takes_some_case)
        for on in self.on:
            yield self._check("returns what grad needs", on.case, lambda on=on: self._form(on))  # type: ignore[misc]
            for name, promise in PROMISES.items():
                yield self._check(name, on.case, lambda on=on, promise=promise: self._read(on, promise))  # type: ignore[misc]
            yield self._check("leaves no trace", on.case, lambda on=on: self._trace(on))  # type: ignore[misc]
        yield self._check("remembers in the state", self.first.case, lambda: self._once(standing.remembers_in_the_state))
        for outer in standing.CONTEXTS:
            yield self._check(f"ignores {outer}", self.first.case, lambda outer=outer: self._context(outer))  # type: ignore[misc]
        yield self._check("records nothing outside", None, self._outside)
        yield self._check("means what it says", self.first.case, lambda: self._means(repeats, compiled))

    def _check(self, name: str, case: Case | None, work: Callable[[], None]) -> EstimatorCheck:
        return EstimatorCheck(self.estimator, name, case, work)

    @cached_property
    def first(self) -> _OnCase:
        """The first case."""
        return self.on[0]

    def _takes_some_case(self) -> None:
        taken = any(not on.refusal for on in self.on)
        promises.ensure(taken, f"it refuses every case ({self.first.refusal})", "give cases= that it is made for")

    def _form(self, on: _OnCase) -> None:
        on.taken()
        promises.returns_what_grad_needs(self.estimator, on.case, self.device)

    def _read(self, on: _OnCase, promise: Callable[[PromiseEvidence], None]) -> None:
        on.taken()
        promise(on.evidence)

    def _trace(self, on: _OnCase) -> None:
        on.taken()
        standing.leaves_no_trace(self.estimator, on.case, self.device)

    def _context(self, outer: str) -> None:
        self.first.taken()
        standing.ignores_the_callers_context(self.estimator, self.first.case, outer, self.device)

    def _once(self, promise: Callable[..., None]) -> None:
        self.first.taken()
        promise(self.estimator, *self.first.case.build(self.device))

    def _outside(self) -> None:
        try:
            standing.records_nothing_outside_what_is_trained(self.estimator)
        except ValueError as error:
            raise SkipTest(f"the estimator refuses the loss of this check ({error})") from None

    def _means(self, repeats: int, compiled: bool) -> None:
        self._once(lambda estimator, model, loss: standing.means_what_it_says(estimator, model, loss, repeats, compiled))


def described(estimator: Estimator) -> str:
    """The class and the fields that are not what they are by default."""
    fields = [(field.name, getattr(estimator, field.name), field.default) for field in dataclasses.fields(estimator)]
    return f"{type(estimator).__name__}({', '.join(f'{name}={value!r}' for name, value, default in fields if value != default)})"
