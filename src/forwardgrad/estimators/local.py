"""`LocalLosses`: every block of the model learns from a small classifier of its own, so no error travels through other blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Generator, Tensor

from forwardgrad.calls import AtEnd, Pass, Scaled, perturbed_pass
from forwardgrad.directions import Law, Rademacher, fork
from forwardgrad.estimators.assembly import add, add_exact
from forwardgrad.estimators.base import Estimate, Estimator, Move, check_count, check_number, needed
from forwardgrad.estimators.feedback import LearnedFeedback, check_error, output_of
from forwardgrad.estimators.heads import SIGHTS, Features, Head, Labels, Sight
from forwardgrad.objective import Objective
from forwardgrad.perturbations import Activity, ActivityUse, Block, Entered
from forwardgrad.ranks import ALONE, Ranks


@dataclass(frozen=True)
class LocalLosses(Estimator):
    """Local losses: a linear classifier of its own stands behind every block of layers, and the block is trained by that loss alone.

    Formula: behind block l stands y_l = R_l φ(h_l) + b_l with the block's activities h_l, its loss (1 − s)·f(y_l) + s·‖S(φ) − S(t)‖²/N²
    with f the model's own loss and targets t, and e_l = ∂f/∂y_l in closed form. S(φ) are the cosines between the centred φ(h_l) of all
    pairs of examples, S(t) those of their targets: 1 for the same class and −1/(C − 1) for two of C classes.
    - feedback=False: activities in the block move by u, ẏ_l = R_l φ(ḣ_l) follows from one forward pass, and ĝ_W = Σ_b d_b u_b x_bᵀ with
      d_b = e_l·ẏ_l of example b (plus its part of the similarity term). One pass serves all blocks, as a block's tangent ends with it.
    - feedback=True: the error at h_l is φᵀ(e_l B_l), and goes into the products with the layer's own input. B_l learns R_l from how y_l
      follows moves of single units of φ, one in four a step in turn: exact and without random numbers, so B_l is R_l as it was in the
      last four steps, and no weight is ever transposed. Where a block has more than one layer, the others move, and learn feedback from
      ẏ_l as `LearnedFeedback` does (the similarity term moves the last one alone).
    A block ends behind its last layer, with the batch normalisation, the residual sum, the ReLU and the max-pooling that follow it there,
    in this order: their derivative is known in closed form, and gains and biases of the norm learn with the layer. A ReLU or pooling in
    front of a norm, and any other function, ends the block ahead of it. A norm in training has the whole batch in every example's error.
    One step of Adam for every classifier follows, along its exact gradient; the model's last layer learns by its own, e xᵀ.

    Where every position has a target of its own, as each token of a language model, a classifier stands at every position and learns the
    target there; ignored positions have no part. Layers ahead of a block's last one then learn feedback from the moves of the block's end,
    one matrix for all positions: the error of a position goes to the same position. What attention carries to other positions is left out.

    Bias: for the gradient of the model's loss, all that the greedy split leaves out. For ∇f_l of each block: none with feedback=False;
    with feedback=True e (B_l − R_l), which is what R_l moved in the last four steps, and in deeper blocks that of `LearnedFeedback`.
    Variance: (q ± 1)‖δ‖² an example with q the units of one block, not of the whole model; with feedback and one layer a block, none.
    Cost: K + 1 forward passes for K tangents (with feedback and one layer a block nothing moves in the model, and the tangent pass is
    free: one), and the classifiers: C φ products an example (or position) and block, with `classes` for C where they are fewer.
    With feedback and one layer a block a `TrainingStep` lets each block learn and move as soon as it has ended, from the second step on
    a path through the model: it holds the activities of one block at any depth, and no gradient. That needs torch's SGD, Adam or AdamW,
    labels that are a tensor of the batch with the examples first, a factor of the loss that is the same Python number at every step, and
    parameters that are used once. The step is the same, to the bit. Where the loss or the path turns out to be another than in the step
    before, one warning says so, and later blocks wait for the loss. A step that ends in an error leaves those blocks moved that had
    learned. Blocks of several layers wait for the loss in any case, with what their layers were given. Then they learn and move one after
    the other, so no more than the gradient of one block is held.
    Limits: those of `LearnedFeedback`; blocks follow one another (what skips a block is not seen by its loss).

    Args:
        ends: patterns of names of weights; the places behind those layers end a block. None: every layer with a rule and with numbers of
            its own for every example is a block.
        feedback: whether errors come back through learned feedback, or the directional derivative alone.
        head: what φ is: "flatten" (all units), "pooled" (means over a grid of cells), "positions" (a classifier at every position, its loss
            the mean over them). Where every position has a target of its own it is always "positions".
        cells: of "pooled", along each dimension: 1 for the mean over all positions.
        similarity: weight s in [0, 1) of the similarity-matching term.
        head_rate: above 0, the learning rate of the classifiers.
        tangents: K ≥ 1 moves of every activity a step.
        law: where moves are drawn from.
        classes: the most classes that the classifiers of blocks tell apart; None: all of the loss. Where the loss has more, as a language
            model has words, each stands for as many words as the others, which a fixed hash shares out; the read-out has all words. Memory
            and time of classifiers then do not grow with the vocabulary. A few hundred are a good beginning: see docs/choosing.md.

    Raises ValueError where an argument is outside its limits, no generator or state was given, a pattern of `ends` names nothing that is
    trained, the loss does not hold one F.cross_entropy with a class index for each example or each of its positions (scaled, or beside
    other terms), a block has other positions than the targets, or the state belongs to another model.

    Source: Ren et al., "Scaling forward gradient with local losses" (2023), sections 4.1 and 4.2; Nøkland and Eidnes (2019), eqs. 1 to 3;
    Medini et al., "Extreme classification in log memory" (2019), for classes that stand for many; the learned feedback is this project's.

    >>> LocalLosses(similarity=0.5).unbiased
    False
    """

    name: ClassVar[str] = "local"
    _own_loss: ClassVar[bool] = True  # whether the loss is that of these layers, so that the last of them learns by it
    _all_here: ClassVar[bool] = True  # whether these layers are all that `ends` may name

    ends: tuple[str, ...] | None = None
    feedback: bool = False
    head: Sight = "flatten"
    cells: int = 1
    similarity: float = 0.0
    head_rate: float = 1e-3
    tangents: int = 1
    law: Law = Rademacher()
    classes: int | None = None

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
        if self.classes is not None:
            check_count("classes", self.classes)
            if self.classes < 2:
                raise ValueError(f"classes must be at least 2, so that classifiers have something to tell apart, not {self.classes}")

    @property
    def unbiased(self) -> bool:
        return False

    @property
    def stateful(self) -> bool:
        return True

    def learned_apart(self, state: Mapping[str, Tensor]) -> list[str]:
        return self._feedback.learned_apart(state)  # classifiers learn from the examples of all processes

    @property
    def layerwise(self) -> bool:
        return self.feedback

    def estimate(
        self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]
    ) -> tuple[Estimate, dict[str, Tensor | None]]:
        gradients: dict[str, Tensor | None] = dict.fromkeys(objective.parameters)
        return self._whole(objective, generator, state, gradients, None, None), gradients

    def learn(self, objective: Objective, generator: Generator | None, state: dict[str, Tensor], move: Move) -> Estimate:
        if not self.feedback:
            return super().learn(objective, generator, state, move)

        def at_end(index: int, point: ActivityUse, values: Tensor, part: Scaled) -> None:
            with torch.autocast(values.device.type, enabled=False):
                self._teach(move, index, point, values, Labels.to_come(part), state)

        gradients: dict[str, Tensor | None] = {}
        record = self._whole(objective, generator, state, gradients, at_end, move)
        move({name: gradient for name, gradient in gradients.items() if gradient is not None})
        return record

    def _whole(
        self,
        objective: Objective,
        generator: Generator | None,
        state: dict[str, Tensor],
        gradients: dict[str, Tensor | None],
        at_end: AtEnd | None,
        move: Move | None,
    ) -> Estimate:
        """One pass. What did not learn on the way does so at its end, the last block first: what the blocks ahead of it were given is
        gone by the time that the first one, which may begin with an embedding, asks for the most."""
        generator = needed(generator)
        if self._all_here:
            self._check_ends(objective)
        seeds = fork(generator, self.tangents)
        options: dict[str, Any] = {"exact_output": self._own_loss, "ends": _Ends(self.ends), "still_ends": self.feedback, "at_end": at_end}
        who = "" if self.feedback else "LocalLosses"
        found = perturbed_pass(objective, Block(), self.law, seeds, generator.device, who=who, **options)
        with torch.autocast(found.loss.device.type, enabled=False):
            error, moved = output_of(found, "LocalLosses")
            if self._own_loss:
                check_error(found, "LocalLosses")
            late, d = range(found.learned, len(found.ended)), list[Tensor]()
            if late or not found.learned:
                labels = _labelled(found)  # though there may be no block
                for index in reversed(late):
                    d.insert(0, self._block(gradients, found, index, labels, state, objective.ranks))
                    if move is not None:
                        move(_finished(gradients, found, index))
                self._follow(gradients, found, error, moved, objective, state)  # what stands behind the last block
            add_exact(gradients, found)
        none = found.loss.new_zeros(self.tangents)
        d.append((error * moved).sum((1, 2)) if len(moved) else none)
        return Estimate(found.loss, torch.stack(d).sum(0), self.tangents + 1)

    def _check_ends(self, objective: Objective) -> None:
        names = [name.removeprefix("model.") for name in objective.parameters]
        for pattern in self.ends or ():
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"ends: {pattern!r} names nothing that is trained, so no block would end there. Choose from the names of weights, such "
                    f"as {', '.join(map(repr, names[:3]))}"
                )

    def _follow(
        self,
        gradients: dict[str, Tensor | None],
        found: Pass,
        error: Tensor,
        moved: Tensor,
        objective: Objective,
        state: dict[str, Tensor],
    ) -> None:
        """The gradient of what stands behind the last block, by the model's own loss."""
        entered = found.entered_in(len(found.ended))
        if self.feedback:
            self._feedback.follow(gradients, found, entered, error, moved, objective, state)
            return
        rows = (error * moved).sum(2)
        self._add(gradients, found, entered, rows, found.beyond(rows) if found.reading.beyond else None)

    def _block(
        self, gradients: dict[str, Tensor | None], found: Pass, index: int, labels: Labels, state: dict[str, Tensor], ranks: Ranks
    ) -> Tensor:
        """The gradient of one block, whose directional derivatives are returned; its classifier learns on the way."""
        if not self.feedback:
            return self._score(gradients, found, index, labels, state, ranks)
        end, values, moves = found.ended[index]
        deeper = [place for place in found.entered_in(index) if place is not end]
        more = _Deeper(gradients, found, deeper, moves) if deeper else None
        return self._teach(lambda parts: add(gradients, parts), index, end, values, labels, state, more, ranks)

    @property
    def _feedback(self) -> LearnedFeedback:
        return LearnedFeedback(tangents=self.tangents, law=self.law)

    def _seen(
        self, index: int, end: ActivityUse, values: Tensor, labels: Labels, state: dict[str, Tensor], ranks: Ranks
    ) -> tuple[Features, Tensor, Head, Tensor, Tensor]:
        """The map φ and what it is of, the classifier of a block, what that sees, and the error of its own loss."""
        features = Features(self.head, self.cells, labels.tokens)
        self._check_tokens(end, labels)
        values = features.in_front(values, end, labels.count)
        seen = features.of(values)
        classes = labels.part.output.classes
        head = Head.kept(state, index, min(classes, self.classes or classes), seen, ranks)
        return features, values, head, seen, head.error(seen, labels)

    def _check_tokens(self, end: ActivityUse, labels: Labels) -> None:
        """ValueError where positions have targets of their own, and the block or an option does not go with that."""
        if not labels.tokens:
            return
        if self.head == "pooled" or self.similarity:
            option = 'head="pooled" takes means over positions' if self.head == "pooled" else "similarity compares whole examples"
            raise ValueError(f"{option}, but every position has a target of its own in this loss: leave that option out")
        name = end.names[0].removeprefix("model.")
        if end in labels.apart:
            raise ValueError(
                f"the positions of the block that ends with {name} lie in another order than the targets, so its classifier would learn "
                "those of other positions: give the loss scores and targets in the order that the model has them in, or let other blocks "
                "end (with `ends`)"
            )
        positions = end.shape.numel() // (labels.count * end.shape[end.channels])
        if positions != labels.positions:
            raise ValueError(
                f"the block that ends with {name} has {positions} positions an example, and the loss "
                f"{labels.positions} targets: let blocks end where there is one position a target (with `ends`), and ignore targets by "
                "ignore_index instead of cutting them off"
            )

    def _score(
        self, gradients: dict[str, Tensor | None], found: Pass, index: int, labels: Labels, state: dict[str, Tensor], ranks: Ranks
    ) -> Tensor:
        """A block's gradient from the directional derivatives of its loss, which are returned; its classifier learns on the way."""
        end, values, moves = found.ended[index]
        assert moves is not None
        features, values, head, seen, error = self._seen(index, end, values, labels, state, ranks)
        moves = features.in_front(moves, end, found.count, lead=1)
        moved = features.of(moves, lead=2)
        d = (1 - self.similarity) * (error * (moved @ head.weight.T)).flatten(2).sum(2)
        if self.similarity:
            d = d + self.similarity * (labels.pull(seen) * moved).flatten(2).sum(2)
        head.learn(seen, error, self.head_rate)
        self._add(gradients, found, found.entered_in(index), d)
        return d.sum(1)

    def _add(
        self, gradients: dict[str, Tensor | None], found: Pass, entered: list[Entered], d: Tensor, beyond: Tensor | None = None
    ) -> None:
        for place in entered:
            add(gradients, place.gradient(found.share(d, place, beyond) / self.tangents))

    def _teach(
        self,
        take: Move,
        index: int,
        end: ActivityUse,
        values: Tensor,
        labels: Labels,
        state: dict[str, Tensor],
        deeper: _Deeper | None = None,
        ranks: Ranks = ALONE,
    ) -> Tensor:
        """A block's gradient from the error that its feedback sends back; the feedback and the classifier learn on the way."""
        features, values, head, seen, error = self._seen(index, end, values, labels, state, ranks)
        sent = head.sent_back((1 - self.similarity) * error)
        back = features.back(sent + self.similarity * labels.pull(seen) if self.similarity else sent, values)
        d = back.new_zeros(self.tangents)
        if deeper is not None and deeper.moves is not None:
            moves = features.in_front(deeper.moves, end, labels.count, lead=1)
            d = (moves * back).flatten(1).sum(1)
            if labels.tokens:  # a position has fewer units than classes
                told = back.flatten(0, 1), moves.to(back.dtype).flatten(1, 2)
            else:
                told = error.flatten(1), (features.of(moves, lead=2) @ head.weight.T).flatten(2)
            self._feedback.teach(deeper.gradients, deeper.found, deeper.entered, *told, state, apart=labels.apart)
        last = [features.put_back(back, end)]
        del back  # as large as the block's output, and needed no more once it is masked
        take(end.from_error(last.pop()))
        end.kept.clear()  # what the layer was given is held no longer than until it has learned
        head.learn(seen, error, self.head_rate)
        return d


