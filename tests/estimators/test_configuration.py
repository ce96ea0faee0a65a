"""Estimators as plain values and back, the limits of their options, and the package's lazy names."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import pytest
from torch import Generator, Tensor

import forwardgrad as fg
from forwardgrad.estimators import from_config, to_config

METHODS = [
    fg.Backprop(),
    fg.ForwardGradient(),
    fg.ForwardGradient(tangents=7, law=fg.Rademacher(), clip=0.5, chunk_size=3),
    *(fg.ForwardGradient(law=law()) for law in fg.LAWS),
    *(fg.ForwardGradient(perturb=perturb()) for perturb in fg.PERTURBATIONS),
    fg.ForwardGradient(tangents=4, perturb=fg.SplitWeights(3, fg.LowRank(2), part=1)),
    fg.ForwardGradient(perturb=fg.Informed(2, keep=8, weighted=False)),
    fg.ForwardGradient(tangents=5, perturb=fg.LowRank(3), combine="projection"),
    fg.ForwardGradient(perturb=fg.PerExample(), control_variate=0.9),
    fg.ForwardGradient(perturb=fg.Activity(masked=False), exact_output=True),
    fg.ForwardGradient(perturb=fg.Cheapest({"0.weight": "activity", "features.*": "per-example"})),
    fg.LearnedFeedback(rule="average", rate=0.1, use="control-variate", warm_up=3, tangents=2, law=fg.Gaussian(), masked=False),
    fg.LocalLosses(ends=("0.weight", "4.*"), head="positions", similarity=0.25, head_rate=0.1, tangents=2, law=fg.Sphere()),
    fg.FixedFeedback(),
    fg.Readout(),
    fg.ZerothOrder(tangents=2, perturb=fg.LowRank(2, period=5), sides="one", chunk_size=None, normalize=True, maximize=True),
    fg.ZerothOrder(perturb=fg.Sparse(0.1, of="largest")),
    fg.Backprop(checkpoint=True),
    fg.ZerothOrder(epsilon=0.01, tangents=2, law=fg.Rademacher()),
    fg.Guess(momentum=0.9, law=fg.Sphere(), chunk_size=1),
    fg.Guess("given", complement=False, per_parameter=True),
]


def test_the_list_above_has_every_estimator() -> None:
    assert {type(method) for method in METHODS} == set(fg.ESTIMATORS)
    assert len({kind.name for kind in fg.ESTIMATORS}) == len(fg.ESTIMATORS)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_config_goes_through_json_and_back(method: fg.Estimator) -> None:
    config = to_config(method)
    assert config["name"] == method.name
    assert set(config) == {"name", *(field.name for field in dataclasses.fields(method))}
    again = from_config(json.loads(json.dumps(config)))
    assert again == method
    assert hash(again) == hash(method)


def test_options_left_out_take_their_defaults_and_the_config_is_not_changed() -> None:
    config = {"name": "forward", "law": "sphere"}
    assert from_config(config) == fg.ForwardGradient(law=fg.Sphere())
    assert config == {"name": "forward", "law": "sphere"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"name": "backwards"}, ["unknown estimator 'backwards'", "backprop", "forward"]),
        ({}, ["unknown estimator None", "backprop", "forward"]),
        ({"name": "forward", "law": "cauchy"}, ["unknown law 'cauchy'", "gaussian", "rademacher", "sphere"]),
        ({"name": "forward", "law": None}, ["unknown law None", "gaussian"]),
        ({"name": "forward", "tangent": 2}, ["no option 'tangent'", "tangents", "law", "clip", "chunk_size"]),
        ({"name": "backprop", "clip": 1.0}, ["no option 'clip'", "checkpoint"]),
        ({"name": "forward", "tangents": 0}, ["tangents must be", "0"]),
        ({"name": "forward", "clip": "1"}, ["clip must be", "'1'"]),
        ({"name": "forward", "perturb": "weights"}, ["unknown perturb 'weights'", "dense", "low-rank", "cheapest"]),
        ({"name": "forward", "perturb": {"name": "low-rank", "ranks": 2}}, ["no option 'ranks'", "rank"]),
        ({"name": "forward", "perturb": {"name": "low-rank", "rank": 0}}, ["rank must be a whole number of at least 1, not 0"]),
        ({"name": "zeroth-order", "law": "sphere"}, ["must draw every weight by itself", "Sphere()"]),
    ],
    ids=str,
)
def test_unknown_names_and_bad_values_are_told_with_what_is_known(config: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ValueError, match=r"must|unknown|no option") as told:
        from_config(config)
    assert all(words in str(told.value) for words in said)


@dataclasses.dataclass(frozen=True)
class Uniform(fg.Law):
    """A law of a user's, with an option."""

    name = "uniform"
    half: float = 3**0.5

    def fill_(self, tangent: list[Tensor], generator: Generator) -> None:
        for part in tangent:
            part.uniform_(-self.half, self.half, generator=generator)

    def moment(self, n: int) -> float:
        return n + 0.8


