"""`LearnedFeedback`: a matrix for every layer, learned from forward passes, turns the error at the output into one at the layer."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from forwardgrad.calls import MOST_NUMBERS, Pass, perturbed_pass
from forwardgrad.directions import Law, Rademacher, fork
from forwardgrad.estimators.assembly import add, add_exact
from forwardgrad.estimators.base import Estimate, Estimator, check_count, check_number, needed
from forwardgrad.estimators.heads import Labels, follow_
from forwardgrad.objective import Objective
from forwardgrad.perturbations import Activity, ActivityUse, Entered

STEP = "step"


@dataclass(frozen=True)
class LearnedFeedback(Estimator):
    """Feedback matrices learned from the derivative of all outputs at once, which one forward pass gives for every example.

    Formula: activities h_l behind every layer move by u_l; one pass gives the output's derivative ẏ = Σ_l J_l u_l of every example, C
    numbers instead of one. With e = ∂f/∂y, known without a reverse pass (softmax − onehot for the cross-entropy), and B_l [C, q_l] ≈ E[J_l]
    a layer,
    - the error sent to layer l is δ̂_l = e B_l, on the units that are active there, and its gradients are the products with its own input;
    - rule="lms": B_l ← B_l + a_l Σ r u_lᵀ with the residual r = ẏ − Σ_l B_l u_l, summed over the batch. With rate=None, a_l is the step
      that brings B_l closest to E[J_l], as far as pairs of examples agree on the way there: long while B_l is wrong, short once what is
      left is noise. With a rate, a_l = rate/(n + q + 1) for the n moves of the batch that touched a unit and q units that moved in all:
      the normalised least mean squares step, stable for rates below 2;
    - rule="average": B_l ← (1 − rate) B_l + rate · (1/n) Σ ẏ u_lᵀ, a moving average.
    Where every position has a target of its own, as each token of a language model, B_l [p, q] is one matrix for all positions: from the
    p inputs of the last layer at a position, if that is linear and trained, to the q units of layer l there. The last layer's own feedback
    is learned as that of a classifier of `LocalLosses`: one input in four a step, without noise, and no weight is transposed.
    The last layer gets its exact gradient, e xᵀ. Parameters outside layers with rules get the forward gradient of the residual.

    Bias: with use="direct", that of B: e (B_l − J_l) an example; J_l changes with the example and the weights, B_l does not, or late. With
    a target at every position also all that attention carries to other positions (none where a layer has the positions in another order
    than the targets: it learns by the derivative alone). With
    use="control-variate", δ̂_l + (e·r) u_l: none, since E[(e·J u − e·B u) u] = e (J − B) for every B that does not depend on u.
    Variance: of "direct", what the noise of u leaves in B_l, small for small rates; of "control-variate", (q ± 1)‖e(J − B)‖² an example.
    Cost: K + 1 forward passes for K tangents, and about 2 C q products an example to predict and to learn; B holds C q numbers. Of the
    pass the inputs of layers are held until the loss is there. What moved is not: it is drawn anew where it is needed.
    Limits: layers with the same number of units at every step. The error at the output has to be known: the loss is a sum of torch's
    loss functions (see `forwardgrad.forward_mode.rules.losses`), or follows from at most 2,048 numbers that the last layer returns.

    Args:
        rule: how B is learned: "lms" (steps against the error of its prediction) or "average" (a moving average).
        rate: None for steps that follow from the data ("lms") or 0.01 ("average"); else above 0 and below 2, or below 1 for "average".
        use: "direct" (fast, biased: the error is sent through B) or "control-variate" (unbiased, noisier).
        warm_up: first steps in which only the feedback learns and no gradient is given (`.grad` is left alone, so optimizers do nothing).
        tangents: K ≥ 1 moves of every activity a step.
        law: where moves are drawn from.
        masked: whether units that cannot matter are left out, as in `Activity`.

    Raises ValueError where an argument is outside its limits, no generator or state was given, the error at the output cannot be found
    (for "direct" also where a further term of the loss may use that output), or the state belongs to another model.

    Source: the moving average is that of Bacho and Chu, FDFA (2022), eqs. 7 and 8, with Lansdell et al. (2020) before them; the residual
    form and the control variate are this project's (compare "Apical Dust", 2026).

    >>> LearnedFeedback(use="control-variate").unbiased
    True
    """

    name: ClassVar[str] = "feedback"

    rule: Literal["lms", "average"] = "lms"
    rate: float | None = None
    use: Literal["direct", "control-variate"] = "direct"
    warm_up: int = 0
    tangents: int = 1
    law: Law = Rademacher()
    masked: bool = True

    def __post_init__(self) -> None:
        for what, value, known in (("rule", self.rule, ("lms", "average")), ("use", self.use, ("direct", "control-variate"))):
            if value not in known:
                raise ValueError(f"{what} must be one of {', '.join(known)}, not {value!r}")
        if self.rate is not None:
            check_number("rate", self.rate, 0, 2 if self.rule == "lms" else 1)
        if isinstance(self.warm_up, bool) or not isinstance(self.warm_up, int) or self.warm_up < 0:
            raise ValueError(f"warm_up must be a whole number of at least 0, not {self.warm_up!r}")
        check_count("tangents", self.tangents)
        if not isinstance(self.law, Law):
            raise ValueError(f"law must be a law of directions such as Rademacher(), not {self.law!r}")
        Activity(self.masked).check(self.law)

    @property
    def unbiased(self) -> bool:
        return self.use == "control-variate" and self.warm_up == 0

    @property
    def stateful(self) -> bool:
        return True

    def learned_apart(self, state: Mapping[str, Tensor]) -> list[str]:
        return [name for name in state if name.startswith(("feedback.", "progress."))]

    def estimate(
        self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]
    ) -> tuple[Estimate, dict[str, Tensor | None]]:
        generator = needed(generator)
        seeds = fork(generator, self.tangents)
        who = f"{type(self).__name__}(use={self.use!r})" if self.use == "control-variate" else ""
        found = perturbed_pass(objective, Activity(self.masked), self.law, seeds, generator.device, exact_output=True, who=who)
        read = torch.device("cpu") if self.warm_up else found.loss.device  # so that reading it waits for no device
        step = state.setdefault(STEP, torch.zeros((), dtype=torch.int64, device=read))
        gradients: dict[str, Tensor | None] = dict.fromkeys(objective.parameters)
        with torch.autocast(found.loss.device.type, enabled=False):
            error, moved = output_of(found, type(self).__name__)
            if self.use == "direct":
                check_error(found, type(self).__name__)
            entered = [place for place in found.entered if place not in found.exact]
            ready = self.warm_up == 0 or int(step) >= self.warm_up
            self.follow(gradients if ready else None, found, entered, error, moved, objective, state)
            if ready:
                add_exact(gradients, found)
        step += 1
        return Estimate(found.loss, found.derivatives, self.tangents + 1), gradients

    def follow(
        self,
        gradients: dict[str, Tensor | None] | None,
        found: Pass,
        entered: list[Entered],
        error: Float[Tensor, "n c"],
        moved: Float[Tensor, "k n c"],
        objective: Objective,
        state: dict[str, Tensor],
    ) -> None:
        """`teach` what entered ahead of the model's output: as a whole, or position by position where each has a target of its own."""
        if not entered:
            return
        labels, rows = Labels.of(found), (error * moved).sum(2)
        beyond = found.beyond(rows) if found.reading.beyond and len(moved) else None
        if len(labels) == len(found.parts) == 1 and labels[0].tokens and found.reading.way == "outputs":
            told = by_position(found, labels[0], objective, state)
            self.teach(gradients, found, entered, *told, state, beyond, rows, labels[0].apart)
        else:
            self.teach(gradients, found, entered, error, moved, state, beyond)

    def teach(
        self,
        gradients: dict[str, Tensor | None] | None,
        found: Pass,
        entered: list[Entered],
        error: Float[Tensor, "rows c"],
        moved: Float[Tensor, "k rows c"],
        state: dict[str, Tensor],
        beyond: Float[Tensor, " k"] | None = None,
        derivatives: Float[Tensor, "k n"] | None = None,
        apart: Collection[Entered] = (),
    ) -> None:
        """Add the gradients of what entered ahead of an output with this error, where wanted, and learn from how the output moved.

        A row is an example, or a position of one. `beyond` is the derivative of what the loss has besides that output, `derivatives` that
        of each example where error and moves do not give it exactly. What is `apart` has positions in another order than the output.
        """
        each = len(error) // found.count
        places = [point for point in places_of(found, entered, each) if point not in apart]
        feedback = [matrix(state, found, point, error, None) for point in places]
        residual = moved - sum(
            (point.moves(found.count, each).to(b.dtype) @ b.T for b, point in zip(feedback, places, strict=True)), torch.zeros_like(moved)
        )
        rows, left = (error * residual).sum(2), None if beyond is None else beyond / self.tangents
        if derivatives is not None:
            rows = derivatives - (error * (moved - residual)).sum(2).unflatten(1, (found.count, each)).sum(2)
        elif each > 1:
            rows = rows.unflatten(1, (found.count, each)).sum(2)
        rows, signal = rows / self.tangents, moved if self.rule == "average" else residual
        counts = [point.counted(found.count, each) for point in places]
        units = sum((count.sum() / found.count for count in counts), torch.zeros((), device=signal.device)) / len(signal)
        for point, b, count in zip(places, feedback, counts, strict=True):
            if gradients is not None:
                self._add(gradients, found, point, b, error, rows, left)
            self._learn(found, point, b, signal, count, units, state)
            point.kept.clear()  # what the layer was given is held no longer than until it has learned
        for place in entered:
            if gradients is not None and place not in places:
                add(gradients, place.gradient(found.share(rows, place, left)))

    def _add(
        self,
        gradients: dict[str, Tensor | None],
        found: Pass,
        point: ActivityUse,
        b: Tensor,
        error: Tensor,
        rows: Tensor,
        beyond: Tensor | None,
    ) -> None:
        sent = error @ b
        if self.use == "control-variate":
            each, positions = found.share(rows, point, beyond).expand(-1, found.count), len(sent) // found.count
            moves = point.moves(found.count, positions).to(rows.dtype)
            sent = sent + torch.einsum("kb,kbq->bq", each.repeat_interleave(positions, 1), moves)
        add(gradients, point.from_error(point.at_rows(sent, found.count)))

    def _learn(
        self, found: Pass, point: ActivityUse, b: Tensor, signal: Tensor, count: Tensor, units: Tensor, state: dict[str, Tensor]
    ) -> None:
        u, seen = point.moves(found.count, signal.shape[1] // found.count).to(b.dtype), signal.to(b.dtype)
        learned = torch.einsum("kbc,kbq->cq", seen, u)
        if self.rule == "average":
            b.lerp_(learned / count.clamp(min=1).to(b.dtype), self.rate or 0.01)
        elif self.rate is not None or seen.shape[:2].numel() == 1:  # one move alone agrees with nothing
            b.add_(learned * ((self.rate or 0.3) / (count + units + 1)).to(b.dtype))
        else:
            step = _greedy_step(seen, u, learned, count, state, f"progress.{found.entered.index(point)}")
            b.add_(learned * step.to(b.dtype))


def _greedy_step(seen: Tensor, u: Tensor, learned: Tensor, count: Tensor, state: dict[str, Tensor], key: str) -> Tensor:
    """The step a along G = Σ r uᵀ that brings B closest to E[J]: what of ‖G‖² is signal, over all of it.

    Pairs of different examples have independent moves, so ‖G‖² − Σ_b ‖r_b‖²‖u_b‖² is what n(n − 1) pairs agree on, ‖E[r uᵀ]‖² for each.
    Both parts are averaged over some twenty steps.
    """
    n = seen.shape[0] * seen.shape[1]
    total = learned.square().sum()
    alone = (seen.square().sum(2) * u.square().sum(2)).sum()
    now = torch.stack([(total - alone) / (n * (n - 1)), total]).float()
    agreed, size = state.setdefault(key, torch.zeros_like(now)).lerp_(now, 0.05)
    share = (count.square().sum() / count.sum() / n).nan_to_num(1.0).clamp(min=1 / n)  # how often a unit moves, as its own moves count it
    step: Tensor = (n * agreed / size).nan_to_num(0.0).clamp(0, 1 / n) / share
    return step


def output_of(found: Pass, who: str) -> tuple[Float[Tensor, "n c"], Float[Tensor, "k n c"]]:
    """The error at the output and the output's derivatives, example by example; several outputs one behind the other."""
    if not found.read:
        why = found.reading.why or "it returns one loss an example"
        raise ValueError(
            f"{who} needs the error at the model's output, and cannot find it for this loss, since {why}: let the loss end in "
            "F.cross_entropy, F.mse_loss or another loss function of torch"
        )
    rows, count = found.reading.read, found.count
    error = torch.cat([r.gather(e, count) for r, e in zip(rows, found.errors, strict=True)], 1)
    if not found.moved:
        return error, error.new_zeros(0, *error.shape)
    return error, torch.cat([r.gather(m.to(error.dtype), count, lead=1) for r, m in zip(rows, found.moved, strict=True)], 2)


def check_error(found: Pass, who: str) -> None:
    """ValueError where the error at the model's output is not all that the loss has there; a warning where it has more inside the model."""
    if found.reading.behind:
        raise ValueError(
            f"{who} needs the error at the model's output, and the loss uses that output inside torch.func.vmap or another transform, "
            "where nothing is seen: call the loss function on the whole batch instead"
        )
    if not found.reading.rest or found.reading.way != "outputs":
        return
    if {point.read_at for point in found.exact} != set(range(len(found.read))):
        raise ValueError(
            f"{who} needs the error at the model's output, and the loss has a further term that may use that output, whose error is not "
            "known in closed form: leave that term out, or let it use the same tensor as the loss function (before anything reshapes it) "
            f"and have at most {MOST_NUMBERS:,} numbers there"
        )
    warnings.warn(
        f"{who} goes by the error at the model's output: a further term of the loss that uses activities inside the model trains nothing",
        stacklevel=6,
    )


def by_position(
    found: Pass, labels: Labels, objective: Objective, state: dict[str, Tensor]
) -> tuple[Float[Tensor, "rows c"], Float[Tensor, "k rows c"]]:
    """The error and the moves at every position, where each has a target of its own: at what the last layer is given, else at the output.

    The last layer is linear, and the same at every position. So its feedback is learned as that of a classifier inside the model is, and
    all other feedback has the last layer's units in place of every word.
    """
    error, moved = found.errors[labels.part.index].movedim(1, -1), [t.movedim(2, -1) for t in found.moved]
    last = next((point for point in found.exact if point.linear), None)
    if last is not None:
        name, target = last.layer.names["weight"], labels.part.output.call["target"]
        weight = last.layer.as_matrix(objective.parameters[name]).to(error.dtype)
        feedback = state.setdefault(f"feedback.last.{name}", weight.clone())  # at first all units move
        _check_shape(feedback, weight.shape, name)
        follow_(feedback, weight, state.setdefault("last.turn", torch.zeros((), dtype=torch.int64, device=error.device)))
        error = error @ feedback
        moved = [] if found.hidden is None else [found.hidden.reshape(-1, *target.shape, weight.shape[1])]
    error = labels.by_position(error).flatten(0, 1)
    told = (
        labels.by_position(moved[0].to(error.dtype), lead=1).flatten(1, 2)
        if moved
        else error.new_zeros(len(found.derivatives), *error.shape)
    )
    return error, told


def warn_of_penalty(found: Pass, who: str) -> None:
    """Warn where a part of the loss trains nothing under an estimator that knows the error at the output alone."""
    if found.reading.penalty:
        warnings.warn(
            f"{who} goes by the error at the model's output: what the loss has besides, such as a penalty on weights, trains nothing. "
            "Use the optimizer's weight_decay",
            stacklevel=6,
        )


def places_of(found: Pass, entered: list[Entered], each: int = 1) -> list[ActivityUse]:
    """The places that a feedback matrix can be learned for: those where each row of the batch has numbers of its own.

    A row is an example, or one of `each` positions of an example.
    """
    points = [place for place in entered if isinstance(place, ActivityUse) and not place.exact and place.moved]
    rows = found.count * each
    return [
        point
        for point in points
        if (point.place.rows is not None or found.count == 1) and (each == 1 or point.shape.numel() == rows * point.shape[point.channels])
    ]


def matrix(state: dict[str, Tensor], found: Pass, point: ActivityUse, error: Tensor, generator: Generator | None) -> Float[Tensor, "c q"]:
    """The feedback matrix of one place: zeros at first, or random numbers of variance 1/C where a generator is given."""
    key = f"feedback.{found.entered.index(point)}.{point.names[0]}"
    outputs = error.shape[1]
    shape = (outputs, point.shape.numel() // len(error))
    if key not in state:
        made = torch.zeros(shape, dtype=error.dtype, device=generator.device if generator else error.device)
        state[key] = (made.normal_(generator=generator) / outputs**0.5 if generator else made).to(error.device)
    _check_shape(state[key], shape, point.names[0])
    return state[key]


def _check_shape(feedback: Tensor, shape: tuple[int, ...], name: str) -> None:
    if feedback.shape != shape:
        raise ValueError(
            f"the state holds feedback of shape {tuple(feedback.shape)} for {name}, but this batch needs {tuple(shape)}: use one "
            "state for one model and one size of input"
        )
