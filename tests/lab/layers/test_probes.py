"""The linear probe against scikit-learn's logistic regression, and against its own conditions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from forwardgrad.lab.layers.probes import ITERATIONS, STOP, fit_probe


def mixture(n: int, width: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features that tell their class with some error."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    means = torch.randn(classes, width, generator=generator)
    mixed = torch.randn(n, width, generator=generator) @ torch.randn(width, width, generator=generator) * 0.4
    return means[labels] + mixed + 5, labels


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_it_is_the_logistic_regression_of_scikit_learn(l2: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forwardgrad.lab.layers.probes.STOP", 1e-7)  # weights are off by up to the gradient over l2
    x, y = mixture(300, 12, 4, seed=0)
    probe = fit_probe(x, y, 4, l2)
    assert probe.converged
    scaled = (x.double().numpy() - probe.mean) / probe.spread
    theirs = LogisticRegression(C=1 / (len(x) * l2), tol=1e-10, max_iter=10_000).fit(scaled, y.numpy())
    np.testing.assert_allclose(probe.weight, theirs.coef_, atol=2e-3)
    np.testing.assert_allclose(probe.bias - probe.bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=2e-3)
    held, labels = mixture(200, 12, 4, seed=0)
    expected = theirs.predict((held.double().numpy() - probe.mean) / probe.spread)
    assert probe.right(held, labels) == int((expected == labels.numpy()).sum())


def test_the_gradient_of_what_it_minimises_is_zero_where_it_stops() -> None:
    """By automatic differentiation, of the function that the docstring states."""
    x, y = mixture(120, 6, 3, seed=1)
    probe = fit_probe(x, y, 3, 1e-2)
    scaled = torch.from_numpy((x.double().numpy() - probe.mean) / probe.spread)
    weight, bias = (torch.from_numpy(part).requires_grad_() for part in (probe.weight, probe.bias))
    (torch.nn.functional.cross_entropy(scaled @ weight.T + bias, y) + 1e-2 / 2 * weight.square().sum()).backward()
    assert max(float(part.grad.abs().max()) for part in (weight, bias)) <= STOP * 1.01  # type: ignore[union-attr]


def test_a_unit_that_never_changes_and_a_class_that_is_not_there_do_no_harm() -> None:
    x, y = mixture(60, 5, 2, seed=2)
    x[:, 3] = 7.0
    probe = fit_probe(x, y, 4, 1e-2)
    assert probe.converged
    assert probe.iterations < ITERATIONS
    assert not probe.weight[:, 3].any()
    assert probe.right(x, y) == fit_probe(x[:, [0, 1, 2, 4]], y, 4, 1e-2).right(x[:, [0, 1, 2, 4]], y)


def test_a_scale_of_the_features_changes_nothing() -> None:
    x, y = mixture(80, 5, 3, seed=3)
    np.testing.assert_allclose(fit_probe(x, y, 3, 1e-2).weight, fit_probe(100 * x - 3, y, 3, 1e-2).weight, atol=1e-4)
