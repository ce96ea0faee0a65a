"""Directions in the span of a layer's inputs: that the gradient lies there, moments against formulas, and what `keep` loses.

Moments are exact: every combination of a few values stands in place of random draws, as in test_perturbations.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tests.perturbations.test_perturbations import GAUSSIAN, SIGNS, USED_TWICE, evaluate, every, numbered
from tests.support.cases import EXACT, Case, Loss, classify, padded, rows, seeded, true_gradient
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.calls import Pass
from forwardgrad.directions import fork
from forwardgrad.factored import Factored, dense
from forwardgrad.perturbations import LAYERS, Layer
from forwardgrad.perturbations.informed import InformedUse, _leading, _patches

__all__ = ["numbered"]  # the fixture that numbers the places of every test here


def matrix(n: int, m: int, count: int) -> tuple[nn.Module, Loss]:
    return nn.Linear(n, m, bias=False).double(), classify(rows(count, n), classes=m)


def outcomes(found: Pass, p: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the estimates of the only layer, and the squared size of each."""
    (use,) = found.entered
    factors = use.gradient(found.derivatives.unsqueeze(1))["model.weight"]
    assert isinstance(factors, Factored)
    left, right = (side.unflatten(1, (len(p), -1)) for side in (factors.left, factors.right))
    estimates = torch.einsum("mkr,nkr->kmn", left, right)
    return torch.tensordot(p, estimates, dims=1), estimates.square().sum((1, 2))


@pytest.mark.parametrize(("m", "s", "r"), [(2, 2, 1), (3, 1, 1), (2, 1, 2), (2, 1, 3), (2, 2, 2)])
@pytest.mark.parametrize("law", [SIGNS, GAUSSIAN], ids=["signs", "gaussian"])
def test_moments_are_those_of_low_rank_with_rows_in_place_of_columns(law: dict[float, float], m: int, s: int, r: int) -> None:
    """A layer of n = 7 inputs that is given s rows: the mean is the gradient, and the variance that of m × s numbers."""
    if law is GAUSSIAN and (m + s) * r > 6:
        m, s, r = 4, 1, 1
    model, loss = matrix(7, m, s)
    g = true_gradient(model, loss)["weight"]
    found, p = every(loss, model, fg.Informed(r, weighted=False), r * (m + s), law)
    mean, squares = outcomes(found, p)
    torch.testing.assert_close(mean, g, rtol=1e-10, atol=1e-12)
    one = m * s if law is SIGNS else (m + 2) * (s + 2)
    assert float(p @ squares / g.square().sum()) == pytest.approx((1 - 1 / r) * (m * s + 2) + one / r)


@pytest.mark.parametrize(("n", "count"), [(7, 2), (3, 5)], ids=["fewer rows than inputs", "more rows than inputs"])
def test_moments_with_weights_are_those_of_their_formula(n: int, count: int) -> None:
    """E‖ĝ‖² = m (Σσ)(Σ ‖G qᵢ‖²/σᵢ) of random signs at rank 1, and the mean is the gradient, whatever the number of rows."""
    model, loss = matrix(n, 2, count)
    g, (_, sizes, right) = true_gradient(model, loss)["weight"], torch.linalg.svd(rows(count, n), full_matrices=False)
    found, p = every(loss, model, fg.Informed(), 2 + min(n, count), SIGNS)
    mean, squares = outcomes(found, p)
    torch.testing.assert_close(mean, g, rtol=1e-10, atol=1e-12)
    assert float(p @ squares) == pytest.approx(float(2 * sizes.sum() * ((g @ right.mT).square().sum(0) / sizes).sum()))
    for law, digits in ((GAUSSIAN, 2 + min(n, count)),):
        found, p = every(loss, model, fg.Informed(), digits, law)
        torch.testing.assert_close(outcomes(found, p)[0], g, rtol=1e-10, atol=1e-12)


