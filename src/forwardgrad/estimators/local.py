"""`LocalLosses`: every block of the model learns from a small classifier of its own, so no error travels through other blocks."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from forwardgrad.calls import Pass, Scaled, perturbed_pass
from forwardgrad.directions import Law, Rademacher, fork
from forwardgrad.estimators.assembly import add, add_exact
from forwardgrad.estimators.base import Estimate, Estimator, check_count, check_number, needed
from forwardgrad.estimators.feedback import LearnedFeedback, output_of
from forwardgrad.estimators.heads import SIGHTS, Features, Head, Sight, similarity_error
from forwardgrad.objective import Objective
from forwardgrad.perturbations import Activity, ActivityUse, Entered


@dataclass(frozen=True)
class LocalLosses(Estimator):
    """Local losses: a linear classifier of its own stands behind every block of layers, and the block is trained by that loss alone.

    Formula: behind block l stands y_l = R_l φ(h_l) + b_l with the block's activities h_l, its loss (1 − s)·f(y_l) + s·‖S(h_l) − S(t)‖²/N²
    with f the model's own loss and targets t, and e_l = ∂f/∂y_l in closed form. S(h) are the cosines between the centred activities of all
    pairs of examples, S(t) says which pairs share their target.
    - feedback=False: activities in the block move by u, ẏ_l = R_l φ(ḣ_l) follows from one forward pass, and ĝ_W = Σ_b d_b u_b x_bᵀ with
      d_b = e_l·ẏ_l of example b (plus its part of the similarity term). One pass serves all blocks, as a block's tangent ends with it.
    - feedback=True: the error at h_l is φᵀ(e_l B_l), and goes into the products with the layer's own input. B_l learns R_l from how y_l
      follows moves of φ, without noise and in about width/n steps of n examples, so no weight is ever transposed. Where a block has
      more than one layer, the others move, and learn feedback from ẏ_l as `LearnedFeedback` does (the similarity term moves the last one
      alone).
    One step of Adam for every classifier follows, along its exact gradient; the model's last layer learns by its own, e xᵀ.

    Bias: for the gradient of the model's loss, all that the greedy split leaves out. For ∇f_l of each block: none with feedback=False;
    with feedback=True e (B_l − R_l), which is what R_l moved in the last few steps, and in deeper blocks that of `LearnedFeedback`.
    Variance: (q ± 1)‖δ‖² an example with q the units of one block, not of the whole model; with feedback and one layer a block, none.
    Cost: K + 1 forward passes for K tangents (with feedback and one layer a block nothing moves in the model, and the tangent pass is
    free: one), and the classifiers: C φ products an example and block.
    Limits: those of `LearnedFeedback`; blocks follow one another (what skips a block is not seen by its loss).

    Args:
        ends: patterns of names of weights; the places behind those layers end a block. None: every layer with a rule and with numbers of
            its own for every example is a block.
        feedback: whether errors come back through learned feedback, or the directional derivative alone.
        head: what φ is: "flatten" (all units), "pooled" (means over a grid of cells), "positions" (a classifier at every position, its loss
            the mean over them; for convolutions).
        cells: of "pooled", along each dimension: 1 for the mean over all positions.
        similarity: weight s in [0, 1) of the similarity-matching term.
        head_rate: above 0, the learning rate of the classifiers.
        tangents: K ≥ 1 moves of every activity a step.
        law: where moves are drawn from.

    Raises ValueError where an argument is outside its limits, no generator or state was given, the loss does not hold one F.cross_entropy
    with a class index an example (scaled, or beside other terms), or the state belongs to another model.

    Source: Ren et al., "Scaling forward gradient with local losses" (2023), sections 4.1 and 4.2; Nøkland and Eidnes (2019), eqs. 1 to 3;
    the learned feedback is this project's.

    >>> LocalLosses(similarity=0.5).unbiased
    False
    """

    name: ClassVar[str] = "local"

    ends: tuple[str, ...] | None = None
    feedback: bool = False
    head: Sight = "flatten"
    cells: int = 1
    similarity: float = 0.0
    head_rate: float = 1e-3
    tangents: int = 1
    law: Law = Rademacher()

    def __post_init__(self) -> None:
        if self.ends is not None:
            if not isinstance(self.ends, (tuple, list)) or not all(isinstance(pattern, str) for pattern in self.ends):
                raise ValueError(f"ends must be names of weights, such as ('0.weight', '4.weight'), not {self.ends!r}")
            object.__setattr__(self, "ends", tuple(self.ends))
        if not isinstance(self.feedback, bool):
            raise ValueError(f"feedback must be True or False, not {self.feedback!r}")
        if self.head not in SIGHTS:
            raise ValueError(f"head must be one of {', '.join(SIGHTS)}, not {self.head!r}")
        check_count("cells", self.cells)
        check_number("similarity", self.similarity, 0, 1, closed=True)
        check_number("head_rate", self.head_rate, 0)
        check_count("tangents", self.tangents)
        if not isinstance(self.law, Law):
            raise ValueError(f"law must be a law of directions such as Rademacher(), not {self.law!r}")
        Activity().check(self.law)

    @property
    def unbiased(self) -> bool:
        return False

    @property
    def stateful(self) -> bool:
        return True

    def estimate(
        self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]
    ) -> tuple[Estimate, dict[str, Tensor | None]]:
        generator = needed(generator)
        seeds = fork(generator, self.tangents)
        options: dict[str, Any] = {"exact_output": True, "ends": self._ends, "still_ends": self.feedback}
        who = "" if self.feedback else type(self).__name__
        found = perturbed_pass(objective, Activity(), self.law, seeds, generator.device, who=who, **options)
        gradients: dict[str, Tensor | None] = dict.fromkeys(objective.parameters)
        with torch.autocast(found.loss.device.type, enabled=False):
            error, moved = output_of(found, type(self).__name__)
            _labelled(found)
            learn = self._teach if self.feedback else self._score
            d = [learn(gradients, found, index, state, generator) for index in range(len(found.ended))]
            entered, rows = found.entered_in(len(found.ended)), (error * moved).sum(2)
            beyond = found.beyond(rows) if found.reading.beyond else None
            if self.feedback:
                self._deeper.teach(gradients, found, entered, error, moved, state, beyond)
            else:
                self._add(gradients, found, entered, rows, beyond)
            add_exact(gradients, found)
        d.append((error * moved).sum((1, 2)))
        return Estimate(found.loss, torch.stack(d).sum(0), self.tangents + 1), gradients

    def _ends(self, point: ActivityUse) -> bool:
        """Whether a block ends at a place: it has to have numbers of each example."""
        names = [name.removeprefix("model.") for name in point.names]
        named = self.ends is None or any(fnmatchcase(name, pattern) for name in names for pattern in self.ends)
        return named and point.place.rows is not None

    @property
    def _features(self) -> Features:
        return Features(self.head, self.cells)

    @property
    def _deeper(self) -> LearnedFeedback:
        return LearnedFeedback(tangents=self.tangents, law=self.law)

    def _head(self, found: Pass, index: int, features: Tensor, state: dict[str, Tensor]) -> tuple[Head, Tensor]:
        part = _labelled(found)
        head = Head.kept(state, index, part.output.classes, features)
        return head, head.error(features, part)

    def _score(
        self, gradients: dict[str, Tensor | None], found: Pass, index: int, state: dict[str, Tensor], generator: Generator
    ) -> Tensor:
        """A block's gradient from the directional derivatives of its loss, which are returned; its classifier learns on the way."""
        end, values, moves = found.ended[index]
        assert moves is not None
        values, moves = _in_front(values, end, found.count), _in_front(moves, end, found.count, lead=1)
        features, moved = self._features.of(values), self._features.of(moves, lead=2)
        head, error = self._head(found, index, features, state)
        d = (1 - self.similarity) * (error * (moved @ head.weight.T)).flatten(2).sum(2)
        if self.similarity:
            d = d + self.similarity * (similarity_error(values, _labelled(found).output.call["target"]) * moves).flatten(2).sum(2)
        head.learn(features, error, self.head_rate)
        self._add(gradients, found, found.entered_in(index), d)
        return d.sum(1)

    def _add(
        self, gradients: dict[str, Tensor | None], found: Pass, entered: list[Entered], d: Tensor, beyond: Tensor | None = None
    ) -> None:
        for place in entered:
            add(gradients, place.gradient(found.share(d, place, beyond) / self.tangents))

    def _teach(
        self, gradients: dict[str, Tensor | None], found: Pass, index: int, state: dict[str, Tensor], generator: Generator
    ) -> Tensor:
        """A block's gradient from the error that its feedback sends back; the feedback and the classifier learn on the way."""
        end, values, moves = found.ended[index]
        values = _in_front(values, end, found.count)
        features = self._features.of(values)
        head, error = self._head(found, index, features, state)
        sent = head.sent_back((1 - self.similarity) * error, self.law, generator)
        back = self._features.back(sent, values)
        if self.similarity:
            back = back + self.similarity * similarity_error(values, _labelled(found).output.call["target"])
        add(gradients, end.from_error(_put_back(back, end)))
        d = back.new_zeros(self.tangents)
        if (deeper := [place for place in found.entered_in(index) if place is not end]) and moves is not None:
            moves = _in_front(moves, end, found.count, lead=1)
            moved = self._features.of(moves, lead=2) @ head.weight.T
            d = (moves * back).flatten(1).sum(1)
            self._deeper.teach(gradients, found, deeper, error.flatten(1), moved.flatten(2), state)
        head.learn(features, error, self.head_rate)
        return d


def _labelled(found: Pass) -> Scaled:
    """The part of the loss that is a cross-entropy with one class index an example; ValueError where there is none, or several."""
    labelled = [part for part in found.parts if part.output.classifies(found.count)]
    if len(labelled) != 1:
        raise ValueError(
            f"LocalLosses needs one F.cross_entropy with one class index an example in the loss, and finds {len(labelled)}: "
            "the classifiers of its blocks learn those classes"
        )
    return labelled[0]


def _in_front(t: Tensor, end: ActivityUse, count: int, lead: int = 0) -> Tensor:
    """What lies at the end of a block with examples as its first dimension."""
    rows = end.place.rows
    if rows is None or end.shape[rows.dim] == count:
        return t.movedim(lead + (0 if rows is None else rows.dim), lead)
    return rows.gather(t, count, lead)


def _put_back(t: Tensor, end: ActivityUse) -> Tensor:
    rows = end.place.rows
    if rows is None or end.shape[rows.dim] == len(t):
        return t.movedim(0, 0 if rows is None else rows.dim)
    return rows.scatter(t, end.shape)
