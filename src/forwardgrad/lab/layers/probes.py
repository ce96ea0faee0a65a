"""A linear probe: multinomial logistic regression on the activations of a layer, fitted to its one minimum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import optimize, special
from torch import Tensor

Array = np.ndarray[Any, np.dtype[np.float64]]

STOP = 1e-5  # a fit ends once no entry of the gradient is larger
ITERATIONS = 1000  # and no later than here


@dataclass(frozen=True)
class LinearProbe:
    """Class scores W(x − mean)/spread + b; `converged` says whether the fit came to its stopping rule."""

    weight: Array
    bias: Array
    mean: Array
    spread: Array
    iterations: int
    converged: bool

    def right(self, features: Tensor, labels: Tensor) -> int:
        """How many examples it classifies rightly."""
        scores = (_float64(features) - self.mean) / self.spread @ self.weight.T + self.bias
        return int((scores.argmax(1) == labels.cpu().numpy()).sum())


def fit_probe(features: Tensor, labels: Tensor, classes: int, l2: float) -> LinearProbe:
    """The probe of features [n, width] and their labels [n].

    It minimises the mean cross-entropy plus l2/2·‖W‖², in float64, by L-BFGS from zero, on features of mean 0 and spread 1 over the
    examples. The function is convex, so nothing but `l2` is to be chosen. The fit ends where the largest entry of the gradient is below
    STOP, at the latest after ITERATIONS.
    """
    x, y = _float64(features), labels.cpu().numpy()
    mean, spread = x.mean(0), x.std(0)
    spread[spread < 1e-12] = 1.0  # a unit that never changes says nothing, and is zero
    x = (x - mean) / spread
    n, width = x.shape
    rows = np.arange(n)

    def loss(flat: Array) -> tuple[float, Array]:
        weight, bias = flat[: classes * width].reshape(classes, width), flat[classes * width :]
        scores = x @ weight.T + bias
        logs = scores - special.logsumexp(scores, axis=1, keepdims=True)
        error = np.exp(logs)
        error[rows, y] -= 1
        gradient = np.concatenate([(error.T @ x / n + l2 * weight).ravel(), error.mean(0)])
        return float(-logs[rows, y].mean() + l2 / 2 * (weight**2).sum()), gradient

    found = optimize.minimize(
        loss,
        np.zeros(classes * (width + 1)),
        jac=True,
        method="L-BFGS-B",
        options={"gtol": STOP, "ftol": 0.0, "maxiter": ITERATIONS, "maxfun": 2 * ITERATIONS},
    )
    weight, bias = found.x[: classes * width].reshape(classes, width), found.x[classes * width :]
    return LinearProbe(weight, bias, mean, spread, int(found.nit), bool(np.abs(found.jac).max() <= STOP))


def _float64(features: Tensor) -> Array:
    return features.detach().to("cpu", torch.float64).numpy()