def test_errors_without_a_direction_of_their_own_leave_the_effective_rank() -> None:
    """Of orthonormal errors Δ = 1 for rows that are orthogonal: E‖ĝ‖² = m (Σσ)²/Σσ² ‖G‖², exactly."""
    x = torch.diag(torch.tensor([4.0, 1.0, 0.5], dtype=torch.float64))
    model = nn.Linear(3, 3, bias=False).double()

    def loss(m: nn.Module) -> Tensor:
        return m(x).trace()  # Δ is the identity

    found, p = every(loss, model, fg.Informed(), 6, SIGNS)
    assert float(p @ outcomes(found, p)[1]) == pytest.approx(3 * 5.5**2 / 17.25 * 17.25)


def test_leading_directions_and_one_weight_for_the_rest_are_unbiased() -> None:
    """n = 4 inputs of which two directions are told apart, and 6 rows: over all signs the mean is the gradient."""
    model, x = nn.Linear(4, 2, bias=False).double(), rows(6, 4) * torch.tensor([8.0, 2.0, 0.1, 0.01], dtype=torch.float64)
    loss = classify(x, classes=2)
    g = true_gradient(model, loss)["weight"]
    found, p = every(loss, model, fg.Informed(keep=2), 6, SIGNS)
    (use,) = found.entered
    assert use.kept["columns"].shape == (4, 2)
    assert use.kept["rest"] > use.kept["scale"].max()  # weak directions move more
    torch.testing.assert_close(outcomes(found, p)[0], g, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("keep", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batches_of_zeros_and_of_one_row_give_numbers(dtype: torch.dtype, keep: int | None) -> None:
    model = nn.Linear(6, 2).to(dtype)
    for x in (torch.zeros(4, 6, dtype=dtype), torch.ones(4, 6, dtype=dtype), rows(1, 6).to(dtype)):
        model.zero_grad()
        record = fg.estimate_grad_(classify(x, classes=2), model, fg.ForwardGradient(perturb=fg.Informed(keep=keep)), generator=seeded())
        assert record.derivatives.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_as_many_rows_as_inputs_leave_the_directions_of_low_rank() -> None:
    model, loss = matrix(4, 3, 5)
    informed, low = (evaluate(loss, model, perturb, fork(seeded(), 3)) for perturb in (fg.Informed(2, weighted=False), fg.LowRank(2)))
    torch.testing.assert_close(informed.derivatives, low.derivatives, rtol=0, atol=0)
    assert not informed.entered[0].kept


@pytest.mark.parametrize("perturb", [fg.Informed(), fg.Informed(weighted=False)], ids=repr)
@pytest.mark.parametrize("case", [case for case in EXACT if case.name not in USED_TWICE], ids=str)
def test_the_gradient_of_backpropagation_lies_in_the_span(case: Case, perturb: fg.Perturbation) -> None:
    """So it is whatever the layer: orthonormal columns, and nothing of the gradient at right angles to them."""
    model, loss = case.build()
    exact = true_gradient(model, loss)
    for use in evaluate(loss, model, perturb, fork(seeded(), 1)).entered:
        if not isinstance(use, InformedUse) or "weight" not in use.layer.names:
            continue
        g = exact[use.layer.names["weight"].removeprefix("model.")].flatten(1)
        if (basis := use.kept.get("columns")) is not None:
            torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[1], dtype=basis.dtype), rtol=0, atol=1e-12)
            moving = basis[:, use.kept["scale"] > 0] if "scale" in use.kept else basis
            torch.testing.assert_close(g @ moving @ moving.mT, g, rtol=1e-10, atol=1e-12)
        elif (seen := use.kept.get("seen")) is not None:
            assert not g[seen == 0].any()


def test_rows_that_repeat_or_are_zero_leave_the_estimate_unbiased() -> None:
    """The span of three rows of which one is zero and two are equal is a line: the basis has three directions, and one of them moves."""
    x = torch.zeros(3, 6, dtype=torch.float64)
    x[:2] = rows(6)
    model = nn.Linear(6, 2, bias=False).double()
    loss = classify(x, classes=2)
    g = true_gradient(model, loss)["weight"]
    for weighted in (True, False):
        found, p = every(loss, model, fg.Informed(weighted=weighted), 5, SIGNS)
        mean, squares = outcomes(found, p)
        torch.testing.assert_close(mean, g, rtol=1e-10, atol=1e-12)
        assert float(p @ squares / g.square().sum()) == pytest.approx(2 if weighted else 2 * 3)