@dataclasses.dataclass(frozen=True)
class Wrapped(fg.Estimator):
    """An estimator of a user's whose components stand in fields of other names, one without a default and one that may be left out."""

    inner: fg.Estimator
    where: fg.Law | None = None
    words: tuple[str, ...] = ()

    @property
    def unbiased(self) -> bool:
        return self.inner.unbiased

    def estimate(self, *given: Any) -> Any:
        return self.inner.estimate(*given)


class ByHand(fg.ForwardGradient):
    """An estimator of a user's that sets up itself, and takes an option that is no field."""

    def __init__(self, gain: float = 1.0, *, told: str = "nothing") -> None:
        super().__init__(tangents=2)
        object.__setattr__(self, "set_up", (gain, told))


def make(tangents: int = 1) -> Any:
    return fg.ForwardGradient(tangents=tangents) if tangents else None


OURS = {"Uniform": Uniform, "Wrapped": Wrapped, "ByHand": ByHand, "make": make, "Estimator": fg.Estimator}
HERE = {f"mine:{name}": value for name, value in OURS.items()}


def find(path: str, what: str) -> Any:
    assert what in ("estimator", "law", "perturbation")
    return HERE[path]


OWN: list[fg.Estimator] = [
    fg.ForwardGradient(law=Uniform(half=2.0)),
    Wrapped(fg.Backprop()),
    Wrapped(Wrapped(fg.Guess(law=Uniform())), Uniform(1.0)),
]


@pytest.mark.parametrize("method", OWN, ids=repr)
def test_what_a_user_wrote_is_named_by_its_import_path_and_found_by_the_caller_alone(method: fg.Estimator) -> None:
    config = json.loads(json.dumps(to_config(method)).replace(f"{__name__}:", "mine:"))
    assert "mine:" in json.dumps(config)
    kept = json.dumps(config)
    again = from_config(config, find)
    assert again == method
    assert hash(again) == hash(method)
    assert json.dumps(config) == kept
    with pytest.raises(ValueError, match=r"named by an import path, and nothing is imported here: pass find="):
        from_config(config)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"name": "mine:Uniform"}, "the estimator 'mine:Uniform' is no subclass of forwardgrad.Estimator: derive the class from that"),
        ({"name": "forward", "law": {"name": "mine:Wrapped"}}, "the law 'mine:Wrapped' is no subclass of forwardgrad.Law"),
        ({"name": "forward", "perturb": {"name": "mine:Uniform"}}, "the perturbation 'mine:Uniform' is no subclass of forwardgrad.Perturb"),
        ({"name": "forward", "law": "mine:Uniform"}, "the law 'mine:Uniform' is an import path: write it as {'name': 'mine:Uniform'}"),
        ({"name": "forward", "law": {"name": "mine:Uniform", "size": 2}}, "has no option 'size': its options are half"),
        ({"name": "mine:Wrapped"}, "the estimator 'mine:Wrapped' cannot be made: .*missing 1 required positional argument: 'inner'"),
        ({"name": "mine:Wrapped", "inner": "nonesuch"}, "unknown inner 'nonesuch': choose one of backprop, forward"),
        ({"name": "mine:Wrapped", "inner": "backprop", "where": "nonesuch"}, "unknown where 'nonesuch': choose one of gaussian"),
        ({"name": "mine:Estimator"}, "the estimator 'mine:Estimator' cannot be made: Can't instantiate abstract class"),
        ({"name": "mine:make", "tangents": 0}, "the estimator 'mine:make' makes NoneType: it has to be a forwardgrad.Estimator"),
        ({"name": "mine:make", "width": 0}, "the estimator 'mine:make' cannot be made: .* unexpected keyword argument 'width'"),
    ],
    ids=str,
)
def test_mistakes_in_what_a_user_wrote_are_told_in_a_sentence(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_config(config, find)


def test_a_component_that_may_be_left_out_may_be_none_and_a_function_may_make_the_estimator() -> None:
    assert from_config({"name": "mine:Wrapped", "inner": "backprop", "where": None}, find) == Wrapped(fg.Backprop())
    assert from_config({"name": "mine:make", "tangents": 3}, find) == fg.ForwardGradient(tangents=3)


def test_a_class_with_an_init_of_its_own_takes_what_that_takes() -> None:
    made: Any = from_config({"name": "mine:ByHand", "gain": 2.0}, find)
    assert made.set_up == (2.0, "nothing")
    assert from_config({"name": "mine:ByHand"}, find).tangents == 2  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="has no option 'size': its options are gain, told"):
        from_config({"name": "mine:ByHand", "size": 2}, find)