@dataclass(frozen=True)
class _Ends:
    """Whether a block ends at a place: it has to have numbers of each example."""

    patterns: tuple[str, ...] | None

    def __call__(self, point: ActivityUse) -> bool:
        names = [name.removeprefix("model.") for name in point.names]
        named = self.patterns is None or any(fnmatchcase(name, pattern) for name in names for pattern in self.patterns)
        return named and point.place.rows is not None


class LastBlocks(LocalLosses):
    """`LocalLosses` for the last layers of a model that begins elsewhere, where `ends` may name layers of the others."""

    _all_here: ClassVar[bool] = False

    @classmethod
    def of(cls, method: LocalLosses) -> Self:
        return cls(**{field.name: getattr(method, field.name) for field in fields(method)})


class BlocksAlone(LastBlocks):
    """`LocalLosses` for layers of a model that goes on elsewhere: the loss only tells labels, classes and options of the model's loss.

    Raises ValueError besides where something that is trained stands behind the last block, since it has no loss here.
    """

    _own_loss: ClassVar[bool] = False

    def _follow(
        self,
        gradients: dict[str, Tensor | None],
        found: Pass,
        error: Tensor,
        moved: Tensor,
        objective: Objective,
        state: dict[str, Tensor],
    ) -> None:
        names = [name.removeprefix("model.") for one in found.entered_in(len(found.ended)) for name in one.names]
        if names:
            raise ValueError(
                f"{', '.join(names)}: behind the last block of these layers, and trained by the loss of a block that ends elsewhere. "
                "Let them end with the end of a block"
            )


