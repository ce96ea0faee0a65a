"""`ZerothOrder`: the loss at two points on a random line, and no derivative."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from forwardgrad.calls import Lines, Pass, Stencil, check_uses
from forwardgrad.directions import Gaussian, Law, fork
from forwardgrad.estimators.assembly import add, parts_of
from forwardgrad.estimators.base import UNLOGGABLE, UNREPLAYABLE, Estimate, Estimator, check_count, check_number, needed
from forwardgrad.estimators.moved import check_outputs, check_spacing
from forwardgrad.estimators.same_draws import SameDraws
from forwardgrad.estimators.subspace import counted, kept_seeds, period_of
from forwardgrad.estimators.whole_weights import WeightsInPlace, WholeWeights, seeds_of_weights
from forwardgrad.factored import Gradient
from forwardgrad.forward_mode import frozen_kept, trained_script
from forwardgrad.objective import Objective
from forwardgrad.perturbations import Activity, Cheapest, Dense, Informed, LowRank, Perturbation, Sparse, SplitWeights
from forwardgrad.ranks import ALONE, Ranks, share_of
from forwardgrad.recipe import Measured, MovedPlace, Recipe, SeededTensor, places_of

_WEIGHTS = Dense()
_ELSEWHERE = (Activity, Cheapest, Informed, SplitWeights)  # perturbations that a difference cannot follow


@dataclass(frozen=True)
class ZerothOrder(Estimator):
    """The zeroth-order estimate (SPSA, MeZO): differences of the loss along random directions, times the directions.

    Formula: ĝ = (1/K) Σₖ dₖ vₖ with dₖ = (f(θ + εvₖ) − f(θ − εvₖ)) / 2ε, an antithetic pair, in which all even orders cancel. With
    sides="one" dₖ = (f(θ + εvₖ) − f(θ)) / ε, and all K share f(θ). `perturb` says what vₖ moves, as in `ForwardGradient`. With `maximize`
    f is a score, and the estimate is −ĝ, so that an optimizer that goes down climbs it. With `normalize` the estimate is divided by the
    standard deviation s of the K numbers ε dₖ (on one side that of the K losses).

    Bias: of order ε². dₖ = ∇f·v + (ε²/6) Σ ∂ᵢⱼₗf vᵢvⱼvₗ + O(ε⁴), so E[ĝ]ᵢ − ∂ᵢf = (ε²/2) Σⱼ ∂ᵢⱼⱼf with Gaussian directions, for which
    E[ĝ] is the gradient of the smoothed loss E[f(θ + εv)] exactly, and (ε²/2) Σⱼ ∂ᵢⱼⱼf − (ε²/3) ∂ᵢᵢᵢf with Rademacher ones: none for a
    quadratic loss. On one side dₖ has (ε/2) vᵀHv besides. In the mean that does nothing, E[(vᵀHv)v] = 0 as v and −v are as likely; as noise
    it adds (ε²/4) E[(vᵀHv)²‖v‖²] / K. Rounding adds about u|f|/ε to each dₖ, u the relative precision of the loss, so ε near u^⅓ does
    best (on one side near √u). Where whole weights move in float16 and bfloat16, θ + εv is itself rounded to a grid, of spacing h (|θ|/256
    to |θ|/128 in bfloat16). With Gaussian v this makes the estimate along a weight 1 − 2exp(−2π²(ε/h)²) of what it would be: take ε ≥ h/2
    for the largest weights. A warning names parameters that stay put, and layers in half precision (under autocast, say) whose outputs do.
    At low rank and by example the parts of K/chunk_size batches add up in the precision of the weights: let them be fewer than a hundred.
    Normalised, the direction of E[ĝ] stays and its length becomes c/ε: for Gaussian directions over whole weights and a linear loss
    c = a(K − 1)/K + b/K with a = E[s]/σ and b = E[σ/s] for K normal numbers of deviation σ, a = √(2/(K−1)) Γ(K/2)/Γ((K−1)/2),
    b = √((K−1)/2) Γ((K−2)/2)/Γ((K−1)/2); c tends to 1, and is infinite at K = 2. So the length of ∇f is lost, as in a normalised step.
    Variance: that of the forward gradient up to O(ε²): E‖ĝ‖² = (1 + (m − 1)/K)‖∇f‖², m = n + 2 (Gaussian) or n (Rademacher).
    Cost: 2K forward passes, or K + 1 on one side. Nothing is saved for later, and with chunk_size=1 a step has the memory of inference. Of
    whole weights it also takes three draws (on one side two) of each direction, replayed from its seed wherever a parameter is used: at
    most the perturbed parameters of one operation are held beside the live ones, which are never written to. They keep their bits whatever
    happens. At low rank a layer's output is moved by ε(x B)Aᵀ in place, so no matrix of the size of a weight is drawn or made. With plain
    SGD in a `TrainingStep` the same holds for the gradient. Gaussian directions of a parameter of 2¹⁶ numbers or more are streams with a
    CPU generator (`forwardgrad.directions.streams`). All others are drawn on the generator's device: give one on the model's, or the copies
    take most of the time. Rademacher() needs one random bit a weight. A compiled step draws each direction once, streams inside it, and
    holds it until the parameters move; with moved copies of layers that is about K + 1 times the parameters.

    The loss may be anything that can be evaluated and gives a number: a tensor of any kind, or a Python number such as an accuracy. No
    derivative rule is needed, and what was detached counts like the rest; at low rank and by example all but parameters that were
    detached themselves. It has to give the same value for the same parameters and global random state, though: noise σ in it becomes noise
    σ/ε in dₖ. A batch that it draws itself, by `next(...)`, is such noise. The loss reported is that at θ on one side, else the mean of the
    pairs, f + (ε²/2) vᵀHv; buffers are those of the evaluation at θ, or the mean of what the last pair leaves (whole numbers: the
    second's), O(ε²) from one ordinary pass. What `forward` writes elsewhere, to frozen parameters or to attributes, is written once an
    evaluation, and not once a step: keep a running average in a buffer. Parameters that the loss never uses get no gradient.

    Args:
        epsilon: ε > 0, the step in units of the parameters.
        tangents: K ≥ 1, the number of directions averaged.
        law: where directions are drawn from: one that draws every weight by itself, Gaussian() or Rademacher().
        perturb: what moves: `Dense()`, `LowRank(rank, period)` (with a period the estimator needs `state`), `PerExample()` (scored by each
            example's own part of the loss, as `ForwardGradient` finds it; a Python number has none) or `Sparse(fraction)`, which leaves
            E[ĝ] = μ ⊙ ∇f. At low rank the matrices of `nn.MultiheadAttention` are layers, too.
        sides: "two" or "one".
        chunk_size: directions evaluated side by side as one batch, by `torch.func.vmap`: None for all K, 1 for one point after the other.
            At low rank they share the weights, and the product of the first layer; so many times the activations are held, and with
            Dense so many copies of a layer. On one side, on a processor and without Dense, None makes equal batches of the K where the
            widest output of a layer would be more than 16 MiB: that is faster there. The result is the same up to rounding. Where vmap
            cannot follow the loss, one warning says so, and points come one after the other.
        normalize: divide by the standard deviation of the K losses; K ≥ 2. FZOO has sides="one" and law=Rademacher() besides.
        in_place: move the live parameters themselves, and back again, as MeZO does: with Dense() alone, one point after the other. A step
            then has the memory of inference whatever the size of a layer, as directions are made a block at a time (Gaussian ones with a
            generator of the CPU, and Rademacher ones), in plain SGD's update, too. It takes four draws of each direction in place of
            three. Parameters come back up to rounding, which moves each by about its last bit a step; so a step cannot be taken again
            from a log, and no other thread may look at them. Compiled and captured steps fall back to eager ones.
        maximize: climb what the function returns. The record has the score and its derivatives; leave the optimizer's `maximize` off.

    Raises ValueError where an argument is outside its limits, `estimate_grad_` was given no generator, or a scripted module has trained
    parameters; RuntimeError where the loss uses no trainable parameter, or writes to one in place (clipping in `forward`), which would be
    lost at moved values. An embedding's `max_norm` is no such case: its rows are made short before they move.

    Source: Spall, "Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient Approximation" (1992), eq. 2.2;
    the replayed directions: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes" (2023), algorithm 1; one side and
    `normalize`: Dang et al., FZOO (2025), arXiv 2506.09034, algorithm 1; the batch at low rank: Sarkar et al., EGGROLL (2025).

    >>> ZerothOrder(epsilon=0.01, sides="one").sides
    'one'
    """

    name: ClassVar[str] = "zeroth-order"

    epsilon: float = 1e-3
    tangents: int = 1
    law: Law = Gaussian()
    perturb: Perturbation = _WEIGHTS
    sides: Literal["two", "one"] = "two"
    chunk_size: int | None = 1
    normalize: bool = False
    maximize: bool = False
    in_place: bool = False

    def __post_init__(self) -> None:
        check_number("epsilon", self.epsilon, 0)
        check_count("tangents", self.tangents)
        if not isinstance(self.law, Law) or not self.law.independent:
            raise ValueError(f"law must draw every weight by itself, as Gaussian() and Rademacher() do, not {self.law!r}")
        if not isinstance(self.perturb, Perturbation) or isinstance(self.perturb, _ELSEWHERE):
            raise ValueError(f"perturb must move weights, as Dense(), LowRank(), PerExample() and Sparse() do, not {self.perturb!r}")
        self.perturb.check(self.law)
        if self.sides not in ("two", "one"):
            raise ValueError(f"sides must be 'two' or 'one', not {self.sides!r}")
        if self.chunk_size is not None:
            check_count("chunk_size", self.chunk_size)
        for what, value in (("normalize", self.normalize), ("maximize", self.maximize), ("in_place", self.in_place)):
            if not isinstance(value, bool):
                raise ValueError(f"{what} must be True or False, not {value!r}")
        if self.in_place and (type(self.perturb) is not Dense or self.chunk_size != 1):
            raise ValueError("in_place=True moves whole weights, one point after the other: it goes with perturb=Dense() and chunk_size=1")
        if self.normalize and self.tangents < 2:
            raise ValueError("normalize=True divides by the spread of the losses of several directions: give tangents of at least 2")

    @property
    def unbiased(self) -> bool:
        return False

    @property
    def stateful(self) -> bool:
        return period_of(self.perturb) > 1

    @property
    def told_by_numbers(self) -> bool:
        return isinstance(self.perturb, Dense) or type(self.perturb) is LowRank

    def check_divided(self, parts: int) -> None:
        super().check_divided(parts)
        share_of(self.tangents, parts)

    def estimate(
        self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]
    ) -> tuple[Estimate, dict[str, Tensor | None]]:
        record, parts = self.parts(objective, generator, state)
        gradients: dict[str, Tensor | None] = dict.fromkeys(objective.parameters)
        for name, part in parts:
            add(gradients, {name: part})
        return record, gradients

    def parts(
        self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]
    ) -> tuple[Estimate, Iterator[tuple[str, Gradient]]]:
        self._check(objective)
        found = self._of_whole_weights if isinstance(self.perturb, Dense) else self._of_places
        return found(objective.of_values(), needed(generator), state)

    @property
    def replayable(self) -> bool:
        return self.loggable and not isinstance(self.perturb, Sparse)  # what stands still follows from the weights of the step

    @property
    def loggable(self) -> bool:
        if self.in_place:  # rounding leaves parameters elsewhere, which a log does not tell
            return False
        return isinstance(self.perturb, Dense) or (type(self.perturb) is LowRank and period_of(self.perturb) == 1)

    def measured(self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]) -> tuple[Estimate, Measured]:
        if not self.loggable:
            raise ValueError(UNLOGGABLE.format(self))
        self._check(objective)
        values, source = objective.of_values(), needed(generator)
        if isinstance(self.perturb, Dense):
            record, weights, each = self._measured(values, source)
            names = [name for name in objective.parameters if name in weights.used]
            return record, Measured(((self.tangents, tuple(MovedPlace(SeededTensor.__name__, {"name": name}) for name in names)),), each)
        record, passes = self._differences(values, source, state)
        with torch.autocast(record.loss.device.type, enabled=False):
            numbers = [self._weighted(found.derivatives, record.derivatives) for found in passes]  # the same for all that moved
        moved = ((len(found.derivatives), tuple(p for entered in found.entered for p in places_of(entered))) for found in passes)
        return record, Measured(tuple(moved), torch.cat(numbers))

    def weigh(self, derivatives: Tensor) -> Tensor:
        if not self.loggable:
            raise ValueError(UNLOGGABLE.format(self))
        return self._weighted(derivatives, derivatives)

    def again(self, parameters: Mapping[str, Tensor], found: Measured, generator: Generator) -> Iterator[tuple[str, Gradient]]:
        moved = self._sown(parameters, found, generator)
        if not isinstance(self.perturb, Sparse):
            yield from moved.parts(parameters)
            return
        for one in moved.moved:
            assert isinstance(one, SeededTensor)
            yield one.name, one.masked(parameters[one.name], moved.law, moved.home, self.perturb.masked_)

    def sown(self, parameters: Mapping[str, Tensor], found: Measured, generator: Generator) -> Recipe:
        if not self.replayable:
            raise ValueError(UNREPLAYABLE.format(self))
        return self._sown(parameters, found, generator)

    def _sown(self, parameters: Mapping[str, Tensor], found: Measured, generator: Generator) -> Recipe:
        if not isinstance(self.perturb, Dense):
            seeds, ends = fork(generator, self.tangents), list(accumulate((count for count, _ in found.passes), initial=0))
            return found.sown(self.law, generator.device, [seeds[start:end] for start, end in pairwise(ends)])
        rows, places, ((_, moved),) = seeds_of_weights(generator, self.tangents, len(parameters)), list(parameters), found.passes
        each = (([row[places.index(place.what["name"])] for row in rows], place) for place in moved)
        return Recipe(self.law, generator.device, tuple(place.sown(seeds, found.weights) for seeds, place in each))

    def _check(self, objective: Objective) -> None:
        if (scripted := trained_script(objective)) is not None:
            raise ValueError(
                f"the parameters of the scripted module {scripted!r} cannot be exchanged from outside: estimate at the module it was made "
                "from, or freeze them with requires_grad_(False)"
            )

    @property
    def _stencil(self) -> Stencil:
        return Stencil(self.epsilon, self.sides == "two")

    def _of_whole_weights(self, objective: Objective, generator: Generator, _: Any) -> tuple[Estimate, Iterator[tuple[str, Gradient]]]:
        record, weights, each = self._measured(objective, generator)
        return record, ((name, weights.combine(name, each)) for name in objective.parameters if name in weights.used)

    def _measured(self, objective: Objective, generator: Generator) -> tuple[Estimate, WholeWeights, Tensor]:
        """What the step found out, along which directions, and what each of them is multiplied by."""
        with frozen_kept(objective):
            return self._evaluated(objective, generator)

    def _evaluated(self, objective: Objective, generator: Generator) -> tuple[Estimate, WholeWeights, Tensor]:
        assert isinstance(self.perturb, Dense)
        check_spacing(objective, self.epsilon)
        check_uses(objective, live=True)
        masked_ = None if self.perturb.unbiased else self.perturb.masked_
        ranks, stencil = self._ranks(objective), self._stencil
        if self.in_place and ranks.directions > 1:
            raise ValueError("ranks cannot divide the directions with in_place=True, as each would round its parameters in its own way")
        mine = ranks.part(self.tangents)
        if self.in_place:
            weights: WholeWeights = WeightsInPlace(objective, self.law, self.tangents, generator)
        else:
            weights = WholeWeights(objective, self.law, self.tangents, generator, masked_)
        base, size = None if stencil.two_sided else weights.at_theta(), self.chunk_size or len(mine)
        slopes, losses = list[Tensor](), list[Tensor]()
        for start in range(mine.start, mine.stop, size):
            values, buffers = weights.along(range(start, min(start + size, mine.stop)), stencil.steps)
            slopes.append(stencil.slopes(values, None if base is None else base[0]))
            losses.append(stencil.middle(values, None if base is None else base[0]))
        if not weights.used:
            raise RuntimeError("the loss does not depend on any trainable parameter: there is nothing to estimate")
        loss, derivatives = ranks.together(torch.cat(losses).mean() if base is None else base[0], torch.cat(slopes))
        record = self._record(objective, loss, derivatives, buffers if base is None else [base[1]])
        return record, weights, self._weighted(derivatives, derivatives)

    def _of_places(
        self, objective: Objective, generator: Generator, state: dict[str, Tensor]
    ) -> tuple[Estimate, Iterator[tuple[str, Gradient]]]:
        """Where layers move by rules of their own."""
        record, passes = self._differences(objective, generator, state)
        return record, self._parts_of(passes, record.derivatives)

    def _differences(self, objective: Objective, generator: Generator, state: dict[str, Tensor]) -> tuple[Estimate, list[Pass]]:
        ranks = self._ranks(objective)
        mine = ranks.part(self.tangents)
        with counted(state), frozen_kept(objective):
            kept, seeds = kept_seeds(self.perturb, self.tangents, generator, state), fork(generator, self.tangents)
            lines = Lines(objective, self.perturb, self.law, seeds, generator.device, SameDraws(objective).begun, kept)
            check_outputs(objective, self.epsilon, lines)
            found = lines.differences(self._stencil, self.chunk_size, mine)
        loss, derivatives = ranks.together(found.loss, torch.cat([one.derivatives for one in found.passes]))
        if len(mine) < self.tangents:
            passes = lines.everywhere(found.passes[0], derivatives, self.chunk_size or ranks.share(self.tangents))
        else:
            each = derivatives.split([len(one.derivatives) for one in found.passes])
            passes = [replace(one, derivatives=d) for one, d in zip(found.passes, each, strict=True)]
        return self._record(objective, loss, derivatives, found.buffers), passes

    def _ranks(self, objective: Objective) -> Ranks:
        return objective.ranks if self.told_by_numbers else ALONE

    def _record(self, objective: Objective, loss: Tensor, derivatives: Tensor, buffers: list[dict[str, Tensor]]) -> Estimate:
        objective.commit({name: _middle(buffers[0][name], buffers[-1][name]) for name in buffers[0]})
        evaluated = self._ranks(objective).share(self.tangents)
        return Estimate(loss, derivatives, evaluated * len(self._stencil.steps) + (self.sides == "one"))

    def _weighted(self, slopes: Tensor, of_all: Tensor) -> Tensor:
        """What directions are multiplied by, from the slopes along them; those of the whole loss along all directions are `of_all`."""
        weights = slopes / self.tangents
        if self.normalize:
            spread = of_all.std() * self.epsilon
            weights = torch.where(spread > 0, weights / spread, 0.0)  # along a flat line there is nowhere to go
        return -weights if self.maximize else weights

    def _parts_of(self, passes: list[Pass], of_all: Tensor) -> Iterator[tuple[str, Gradient]]:
        with torch.autocast(of_all.device.type, enabled=False):
            for found in passes:
                yield from parts_of(found, [self._weighted(found.of(entered), of_all) for entered in found.entered])


def _middle(one: Tensor, other: Tensor) -> Tensor:
    """The mean of two buffers, bit for bit where they agree."""
    if not one.is_floating_point():
        return other
    return torch.where(one == other, one, one / 2 + other / 2)
