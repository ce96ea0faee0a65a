"""`ForwardGradient`: the forward gradient of Baydin et al., with a choice of what moves and of how tangents are combined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from forwardgrad.calls import Pass, perturbed_pass
from forwardgrad.directions import Gaussian, Law, fork
from forwardgrad.estimators.assembly import add, add_exact, add_parts, exact_parts_of, parts_of
from forwardgrad.estimators.base import Estimate, Estimator, check_count, check_number, needed
from forwardgrad.factored import Gradient
from forwardgrad.forward_mode import directional_derivatives
from forwardgrad.objective import Objective
from forwardgrad.perturbations import Activity, Cheapest, Dense, DenseUse, Perturbation, Sown

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
        perturb: what is perturbed: `Dense()`, `LowRank(rank)`, `PerExample()`, `Activity(masked)` or `Cheapest(overrides)`.
        combine: "mean", or "projection" (weights shared by the batch only: Dense or LowRank; K at most the number of weights).
        exact_output: give the last layers their exact gradient, (softmax − onehot)ᵀ x for the cross-entropy: it needs no reverse pass. For
            Activity and Cheapest, where the error at the model's output is known (see docs/models.md).
        control_variate: β in [0, 1): use the moving average m ← β m + (1 − β) ĝ of earlier estimates as b. For Dense, LowRank and
            PerExample; the estimator then needs `state`. None for no control variate.

    Raises ValueError where an argument is outside its limits, arguments exclude one another, no generator was given, or there are fewer
    weights than Orthogonal tangents.

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
        return self.clip is None and self.combine == "mean"

    @property
    def stateful(self) -> bool:
        return self.control_variate is not None

    def variance(self, gradient: Mapping[str, Tensor]) -> float | None:
        if not (self.unbiased and isinstance(self.perturb, Dense) and self.control_variate is None):
            return None
        return self.law.second_moment(sum(g.numel() for g in gradient.values()), self.tangents) - 1

    def estimate(
        self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]
    ) -> tuple[Estimate, dict[str, Tensor | None]]:
        predicted = self._predicted(objective, state)
        gradients: dict[str, Tensor | None] = dict.fromkeys(objective.parameters)
        derivatives: list[Tensor] = []
        for found in self._passes(objective, needed(generator)):
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
        return Estimate(found.loss, torch.cat(derivatives), self.tangents + len(derivatives)), gradients

    def parts(
        self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]
    ) -> tuple[Estimate, Iterator[tuple[str, Gradient]]]:
        if self.control_variate is not None or (self.chunk_size or self.tangents) < self.tangents:  # what comes later needs all of it
            return super().parts(objective, generator, state)
        (found,) = self._passes(objective, needed(generator))
        return Estimate(found.loss, found.derivatives, self.tangents + 1), self._parts_of(found)

    def _parts_of(self, found: Pass) -> Iterator[tuple[str, Gradient]]:
        with torch.autocast(found.loss.device.type, enabled=False):
            yield from parts_of(found, self.weights_of(found, {}))
            yield from exact_parts_of(found)

    def _passes(self, objective: Objective, generator: Generator) -> Iterator[Pass]:
        """One pass a chunk of tangents; the last one leaves its buffers and random state behind."""
        size = self.chunk_size or self.tangents
        counts = [min(size, self.tangents - start) for start in range(0, self.tangents, size)]
        if isinstance(self.perturb, Dense):
            for index, tangents in enumerate(self.law.chunks(objective.parameters, self.tangents, size, generator), 1):
                loss, d = directional_derivatives(objective, tangents, commit=index == len(counts))
                yield Pass(loss, d, [DenseUse(name, v) for name, v in tangents.items()])
            return
        for index, count in enumerate(counts, 1):
            seeds, last = fork(generator, count), index == len(counts)
            options: dict[str, Any] = {"exact_output": self.exact_output, "commit": last, "who": f"perturb={self.perturb!r}"}
            yield perturbed_pass(objective, self.perturb, self.law, seeds, generator.device, **options)

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