def _finished(gradients: dict[str, Tensor | None], found: Pass, index: int) -> dict[str, Tensor]:
    """The gradients that are whole once a block has learned, taken off the others: nothing ahead of it or behind the last uses these."""
    blocks = zip(found.entered, found.blocks, strict=True)
    used = {name for entered, number in blocks if number < index or number == len(found.ended) for name in entered.names}
    return {name: whole for name in list(gradients) if name not in used and (whole := gradients.pop(name)) is not None}


class _Deeper(NamedTuple):
    """What of a block lies ahead of its last layer, and how that end moved."""

    gradients: dict[str, Tensor | None]
    found: Pass
    entered: list[Entered]
    moves: Tensor | None


def _labelled(found: Pass) -> Labels:
    """What classifiers learn; ValueError where the loss has nothing for them, or several things."""
    labelled = Labels.of(found)
    if len(labelled) == 1:
        return labelled[0]
    if len(labelled) > 1:
        wrong, instead = f"and this loss has {len(labelled)} of them that its classifiers could learn", "keep one of them"
    elif not found.classified:
        wrong, instead = "and this loss has none", "let the loss end in it"
    elif not any(part.output.classifies for part in found.parts):
        wrong = "but this loss uses its result in another way than as a mean, a sum or a weighted mean over all examples"
        instead = 'take reduction="mean", or multiply reduction="none" by weights and add it up; ignore_index leaves examples out'
    else:
        wrong = "but the scores that it is given here do not have the examples of the batch along one dimension"
        instead = "call it once, on the scores of all examples, with the examples first"
    raise ValueError(
        f"LocalLosses needs an F.cross_entropy of class indices, one for each example or each of its positions, {wrong}: {instead}, or use "
        "LearnedFeedback(), which needs no classes"
    )
