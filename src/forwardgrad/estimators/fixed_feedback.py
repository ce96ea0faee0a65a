"""`FixedFeedback` sends errors to every layer through fixed random matrices; `Readout` trains the last layer alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from forwardgrad.calls import perturbed_pass
from forwardgrad.directions import Rademacher
from forwardgrad.estimators.assembly import add, add_exact
from forwardgrad.estimators.base import Estimate, Estimator, needed
from forwardgrad.estimators.feedback import check_error, matrix, output_of, places_of, warn_of_penalty
from forwardgrad.objective import Objective
from forwardgrad.perturbations import Activity


@dataclass(frozen=True)
class FixedFeedback(Estimator):
    """Direct feedback alignment (DFA): δ̂_l = e B_l with random matrices B_l that never change.

    Formula: ĝ_W = Σ_b δ̂_b x_bᵀ on the units that are active, e = ∂f/∂output in closed form, B_l [C, q_l] with entries of variance 1/C;
    the last layer gets its exact gradient.
    Bias: as large as the gradient itself at first: B_l has nothing to do with the model. Training turns the weights towards it.
    Variance: none beyond the choice of the batch. Gains and biases of norms, and parameters outside layers with rules, get no gradient.
    Cost: one forward pass, and C q products an example.
    Limits: those of `LearnedFeedback`.

    Raises ValueError as `LearnedFeedback` does.

    Source: Nøkland, "Direct feedback alignment provides learning in deep neural networks" (2016), eq. 7.

    >>> FixedFeedback().unbiased
    False
    """

    name: ClassVar[str] = "fixed-feedback"
    same_draws: ClassVar[bool] = True

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
        found = perturbed_pass(objective, Activity(), Rademacher(), [], generator.device, exact_output=True)
        gradients: dict[str, Tensor | None] = dict.fromkeys(objective.parameters)
        with torch.autocast(found.loss.device.type, enabled=False):
            error, _ = output_of(found, type(self).__name__)
            check_error(found, type(self).__name__)
            warn_of_penalty(found, type(self).__name__)
            for point in places_of(found, found.entered):
                sent = error @ matrix(state, found, point, error, generator)
                add(gradients, point.from_error(point.at_place(sent)))
            add_exact(gradients, found)
        return Estimate(found.loss, found.derivatives, 1), gradients


@dataclass(frozen=True)
class Readout(Estimator):
    """Only the last layer learns, by its exact gradient; everything before it stays the random features that it was initialised to.

    Formula: ĝ_W = Σ_b e_b x_bᵀ for the layer whose output is the model's, e = ∂f/∂output in closed form; no gradient elsewhere.
    Bias: all of the gradient of the other layers. Variance: none beyond the choice of the batch.
    Cost: one forward pass.
    What any method has to beat before it can be said to train hidden layers.

    Raises ValueError where no layer's output goes straight into a loss with a known error.

    Source: Rosenblatt's perceptron with random association units (1958); compulsory beside forward gradients by Ren et al. (2023), Fig. 6.

    >>> Readout().unbiased
    False
    """

    name: ClassVar[str] = "readout"

    @property
    def unbiased(self) -> bool:
        return False

    def estimate(
        self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]
    ) -> tuple[Estimate, dict[str, Tensor | None]]:
        device = next(iter(objective.parameters.values())).device
        found = perturbed_pass(objective, Activity(), Rademacher(), [], device, exact_output=True, below=False)
        gradients: dict[str, Tensor | None] = dict.fromkeys(objective.parameters)
        if not found.exact:
            raise ValueError(
                "Readout needs a last layer whose output goes straight into the loss: let the loss end in F.cross_entropy, F.mse_loss or "
                "another loss function of torch"
            )
        warn_of_penalty(found, type(self).__name__)
        with torch.autocast(found.loss.device.type, enabled=False):
            add_exact(gradients, found)
        return Estimate(found.loss, found.derivatives, 1), gradients