@pytest.mark.parametrize("option", ["tangents", "chunk_size"])
@pytest.mark.parametrize("value", [0, -1, 1.0, 2.5, math.nan, math.inf, True, False, "2"])
def test_counts_are_whole_numbers_of_at_least_one(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option} must be a whole number of at least 1"):
        fg.ForwardGradient(**{option: value})


def test_the_number_of_tangents_cannot_be_left_open() -> None:
    with pytest.raises(ValueError, match="tangents must be a whole number"):
        fg.ForwardGradient(tangents=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, math.inf, -math.inf, True, "1", [1.0]], ids=repr)
def test_a_clip_is_a_positive_number(value: Any) -> None:
    with pytest.raises(ValueError, match="clip must be a number above 0"):
        fg.ForwardGradient(clip=value)


@pytest.mark.parametrize("value", ["gaussian", None, fg.Gaussian, 1], ids=repr)
def test_a_law_is_an_instance(value: Any) -> None:
    with pytest.raises(ValueError, match="law must be a law of directions"):
        fg.ForwardGradient(law=value)


def test_estimators_say_whether_they_are_biased_and_whether_they_remember() -> None:
    assert [method.unbiased for method in METHODS[:3]] == [True, True, False]  # a clip makes the forward gradient biased
    assert [method.unbiased for method in METHODS[-4:]] == [True, False, True, False]
    assert [method.stateful for method in METHODS[-4:]] == [False, False, True, True]