def test_tokens_that_do_not_occur_and_padding_get_no_noise() -> None:
    model, loss = padded()
    model = model.double()
    fg.estimate_grad_(loss, model, fg.ForwardGradient(perturb=fg.Informed()), generator=seeded())
    moved = model.get_parameter("0.weight").grad
    assert moved is not None
    assert moved.any(1).tolist() == [True, True, False, False, False, True, False]  # 2 is padding; 3, 4 and 6 do not occur


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": (1, 2)}], ids=str)
@pytest.mark.parametrize("spatial", [1, 2])
def test_a_convolution_is_its_filters_times_the_patches(spatial: int, options: dict[str, int]) -> None:
    if spatial == 1:
        options = {key: value[1] if isinstance(value, tuple) else value for key, value in options.items()}
    x, weight = rows(2, 3, *[7] * spatial), rows(4, 3, *[3] * spatial)
    function = F.conv1d if spatial == 1 else F.conv2d
    layer = LAYERS[function].bind(function, (x, weight), options, {id(weight): "weight"})
    assert isinstance(layer, Layer)
    out, seen = layer.run(x, lambda function, **call: function(**call))
    products = _patches(layer, seen) @ weight.flatten(1).T  # type: ignore[arg-type]
    torch.testing.assert_close(products.reshape(2, -1, 4).mT.reshape(out.shape), out, rtol=1e-12, atol=1e-12)


def kept(count: int = 40, n: int = 30) -> Tensor:
    """Rows whose singular values fall by a half each."""
    left, right = torch.linalg.qr(rows(count, n)).Q, torch.linalg.qr(rows(n, n)).Q
    return left * 0.5 ** torch.arange(n, dtype=torch.float64) @ right


@pytest.mark.parametrize("keep", [1, 4, 10])
def test_the_basis_that_is_kept_loses_hardly_more_than_the_best(keep: int) -> None:
    x = kept()
    basis = _leading(x, keep)
    best = float(torch.linalg.svdvals(x)[keep:].norm())
    torch.testing.assert_close(basis.mT @ basis, torch.eye(keep, dtype=x.dtype), rtol=0, atol=1e-12)
    assert best <= float((x - x @ basis @ basis.mT).norm()) < 1.05 * best


def test_the_mean_with_keep_is_the_part_in_the_basis_and_the_loss_is_bounded() -> None:
    model, x = nn.Linear(30, 2, bias=False).double(), kept()
    loss = classify(x, classes=2)
    g = true_gradient(model, loss)["weight"]
    found, p = every(loss, model, fg.Informed(keep=3, weighted=False), 5, SIGNS)
    (use,) = found.entered
    basis = use.kept["columns"]
    mean, _ = outcomes(found, p)
    torch.testing.assert_close(mean, g @ basis @ basis.mT, rtol=1e-10, atol=1e-12)
    error = (torch.softmax(model(x), 1) - F.one_hot(torch.arange(40) % 2, 2)).detach() / 40
    lost = float((mean - g).norm())
    assert 0 < lost <= float(torch.linalg.matrix_norm(error, 2) * (x - x @ basis @ basis.mT).norm())
    assert not fg.ForwardGradient(perturb=fg.Informed(keep=3, weighted=False)).unbiased


@pytest.mark.parametrize("perturb", [fg.Informed(2), fg.Informed(keep=2), fg.Informed(keep=2, weighted=False)], ids=repr)
@pytest.mark.parametrize("name", ["mlp", "embedding", "attention classes", "cnn"])
def test_both_ways_of_forward_mode_agree(name: str, perturb: fg.Perturbation) -> None:
    model, loss = next(case for case in EXACT if case.name == name).build()
    explicit = evaluate(loss, model, perturb, fork(seeded(), 3))
    with fg.plainly():
        plain = evaluate(loss, model, perturb, fork(seeded(), 3))
    torch.testing.assert_close(explicit.derivatives, plain.derivatives, rtol=1e-10, atol=1e-12)
    for one, other in zip(explicit.entered, plain.entered, strict=True):
        weights = torch.ones(3, 1, dtype=torch.float64)
        for gradient, same in zip(one.gradient(weights).values(), other.gradient(weights).values(), strict=True):
            torch.testing.assert_close(dense(gradient), dense(same), rtol=1e-10, atol=1e-12)


