"""The arms of the benchmark: the ways to take a whole training step that it compares."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from forwardgrad.directions import Gaussian, Law, Rademacher
from forwardgrad.estimators import (
    Backprop,
    Estimator,
    FixedFeedback,
    ForwardGradient,
    LearnedFeedback,
    LocalLosses,
    ZerothOrder,
    from_config,
    to_config,
)
from forwardgrad.lab.bench.cases import BuiltCase
from forwardgrad.lab.bench.peers import PEERS
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import find_here, format_estimator, parse_estimator
from forwardgrad.perturbations import Activity, LowRank, PerExample
from forwardgrad.training_step import EngineName, TrainingStep

LAW: dict[str, Law] = {law.name: law for law in (Gaussian(), Rademacher())}


@dataclass(frozen=True)
class BenchArm:
    """A way to take a step: with an estimator of this library, or as a peer in plain torch does.

    The plain forward pass has neither. `kind` is the look of the arm in figures. `stands_for` is the library's estimator whose noise a
    peer has.
    """

    name: str
    label: str
    kind: str
    estimator: Estimator | None = None
    engine: EngineName = "eager"
    peer: str | None = None
    stands_for: Estimator | None = None

    @property
    def estimator_text(self) -> str | None:
        """The estimator as the command line takes it. Options that have their defaults are left out."""
        if self.estimator is None:
            return None
        config = to_config(self.estimator)
        try:
            usual = to_config(type(self.estimator)())
        except TypeError:  # a user's own may have options without a default
            usual = {}
        return format_estimator({key: value for key, value in config.items() if key == "name" or key not in usual or value != usual[key]})

    @property
    def tangents(self) -> int:
        """How many directions a step averages; 1 for an arm without directions."""
        return int(getattr(self.estimator, "tangents", 1))

    @property
    def learns_in_first_step(self) -> bool:
        """Whether a first step does more than those behind it: finds out what is true of the model, or compiles."""
        return self.engine != "eager" or (self.estimator is not None and self.peer is None and not self.estimator.reverse)

    @property
    def noise_estimator(self) -> Estimator | None:
        """The estimator whose noise a step of this arm has."""
        return self.estimator or self.stands_for


PLAIN = BenchArm("plain", "plain forward pass", "plain")
BACKPROP = BenchArm("backprop", "backpropagation, plain torch", "backprop", Backprop(), peer="backpropagation")
FORWARD = BenchArm("forward", "forward gradient", "forward", ForwardGradient())
MOVED: tuple[BenchArm, ...] = (
    FORWARD,
    BenchArm("low-rank", "rank 1", "low-rank", ForwardGradient(perturb=LowRank(1))),
    *(BenchArm(f"low-rank-k{k}", f"rank 1, K = {k}", "low-rank", ForwardGradient(perturb=LowRank(1), tangents=k)) for k in (2, 4, 16)),
    BenchArm("per-example", "weights per example", "per-example", ForwardGradient(perturb=PerExample(), law=Rademacher())),
    BenchArm("activity", "activities", "activity", ForwardGradient(perturb=Activity(), law=Rademacher())),
)
COMPILED, CAPTURED = "-compiled", "-graph"


def _by(engine: EngineName, arm: BenchArm) -> BenchArm:
    """The same step as one compiled function, or as one captured graph."""
    base, mark, count = arm.name.partition("-k")
    name, words = (COMPILED, "compiled") if engine == "compile" else (CAPTURED, "captured graph")
    label = f"{arm.label.removesuffix(', plain torch')}, {words}"
    return dataclasses.replace(arm, name=f"{base}{name}{mark}{count}", label=label, engine=engine, peer=None)


ZEROTH = BenchArm("zeroth-order", "zeroth order", "zeroth-order", ZerothOrder())
LOCAL = BenchArm("local-feedback", "local losses with feedback", "local", LocalLosses(feedback=True, head="pooled", cells=4))
FEEDBACK = BenchArm("feedback", "learned feedback", "feedback", LearnedFeedback())
FIXED = BenchArm("fixed-feedback", "fixed feedback", "fixed-feedback", FixedFeedback())
ARMS: tuple[BenchArm, ...] = (
    PLAIN,
    BACKPROP,
    _by("compile", BACKPROP),
    BenchArm("backprop-checkpoint", "backpropagation, checkpoints", "backprop", Backprop(checkpoint=True)),
    *MOVED,
    *(_by("compile", arm) for arm in MOVED),
    ZEROTH,
    _by("compile", ZEROTH),
    LOCAL,
    _by("compile", LOCAL),
    FEEDBACK,
    FIXED,
    BenchArm("func-jvp", "func.jvp, plain torch", "peer", peer="func-jvp", stands_for=ForwardGradient()),
    BenchArm("forward-ad", "forward_ad, plain torch", "peer", peer="dual-numbers", stands_for=ForwardGradient()),
    BenchArm("mezo", "MeZO, plain torch", "peer", peer="two-passes", stands_for=ZerothOrder()),
)
ON_GPU: tuple[BenchArm, ...] = tuple(_by("graph", arm) for arm in (BACKPROP, *MOVED, LOCAL))
BY_NAME: tuple[BenchArm, ...] = (  # each takes the compiler as long as many an arm takes to be measured
    *(_by("compile", arm) for arm in (FEEDBACK, FIXED)),
    *(_by("graph", arm) for arm in (ZEROTH, FEEDBACK, FIXED)),
)
NAMED = {arm.name: arm for arm in (*ARMS, *ON_GPU, *BY_NAME)}
FOR_MEMORY = "zeroth-order(in_place=true), zeroth-order, low-rank, backprop-checkpoint"  # beside inference and backpropagation
TABLE_1 = (PLAIN, BACKPROP, FORWARD)  # what the report of the paper's Table I needs


def chosen_arms(text: str | None, law: str | None = None, *, on_gpu: bool = False) -> list[BenchArm]:
    """The arms that a list of names and estimators' texts asks for. Plain and backprop are always among them.

    `text`: names and texts, between commas or semicolons. None stands for the named arms of the device, but for those that are timed
    only when they are asked for.
    `law`: takes the place of the law of the arms that move weights at rank one, weights per example and activities.

    Raises UserError for an arm that does not exist.
    """
    chosen = [*ARMS, *(ON_GPU if on_gpu else ())] if text is None else [_arm(word) for word in _split(text)]
    if law is not None:
        chosen = [_with_law(arm, LAW[law]) for arm in chosen]
    return list(dict.fromkeys([PLAIN, BACKPROP, *chosen]))


def _arm(word: str) -> BenchArm:
    if word in NAMED:
        return NAMED[word]
    try:
        estimator = from_config(parse_estimator(word), find_here)
    except UserError as error:
        raise UserError(f"unknown arm {word!r}: choose from {', '.join(NAMED)}, or write an estimator ({error})") from error
    except (ValueError, TypeError) as error:
        known = f"named arms are {', '.join(NAMED)}"
        if "(" not in word:
            raise UserError(f"unknown arm {word!r}: {known}; an estimator can be written out, as in forward(tangents=2)") from error
        raise UserError(f"the arm {word!r} cannot be used: {error}; {known}") from error
    return BenchArm(word, word, estimator.name, estimator)


def _split(text: str) -> list[str]:
    """The parts between commas and semicolons that are not inside brackets or quotes."""
    parts, depth, quoted = [""], 0, False
    for sign in text:
        quoted ^= sign == '"'
        depth += 0 if quoted else (sign in "([") - (sign in ")]")
        if sign in ",;" and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def _with_law(arm: BenchArm, law: Law) -> BenchArm:
    if arm in NAMED.values() and isinstance(arm.estimator, ForwardGradient) and not arm.name.startswith(FORWARD.name):
        return dataclasses.replace(arm, estimator=dataclasses.replace(arm.estimator, law=law))
    return arm


class ArmStep:
    """One whole step of an arm on the batch of a case; calling it takes the step and returns the loss.

    `state` is what the estimator keeps from step to step.
    """

    def __init__(self, arm: BenchArm, built: BuiltCase) -> None:
        self.arm = arm
        self.state: dict[str, Tensor] = {}
        self._built = built
        self._optimizer = built.optimizer(captured=arm.engine != "eager")
        self._take = self._made(arm)

    def __call__(self) -> Tensor:
        return self._take()

    def begin(self) -> None:
        """Take the first steps: code, tables, workspaces and the estimator's memory are there from then on.

        A graph is made in the first step that finds that memory; after three it is there or given up. Raises what keeps the arm from
        its step, a graph that falls back to eager steps among it: its time would be that of another arm.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "engine=.* falls back", UserWarning)
            for _ in range(1 if self.arm.engine == "eager" else 3):
                self()

    def _made(self, arm: BenchArm) -> Callable[[], Tensor]:
        built, batch, loss = self._built, (self._built.inputs, self._built.labels), self._built.loss
        if arm.peer is not None:
            return PEERS[arm.peer](built.model, lambda call: loss(call, *batch), self._optimizer)
        if arm.estimator is None:
            return torch.no_grad()(lambda: loss(built.model, *batch))
        step = self._training_step(arm, arm.estimator)
        return lambda: step(*batch).loss

    def _training_step(self, arm: BenchArm, estimator: Estimator) -> TrainingStep:
        """A step of the library. Directions come from a generator of the step's own."""
        generator = torch.Generator(self._built.inputs.device).manual_seed(0)
        pieces = self._built.loss, self._built.model, self._optimizer, estimator
        return TrainingStep(*pieces, generator=generator, state=self.state, engine=arm.engine)

    @property
    def state_bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.state.values())

    def forget_gradients(self) -> None:
        """Drop what the last step left in `.grad`, so that no later step pays for its memory."""
        self._optimizer.zero_grad()