BAD: list[tuple[Any, str]] = [
    (lambda: fg.ForwardGradient(perturb="dense"), "perturb must be a perturbation such as"),  # type: ignore[arg-type]
    (lambda: fg.ForwardGradient(combine="sum"), "combine must be 'mean' or 'projection', not 'sum'"),  # type: ignore[arg-type]
    (lambda: fg.ForwardGradient(perturb=fg.Activity(), combine="projection"), "goes with perturb=Dense.. or LowRank"),
    (lambda: fg.ForwardGradient(clip=1.0, combine="projection"), "takes no clip, chunk_size or control_variate"),
    (lambda: fg.ForwardGradient(exact_output=True), "exact_output=True goes with perturb=Activity.. or Cheapest"),
    (lambda: fg.ForwardGradient(control_variate=1.0), "control_variate must be a number at least 0 and below 1, not 1.0"),
    (lambda: fg.ForwardGradient(perturb=fg.Activity(), control_variate=0.5), "control_variate predicts weights' gradients"),
    *[
        (lambda p=p: fg.ForwardGradient(law=fg.Orthogonal(), perturb=p()), "it goes with perturb=Dense.. alone")  # type: ignore[misc]
        for p in fg.PERTURBATIONS[1:]
    ],
    (lambda: fg.LowRank(0), "rank must be a whole number of at least 1, not 0"),
    (lambda: fg.LowRank(True), "rank must be a whole number"),
    (lambda: fg.Activity(masked=1), "masked must be True or False, not 1"),  # type: ignore[arg-type]
    (
        lambda: fg.Cheapest({"0.weight": "rank-one"}),
        "unknown perturbation 'rank-one': choose one of dense, low-rank, per-example, activity",
    ),
    (lambda: fg.Cheapest(["dense"]), "overrides must map patterns of names"),  # type: ignore[arg-type]
    (lambda: fg.LearnedFeedback("newton"), "rule must be one of lms, average, not 'newton'"),  # type: ignore[arg-type]
    (lambda: fg.LearnedFeedback(use="both"), "use must be one of direct, control-variate"),  # type: ignore[arg-type]
    (lambda: fg.LearnedFeedback(rate=2.0), "rate must be a number above 0 and below 2, not 2.0"),
    (lambda: fg.LearnedFeedback("average", rate=1.0), "rate must be a number above 0 and below 1, not 1.0"),
    (lambda: fg.LearnedFeedback(warm_up=-1), "warm_up must be a whole number of at least 0, not -1"),
    (lambda: fg.LearnedFeedback(tangents=0), "tangents must be a whole number"),
    (lambda: fg.LearnedFeedback(law=fg.Orthogonal()), "couples all weights of a tangent"),
    (lambda: fg.LocalLosses(head="conv"), "head must be one of flatten, pooled, positions"),  # type: ignore[arg-type]
    (lambda: fg.LocalLosses(ends="0.weight"), "ends must be names of weights"),  # type: ignore[arg-type]
    (lambda: fg.LocalLosses(similarity=1.0), "similarity must be a number at least 0 and below 1"),
    (lambda: fg.LocalLosses(head_rate=0), "head_rate must be a number above 0"),
    (lambda: fg.Backprop(checkpoint=1), "checkpoint must be True or False, not 1"),  # type: ignore[arg-type]
    (lambda: fg.ZerothOrder(epsilon=0), "epsilon must be a number above 0, not 0"),
    (lambda: fg.ZerothOrder(epsilon=math.inf), "epsilon must be a number above 0, not inf"),
    (lambda: fg.ZerothOrder(epsilon="1e-3"), "epsilon must be a number above 0, not '1e-3'"),  # type: ignore[arg-type]
    (lambda: fg.ZerothOrder(tangents=0), "tangents must be a whole number of at least 1, not 0"),
    (lambda: fg.ZerothOrder(law=fg.Orthogonal()), "law must draw every weight by itself, .*not Orthogonal"),
    (lambda: fg.ZerothOrder(law="gaussian"), "law must draw every weight by itself, .*not 'gaussian'"),  # type: ignore[arg-type]
    (lambda: fg.ZerothOrder(perturb=fg.Activity()), r"perturb must move weights, as Dense\(\), .* do, not Activity"),
    (lambda: fg.ZerothOrder(perturb="low-rank"), "perturb must move weights, .*not 'low-rank'"),  # type: ignore[arg-type]
    (lambda: fg.ZerothOrder(sides="both"), "sides must be 'two' or 'one', not 'both'"),  # type: ignore[arg-type]
    (lambda: fg.ZerothOrder(chunk_size=0), "chunk_size must be a whole number of at least 1, not 0"),
    (lambda: fg.ZerothOrder(maximize=1), "maximize must be True or False, not 1"),  # type: ignore[arg-type]
    (lambda: fg.ZerothOrder(normalize=True), "normalize=True divides by the spread .*: give tangents of at least 2"),
    (lambda: fg.LowRank(1, period=0), "period must be a whole number of at least 1, not 0"),
    (lambda: fg.Sparse(0), "fraction must be a number above 0 and at most 1, not 0"),
    (lambda: fg.Sparse(1.5), "fraction must be a number above 0 and at most 1, not 1.5"),
    (lambda: fg.Sparse(of="small"), "of must be 'smallest' or 'largest', not 'small'"),  # type: ignore[arg-type]
    (lambda: fg.Guess("former"), "source must be 'previous' or 'given', not 'former'"),  # type: ignore[arg-type]
    (lambda: fg.Guess(complement=None), "complement must be True or False, not None"),  # type: ignore[arg-type]
    (lambda: fg.Guess(per_parameter=2), "per_parameter must be True or False, not 2"),  # type: ignore[arg-type]
    (lambda: fg.Guess(complement=False), "never leaves the line of the first: it needs complement=True"),
    (lambda: fg.Guess(momentum=1.0), "momentum must be a number at least 0 and below 1, not 1.0"),
    (lambda: fg.Guess("given", momentum=0.5), "momentum belongs to source='previous'"),
    (lambda: fg.Guess(law=fg.Gaussian), "law must be a law of directions"),  # type: ignore[arg-type]
    (lambda: fg.Guess(chunk_size=0), "chunk_size must be a whole number"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_values_outside_their_limits_are_told(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_estimators_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        METHODS[1].tangents = 2  # type: ignore[attr-defined]


def test_the_package_lists_its_names_and_knows_no_others() -> None:
    assert dir(fg) == sorted(fg.__all__)
    assert {"ForwardGradient", "estimate_grad_", "Nesterov", "__version__"} <= set(dir(fg))
    assert all(getattr(fg, name) is not None for name in fg.__all__)
    with pytest.raises(AttributeError, match="module 'forwardgrad' has no attribute 'ForwardGradients'"):
        fg.ForwardGradients  # noqa: B018


def test_the_package_alone_does_not_load_torch() -> None:
    program = "import sys, forwardgrad as fg; dir(fg), fg.__version__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