@pytest.mark.full
def test_less_noise_than_low_rank_on_a_wide_layer_and_a_small_batch() -> None:
    """64 inputs and 4 rows, 2000 random signs each: the squared size is 64/4 times smaller, exactly so but for the spread of d²."""
    torch.manual_seed(0)
    model = nn.Linear(64, 8, bias=False).double()
    loss = classify(rows(4, 64), classes=8)
    g = true_gradient(model, loss)["weight"]
    sizes, equal = {}, torch.full((2000,), 1 / 2000, dtype=torch.float64)
    for perturb in (fg.LowRank(), fg.Informed(weighted=False), fg.Informed(), fg.Informed(keep=2)):
        found = evaluate(loss, model, perturb, fork(seeded(1), 2000))
        mean, squares = outcomes(found, equal)
        assert float((mean - g).square().sum()) < 2 * float(equal @ squares) / 2000
        sizes[perturb] = float(equal @ squares / g.square().sum())
    spread = 4.5 * math.sqrt(2 / 2000)  # of d², which is nearly that of a normal d
    assert sizes[fg.LowRank()] == pytest.approx(64 * 8, rel=spread)
    assert sizes[fg.Informed(weighted=False)] == pytest.approx(4 * 8, rel=spread)
    assert sizes[fg.Informed()] < 1.2 * 4 * 8
    assert sizes[fg.Informed(keep=2)] < 0.8 * 64 * 8


def test_inputs_along_a_few_lines_leave_little_noise_however_many_rows_there_are() -> None:
    """40 rows of 30 numbers, singular values of a half each: the effective rank is 3, so that the size is a tenth of that of LowRank."""
    model, loss = nn.Linear(30, 2, bias=False).double(), classify(kept(), classes=2)
    g, equal, sizes = true_gradient(model, loss)["weight"], torch.full((1000,), 1 / 1000, dtype=torch.float64), []
    for perturb in (fg.LowRank(), fg.Informed(), fg.Informed(keep=4)):
        mean, squares = outcomes(evaluate(loss, model, perturb, fork(seeded(1), 1000)), equal)
        sizes.append(float(equal @ squares / g.square().sum()))
        assert float((mean - g).square().sum() / g.square().sum()) < 2 * sizes[-1] / 1000
    assert sizes[0] == pytest.approx(60, rel=4.5 * math.sqrt(2 / 1000))
    assert sizes[1] < 12
    assert sizes[2] < 20


@pytest.mark.parametrize("keep", [None, 3])
def test_the_basis_does_not_hang_on_the_last_bits_of_the_inputs(keep: int | None) -> None:
    """A replica of a batch, a compiled step and an eager one round differently, and have to move the same way."""
    x, model = kept(), nn.Linear(30, 2, bias=False).double()
    found = [
        evaluate(classify(other, classes=2), model, fg.Informed(keep=keep), fork(seeded(), 4)) for other in (x, x + 1e-13 * rows(40, 30))
    ]
    strong = 6 if keep is None else None  # weaker directions turn by more
    columns = [one.entered[0].kept["columns"][:, :strong] for one in found]
    torch.testing.assert_close(columns[0], columns[1], rtol=0, atol=1e-9)


def test_limits() -> None:
    for options, said in (({"rank": 0}, "rank must be"), ({"keep": 0}, "keep must be"), ({"keep": True}, "keep must be")):
        with pytest.raises(ValueError, match=f"{said} a whole number of at least 1"):
            fg.Informed(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weighted must be True or False, not 1"):
        fg.Informed(weighted=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="control_variate predicts weights' gradients"):
        fg.ForwardGradient(perturb=fg.Informed(), control_variate=0.5)
