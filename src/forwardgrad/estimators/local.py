"""Local losses: every block of the model learns from a small classifier of its own, so that errors never travel far."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from forwardgrad.derivative import Objective
from forwardgrad.estimators.base import Estimate, Estimator, check_count, check_number, needed
from forwardgrad.estimators.feedback import output_of
from forwardgrad.estimators.forward import add, add_exact
from forwardgrad.perturbations.activity import Activity, Point
from forwardgrad.perturbations.outputs import Output, spread
from forwardgrad.perturbations.passes import Pass, perturbed_pass
from forwardgrad.tangents import Law, Rademacher, fork


@dataclass(frozen=True)
class LocalLosses(Estimator):
    """Greedy learning block by block: each block ends in a linear classifier of its own, and nothing it does is seen by later losses.

    Formula: behind block l stands y_l = R_l φ(h_l) with the block's activities h_l; its loss f_l = (1 − s)·f(y_l) + s·‖S(h_l) − S(t)‖²/N²,
    with f the model's own loss and targets t. Activities in the block move by u, ẏ_l and ḣ_l follow from one forward pass, and
    ĝ_W = Σ_b d_b u_b x_bᵀ with d_b = e_l·ẏ_l of example b (plus its part of the similarity term, in closed form). One pass serves all
    blocks, as each block's tangent ends with it. The classifiers learn by their exact gradient, R_l ← R_l − rate·Σ e φᵀ/(1 + mean‖φ‖²); the
    model's last layer by its own, e xᵀ.
    S(h) are the cosines between the centred activities of all pairs of examples, S(t) says which pairs share their target.

    Bias: for ∇f_l of each block, none; for the gradient of the model's loss, all that the greedy split leaves out.
    Variance: (q ± 1)‖δ‖² an example with q the units of one block, not of the whole model.
    Cost: K + 1 forward passes for K tangents, and the classifiers: C φ products an example and block.
    Limits: those of `LearnedFeedback`; blocks follow one another (what skips a block is not seen by its loss).

    Args:
        ends: patterns of names of weights; the places behind those layers end a block. None: every layer with a rule is a block.
        head: what φ is: "flatten" (all units), "pooled" (mean over positions), "positions" (a classifier at every position, its loss the
            mean over them; for convolutions).
        similarity: weight s in [0, 1) of the similarity-matching term.
        head_rate: above 0 and below 2: step of the classifiers, relative to the largest that is stable.
        tangents: K ≥ 1 moves of every activity a step.
        law: where moves are drawn from.

    Raises ValueError where an argument is outside its limits, no generator or state was given, the loss is not F.cross_entropy of the
    model's output with class indices, or the state belongs to another model.

    Source: Ren et al., "Scaling forward gradient with local losses" (2023), sections 4.1 and 4.2; Nøkland and Eidnes (2019), eqs. 1 to 3.

    >>> LocalLosses(similarity=0.5).unbiased
    False
    """

    name: ClassVar[str] = "local"

    ends: tuple[str, ...] | None = None
    head: Literal["flatten", "pooled", "positions"] = "flatten"
    similarity: float = 0.0
    head_rate: float = 0.5
    tangents: int = 1
    law: Law = Rademacher()

    def __post_init__(self) -> None:
        if self.ends is not None:
            if not isinstance(self.ends, (tuple, list)) or not all(isinstance(pattern, str) for pattern in self.ends):
                raise ValueError(f"ends must be names of weights, such as ('0.weight', '4.weight'), not {self.ends!r}")
            object.__setattr__(self, "ends", tuple(self.ends))
        if self.head not in ("flatten", "pooled", "positions"):
            raise ValueError(f"head must be one of flatten, pooled, positions, not {self.head!r}")
        check_number("similarity", self.similarity, 0, 1, closed=True)
        check_number("head_rate", self.head_rate, 0, 2)
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
        found = perturbed_pass(objective, Activity(), self.law, seeds, generator.device, exact_output=True, ends=self._ends)
        gradients: dict[str, Tensor | None] = dict.fromkeys(objective.parameters)
        with torch.autocast(found.loss.device.type, enabled=False):
            error, moved = output_of(found, type(self).__name__)
            rows = [self._block(found, index, state, generator) for index in range(len(found.ended))]
            rows.append((error * moved).sum(2))
            for entered, block in zip(found.entered, found.blocks, strict=True):
                if entered not in found.exact:
                    d = rows[block]
                    d = d.sum(1, keepdim=True).expand(-1, entered.rows) if found.coupled else spread(d, entered.rows)
                    add(gradients, entered.gradient(d / self.tangents))
            add_exact(gradients, found)
        return Estimate(found.loss, torch.stack([d.sum(1) for d in rows]).sum(0), self.tangents + 1), gradients

    def _ends(self, point: Point) -> bool:
        names = [name.removeprefix("model.") for name in point.names]
        return self.ends is None or any(fnmatchcase(name, pattern) for name in names for pattern in self.ends)

    def _block(self, found: Pass, index: int, state: dict[str, Tensor], generator: Generator) -> Float[Tensor, "k n"]:
        """Derivatives of one block's loss, example by example; its classifier learns on the way."""
        values, moves = found.ended[index]
        features, moved = self._features(values), self._features(moves, lead=2)
        weight, bias = self._head(state, index, features, found, generator)
        logits = features @ weight.T + bias
        assert found.known is not None
        error = Output(self._call(found.known, logits), found.known.formula).error(logits.flatten(0, -2))
        error = error.reshape(logits.shape)
        d = (1 - self.similarity) * (error * (moved @ weight.T)).flatten(2).sum(2)
        if self.similarity:
            target = found.known.call["target"]
            d = d + self.similarity * similarity_derivatives(values, moves, target)
        self._learn(weight, bias, features, error)
        return d

    def _features(self, h: Tensor, lead: int = 1) -> Tensor:
        """φ: [..., examples, positions, features], one position unless the classifier stands at each."""
        if h.dim() - lead < 2 or self.head == "flatten":
            return h.flatten(lead).unsqueeze(lead)
        places = h.flatten(lead + 1).transpose(lead, lead + 1)
        return places if self.head == "positions" else places.mean(lead, keepdim=True)

    def _head(self, state: dict[str, Tensor], index: int, features: Tensor, found: Pass, generator: Generator) -> tuple[Tensor, Tensor]:
        assert found.output is not None
        classes, width = found.output.shape[1], features.shape[-1]
        key = f"head.{index}.weight"
        if key not in state:
            made = torch.empty(classes, width, dtype=features.dtype, device=generator.device).normal_(generator=generator) / width**0.5
            state[key], state[f"head.{index}.bias"] = made.to(features.device), features.new_zeros(classes)
        if state[key].shape != (classes, width):
            raise ValueError(
                f"the state holds a classifier of {tuple(state[key].shape)} for block {index}, but this model needs {(classes, width)}: "
                "use one state for one model"
            )
        return state[key], state[f"head.{index}.bias"]

    def _call(self, known: Output, logits: Tensor) -> dict[str, object]:
        """The model's own loss, with a target for every position."""
        target = known.call["target"]
        if known.formula.__name__ != "_cross_entropy" or target.is_floating_point() or target.dim() != 1:
            raise ValueError("LocalLosses needs F.cross_entropy with one class index an example: its classifiers learn those classes")
        return {**known.call, "target": target.repeat_interleave(logits.shape[1])}

    def _learn(self, weight: Tensor, bias: Tensor, features: Tensor, error: Tensor) -> None:
        f, e = features.flatten(0, 1), error.flatten(0, 1)
        step = self.head_rate / (1 + f.square().sum(1).mean())
        weight.sub_(step * (e.T @ f))
        bias.sub_(step * e.sum(0))


def similarity_derivatives(values: Float[Tensor, "n ..."], moves: Float[Tensor, "k n ..."], target: Tensor) -> Float[Tensor, "k n"]:
    """Each example's part of the derivative of ‖S(h) − S(t)‖²/N²: (4/N²) ẋ_b · Σ_c (S − S(t))_bc x_c with x the centred unit vectors."""
    h, moved = values.flatten(1), moves.flatten(2)
    centred, moved = h - h.mean(1, keepdim=True), moved - moved.mean(2, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True).clamp(min=1e-12)
    x = centred / norm
    along = (moved - x * (moved * x).sum(2, keepdim=True)) / norm
    residual = x @ x.T - (target.unsqueeze(0) == target.unsqueeze(1)).to(x.dtype)
    parts: Tensor = (along * (4 / len(h) ** 2 * (residual @ x))).sum(2)
    return parts
