"""`ForwardGradient`: the forward gradient of Baydin et al., with a choice of what moves and of how tangents are combined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from forwardgrad.calls import Pass, check_uses, perturbed_pass
from forwardgrad.directions import Directions, Gaussian, Law, PartOfSeeds, fork
from forwardgrad.estimators.assembly import add, add_exact, add_parts, exact_parts_of, parts_of
from forwardgrad.estimators.base import UNLOGGABLE, UNREPLAYABLE, Estimate, Estimator, check_count, check_number, needed
from forwardgrad.estimators.subspace import counted, kept_seeds, period_of
from forwardgrad.factored import Gradient
from forwardgrad.forward_mode import directional_derivatives
from forwardgrad.objective import Objective
from forwardgrad.perturbations import Activity, Cheapest, Dense, DenseUse, LowRank, Perturbation, Sown, SplitWeights
from forwardgrad.ranks import ALONE, share_of
from forwardgrad.recipe import Measured, MovedPlace, Recipe, places_of

_WEIGHTS = Dense()


@dataclass(frozen=True)
class ForwardGradient(Estimator):
    """The forward gradient: directional derivatives along random tangents, times the tangents.

    Formula: ĝ = (1/K) Σₖ clip(dₖ) vₖ with dₖ = ∇f·vₖ from one forward pass, vₖ independent with mean 0 and covariance I over all
    parameters, and clip(d) = min(max(d, −c), c) where a clip c is given. `perturb` says what vₖ moves: whole weights (the paper's
    estimator), weights of low rank, weights or activities of every example on their own.

    Bias: none with combine="mean" and no clip, E[(∇f·v)v] = E[v vᵀ]∇f = ∇f. With a clip the direction stays right and the length
    shrinks: for Gaussian tangents over whole weights E[ĝ] = erf(c/(‖∇f‖√2))·∇f. With combine="projection", ĝ = V(VᵀV)⁻¹d is the point
    of the tangents' span that is closest to ∇f: about K/n of its length, in exchange for an error never larger than ‖∇f‖.
    Variance: E‖ĝ‖² = (1 + (m − 1)/K)‖∇f‖² where m is the law's second moment: n + 2 (Gaussian) or n (Rademacher, Sphere) over n weights;
    (n/K)‖∇f‖² with Orthogonal tangents, which give ∇f itself at K = n.
    The noise grows with the number of weights; that is what keeps the method from scaling, and what the other perturbations reduce.
    With a control variate b, ĝ = b + (1/K) Σₖ (dₖ − b·vₖ) vₖ, in which ‖∇f − b‖² stands for ‖∇f‖²: unbiased, as b does not depend on vₖ.
    (Antithetic pairs v, −v gain nothing here: (∇f·v)v is the same for both. They do where derivatives are differences: `ZerothOrder`.)
    Cost: K + 1 forward passes for K tangents at once; a loop over chunks pays one more primal pass for every chunk.

    Args:
        tangents: K ≥ 1, the number of directions averaged.
        law: where directions are drawn from.
        clip: bound c > 0 on each |dₖ| (of every example, where examples move on their own), in units of the loss; None for no bound.
        chunk_size: tangents evaluated at once, as in `torch.func.vmap`: None for all K (K copies of the parameters are held where whole
            weights move), 1 for a loop. The result is the same up to rounding. Orthogonal tangents are drawn and held all at once.
        perturb: what is perturbed: `Dense()`, `LowRank(rank, period)` (with a period the estimator needs `state`),
            `Informed(rank, keep, weighted)`, `SplitWeights(parts, inner)`, `PerExample()`, `Activity(masked)`, `Cheapest(overrides)` or
            `Sparse(fraction)`, which is biased.
        combine: "mean", or "projection" (weights shared by the batch only: Dense or LowRank; K at most the number of weights).
        exact_output: give the last layers their exact gradient, (softmax − onehot)ᵀ x for the cross-entropy: it needs no reverse pass. For
            Activity and Cheapest, where the error at the model's output is known (see docs/models.md).
        control_variate: β in [0, 1): use the moving average m ← β m + (1 − β) ĝ of earlier estimates as b. For Dense, LowRank and
            PerExample; the estimator then needs `state`. None for no control variate.

    Raises ValueError where an argument is outside its limits, arguments exclude one another, no generator was given, or there are fewer
    weights than Orthogonal tangents; RuntimeError where the loss writes to a parameter in place and every evaluation would change it
    again. A write that is done once (clipping, normalising) has no derivative, as in backpropagation.

    Source: Baydin et al., "Gradients without Backpropagation" (2022), Definition 1; the clip is that of the paper re-examining it,
    section III; the projection is that of Flügel et al. (2025).

    >>> ForwardGradient(tangents=4, clip=1.0).unbiased
    False
    """

    name: ClassVar[str] = "forward"

    tangents: int = 1
    law: Law = Gaussian()
    clip: float | None = None
    chunk_size: int | None = None
    perturb: Perturbation = _WEIGHTS
    combine: Literal["mean", "projection"] = "mean"
    exact_output: bool = False
    control_variate: float | None = None

    def __post_init__(self) -> None:
        check_count("tangents", self.tangents)
        if self.chunk_size is not None:
            check_count("chunk_size", self.chunk_size)
        if not isinstance(self.law, Law):
            raise ValueError(f"law must be a law of directions such as Gaussian(), not {self.law!r}")
        if not isinstance(self.perturb, Perturbation):
            raise ValueError(f"perturb must be a perturbation such as Dense() or Activity(), not {self.perturb!r}")
        self.perturb.check(self.law)
        if self.tangents < self.perturb.least:
            raise ValueError(
                f"perturb={self.perturb!r} needs tangents={self.perturb.least} or more, one for each part, not {self.tangents}"
            )
        if self.clip is not None:
            check_number("clip", self.clip, 0)
        if self.combine not in ("mean", "projection"):
            raise ValueError(f"combine must be 'mean' or 'projection', not {self.combine!r}")
        if self.combine == "projection" and self.perturb.name not in ("dense", "low-rank"):
            raise ValueError(f"combine='projection' goes with perturb=Dense() or LowRank(), not {self.perturb!r}")
        if self.combine == "projection" and (self.clip, self.chunk_size, self.control_variate) != (None, None, None):
            raise ValueError("combine='projection' takes no clip, chunk_size or control_variate: it weighs all tangents together")
        if not isinstance(self.exact_output, bool) or (self.exact_output and not isinstance(self.perturb, (Activity, Cheapest))):
            raise ValueError("exact_output=True goes with perturb=Activity() or Cheapest()")
        if self.control_variate is not None:
            check_number("control_variate", self.control_variate, 0, 1, closed=True)
            if not self.perturb.weights:
                raise ValueError(
                    "control_variate predicts weights' gradients: use perturb=Dense(), LowRank() or PerExample(), or LearnedFeedback"
                )

    @property
    def unbiased(self) -> bool:
        return self.clip is None and self.combine == "mean" and self.perturb.unbiased

    @property
    def stateful(self) -> bool:
        return self.control_variate is not None or period_of(self.perturb) > 1

    @property
    def told_by_numbers(self) -> bool:
        inner = self.perturb.inner if isinstance(self.perturb, SplitWeights) else self.perturb
        return type(inner) is LowRank or isinstance(inner, Dense)

    def check_divided(self, parts: int) -> None:
        super().check_divided(parts)
        if parts > 1 and isinstance(self.perturb, SplitWeights):
            raise ValueError(f"ranks cannot divide the directions of {self.perturb!r}, each of which moves other layers: take directions=1")
        share_of(self.tangents, parts)

    def learned_apart(self, state: Mapping[str, Tensor]) -> list[str]:
        return [name for name in state if name.startswith("average.")]

    def variance(self, gradient: Mapping[str, Tensor]) -> float | None:
        if not self.unbiased or self.control_variate is not None:
            return None
        return self.perturb.variance(self.law, gradient, self.tangents)

    def estimate(
        self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]
    ) -> tuple[Estimate, dict[str, Tensor | None]]:
        predicted = self._predicted(objective, state)
        gradients: dict[str, Tensor | None] = dict.fromkeys(objective.parameters)
        derivatives: list[Tensor] = []
        for found in self._passes(objective, needed(generator), state):
            uses = _uses(found)
            predicted = {name: b for name, b in predicted.items() if uses[name]}  # nothing else takes back what it adds
            with torch.autocast(found.loss.device.type, enabled=False):  # the sum belongs to the gradient, not to the user's forward pass
                add_parts(gradients, found, self.weights_of(found, predicted))
                if not derivatives:  # every pass knows the same exact gradient
                    add_exact(gradients, found)
            derivatives.append(found.derivatives)
        if predicted:
            add(gradients, {name: m.clone() for name, m in predicted.items()})
            self._remember(state, gradients)
        return self._record(objective, found.loss, derivatives), gradients

    def parts(
        self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]
    ) -> tuple[Estimate, Iterator[tuple[str, Gradient]]]:
        if self.control_variate is not None or (self.chunk_size or self.tangents) < self.tangents:  # what comes later needs all of it
            return super().parts(objective, generator, state)
        (found,) = self._passes(objective, needed(generator), state)
        return self._record(objective, found.loss, [found.derivatives]), self._parts_of(found)

    @property
    def replayable(self) -> bool:
        return self.loggable and not isinstance(self.perturb, Dense)  # directions of Dense alone follow one another

    @property
    def loggable(self) -> bool:
        inner = self.perturb.inner if isinstance(self.perturb, SplitWeights) else self.perturb
        known = type(inner) is LowRank or isinstance(inner, Dense)
        return known and self.control_variate is None and period_of(inner) == 1

    def measured(self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]) -> tuple[Estimate, Measured]:
        if not self.loggable:
            raise ValueError(UNLOGGABLE.format(self))
        passes, weights, derivatives = list[tuple[int, tuple[MovedPlace, ...]]](), list[Tensor](), list[Tensor]()
        for found in self._passes(objective, needed(generator), state):
            with torch.autocast(found.loss.device.type, enabled=False):
                each = self.weights_of(found, {})  # the same for all that moved, as examples share it
            weights.append(each[0].sum(1))
            if not isinstance(self.perturb, Dense):
                passes.append((len(each[0]), tuple(place for entered in found.entered for place in places_of(entered))))
            derivatives.append(found.derivatives)
        return self._record(objective, found.loss, derivatives), Measured(tuple(passes), torch.cat(weights))

    def _record(self, objective: Objective, loss: Tensor, derivatives: list[Tensor]) -> Estimate:
        evaluated = objective.ranks.share(self.tangents) if self.told_by_numbers else self.tangents
        return Estimate(loss, torch.cat(derivatives), evaluated + len(derivatives))

    def weigh(self, derivatives: Tensor) -> Tensor:
        if not self.loggable or self.combine != "mean":
            raise ValueError(f"what directions of {self!r} are multiplied by does not follow from the derivatives alone")
        return self._averaged(derivatives)

    def again(self, parameters: Mapping[str, Tensor], found: Measured, generator: Generator) -> Iterator[tuple[str, Gradient]]:
        whole = isinstance(self.perturb, Dense)
        parts = self._drawn_again(parameters, found, generator) if whole else self.sown(parameters, found, generator).parts(parameters)
        if (self.chunk_size or self.tangents) >= self.tangents:
            yield from parts
            return
        gradients: dict[str, Tensor | None] = {}  # as in `parts`
        for name, part in parts:
            add(gradients, {name: part})
        yield from ((name, gradient) for name, gradient in gradients.items() if gradient is not None)

    def _drawn_again(self, parameters: Mapping[str, Tensor], found: Measured, generator: Generator) -> Iterator[tuple[str, Gradient]]:
        """Parts of whole weights, whose directions follow one another."""
        size = self.chunk_size or self.tangents
        chunks = self.law.chunks(parameters, self.tangents, size, generator)
        for tangents, weights in zip(chunks, found.weights.split(size), strict=True):
            uses = [DenseUse(name, self._moving(v, parameters[name])) for name, v in tangents.items()]
            for use in uses:
                yield from use.gradient(weights.unsqueeze(1)).items()

    def sown(self, parameters: Mapping[str, Tensor], found: Measured, generator: Generator) -> Recipe:
        if not self.replayable:
            raise ValueError(UNREPLAYABLE.format(self))
        return found.sown(self.law, generator.device, [fork(generator, count) for count, _ in found.passes])

    def _moving(self, directions: Tensor, parameter: Tensor) -> Tensor:
        """Directions of a parameter that moves as a whole, without what stands still."""
        assert isinstance(self.perturb, Dense)
        return directions if self.perturb.unbiased else self.perturb.masked_(directions, parameter)

    def _parts_of(self, found: Pass) -> Iterator[tuple[str, Gradient]]:
        with torch.autocast(found.loss.device.type, enabled=False):
            yield from parts_of(found, self.weights_of(found, {}))
            yield from exact_parts_of(found)

    def _passes(self, objective: Objective, generator: Generator, state: dict[str, Tensor]) -> Iterator[Pass]:
        """One pass a chunk of tangents; the last one leaves its buffers and random state behind.

        Where several processes divide the directions, a pass is that of all of them: each evaluates its own part.
        """
        ranks = objective.ranks if self.told_by_numbers else ALONE
        self.check_divided(ranks.directions)
        size = min(self.chunk_size or self.tangents, ranks.share(self.tangents)) * ranks.directions
        counts = [min(size, self.tangents - start) for start in range(0, self.tangents, size)]
        if isinstance(self.perturb, Dense):
            check_uses(objective, below=False)
            for index, tangents in enumerate(self.law.chunks(objective.parameters, self.tangents, size, generator), 1):
                tangents = {name: self._moving(v, objective.parameters[name]) for name, v in tangents.items()}
                mine = ranks.part(count := counts[index - 1])
                own = tangents if len(mine) == count else {name: v[mine.start : mine.stop] for name, v in tangents.items()}
                loss, d = ranks.together(*directional_derivatives(objective, own, commit=index == len(counts)))
                yield Pass(loss, d, [DenseUse(name, v) for name, v in tangents.items()])
            return
        with counted(state):
            kept = kept_seeds(self.perturb, self.tangents, generator, state)
            for index, count in enumerate(counts):
                seeds, last, mine = fork(generator, count), index == len(counts) - 1, ranks.part(count)
                options: dict[str, Any] = {"exact_output": self.exact_output, "commit": last, "who": f"perturb={self.perturb!r}"}
                options |= {"first": index * size + mine.start, "total": self.tangents}
                if kept is not None:
                    options["kept"] = PartOfSeeds(kept, range(index * size + mine.start, index * size + mine.stop))
                own_seeds = seeds if len(mine) == count else PartOfSeeds(seeds, mine)
                found = perturbed_pass(objective, self.perturb, self.law, own_seeds, generator.device, **options)
                loss, d = ranks.together(found.loss, found.derivatives)
                entered = found.entered
                if len(mine) < count:
                    of_all = None if kept is None else PartOfSeeds(kept, range(index * size, index * size + count))
                    entered = [one.along(Directions(self.law, seeds, generator.device, of_all)) for one in entered]
                yield replace(found, loss=loss, derivatives=d, entered=entered)

    def weights_of(self, found: Pass, predicted: dict[str, Tensor]) -> list[Tensor]:
        """What each direction of each example is multiplied by, place by place."""
        if self.combine == "projection":
            gram = torch.stack([entered.gram() for entered in found.entered]).sum(0).squeeze(2)
            solved = torch.linalg.pinv(gram.double(), hermitian=True) @ found.derivatives.double()
            return [solved.unsqueeze(1)] * len(found.entered)
        shares = {name: b / _uses(found)[name] for name, b in predicted.items()}  # a weight used twice moves twice: half of b for each
        inner = [(e, e.inner(shares)) for e in found.entered if isinstance(e, Sown)] if predicted else []
        weights = []
        for entered in found.entered:
            d = found.of(entered)
            for other, part in inner:
                d = d - found.shared_out(other, part, d.shape[1])
            weights.append(self._averaged(d))
        return weights

    def _averaged(self, d: Tensor) -> Tensor:
        d = d if self.clip is None else d.clamp(-self.clip, self.clip)
        return d if self.tangents == 1 else d / self.tangents

    def _predicted(self, objective: Objective, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.control_variate is None:
            return {}
        return {name: state.setdefault(f"average.{name}", torch.zeros_like(p)) for name, p in objective.parameters.items()}

    def _remember(self, state: dict[str, Tensor], gradients: dict[str, Tensor | None]) -> None:
        assert self.control_variate is not None
        for name, gradient in gradients.items():
            if gradient is not None:
                state[f"average.{name}"].lerp_(gradient, 1 - self.control_variate)


def _uses(found: Pass) -> Counter[str]:
    """How often each weight moved itself."""
    return Counter(name for entered in found.entered if isinstance(entered, Sown) for name in entered.names)
