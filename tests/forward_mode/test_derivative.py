"""Directional derivatives against reverse mode and central differences in float64, and what becomes of a model after an error."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import EXACT, Attention, Case, Loss, Recurrent, perceptron, regress, rows, seeded, trained, true_gradient
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import forwardgrad as fg
from forwardgrad.forward_mode.derivative import directional_derivatives
from forwardgrad.objective import Objective


def derivatives(model: nn.Module, loss: Loss, count: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss, its derivatives along `count` Gaussian tangents, and these by the model's own parameter names."""
    names, objective = list(trained(model)), Objective(loss, model)
    tangents = fg.Gaussian().draw(objective.parameters, count, seeded(1))
    torch.manual_seed(7)
    value, along = directional_derivatives(objective, tangents)
    return value, along, dict(zip(names, tangents.values(), strict=True))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_derivative_is_the_gradient_of_backpropagation_times_the_tangent(case: Case, count: int) -> None:
    model, loss = case.build()
    expected = true_gradient(model, loss)
    _, along, tangents = derivatives(model, loss, count)
    assert along.shape == (count,)
    assert not along.requires_grad
    products = [(expected[name] * v).reshape(count, -1).sum(dim=1) for name, v in tangents.items()]
    torch.testing.assert_close(along, torch.stack(products).sum(dim=0), rtol=1e-11, atol=1e-12)


def shifted(model: nn.Module, loss: Loss, tangents: dict[str, Tensor], epsilon: float) -> Tensor:
    moved = copy.deepcopy(model)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in trained(moved).items():
            p.add_(tangents[name][0], alpha=epsilon)
        return loss(moved).mean()


@pytest.mark.parametrize("case", [case for case in EXACT if case.name != "padded embedding"], ids=str)  # a difference sees padding rows
def test_derivative_is_the_central_difference(case: Case) -> None:
    model, loss = case.build()
    before = copy.deepcopy(model)
    _, along, tangents = derivatives(model, loss, 1)
    epsilon = 1e-6  # error: 1e-16/ε of rounding and ε² of curvature
    difference = (shifted(before, loss, tangents, epsilon) - shifted(before, loss, tangents, -epsilon)) / (2 * epsilon)
    torch.testing.assert_close(along[0], difference, rtol=1e-7, atol=1e-8)


def test_central_difference_approaches_the_derivative_with_the_square_of_its_step() -> None:
    model, loss = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double(), regress(rows(6, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel(), dtype=p.dtype).reshape(p.shape).sin())
    _, along, tangents = derivatives(model, loss, 1)

    def error(epsilon: float) -> float:
        return float(abs((shifted(model, loss, tangents, epsilon) - shifted(model, loss, tangents, -epsilon)) / (2 * epsilon) - along[0]))

    assert error(1e-3) / error(1e-4) == pytest.approx(100, rel=0.02)
    assert error(1e-4) / error(1e-5) == pytest.approx(100, rel=0.3)


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_orthogonal_tangents_give_the_gradient_of_backpropagation(case: Case) -> None:
    model, loss = case.build()
    parameters, expected = trained(model), true_gradient(model, loss)
    n = sum(p.numel() for p in parameters.values())
    torch.manual_seed(7)
    fg.estimate_grad_(loss, model, fg.ForwardGradient(tangents=n, law=fg.Orthogonal()), generator=seeded())
    torch.testing.assert_close({name: p.grad for name, p in parameters.items()}, expected, rtol=1e-10, atol=1e-12)


def test_padding_row_of_an_embedding_has_no_derivative_as_in_backpropagation() -> None:
    model = nn.Embedding(4, 3, padding_idx=0).double()
    words = torch.tensor([[0, 1], [2, 0]])

    def loss(m: nn.Module) -> Tensor:
        return (m(words) - 1).square().sum()

    expected = true_gradient(model, loss)
    _, along, tangents = derivatives(model, loss, 1)
    torch.testing.assert_close(along[0], (expected["weight"] * tangents["weight"][0]).sum())


def test_derivatives_have_the_dtype_of_the_loss() -> None:
    x = rows(3, 4, dtype=torch.float32)
    for count in (1, 2):
        model = perceptron()
        value, along, _ = derivatives(model, lambda m: m(x).mean() * 0.5, count)
        assert (value.dtype, along.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("count", [1, 2])
def test_attention_outside_a_module_works(count: int) -> None:
    q, k = rows(1, 2, 3, 4).requires_grad_(), rows(1, 2, 3, 4).add(1).requires_grad_()

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k).square().mean()

    objective = Objective(loss, [q, k])
    tangents = fg.Gaussian().draw(objective.parameters, count, seeded())
    _, along = directional_derivatives(objective, tangents)
    gradients = torch.autograd.grad(loss(q, k), [q, k])
    expected = sum((g * v).flatten(1).sum(dim=1) for g, v in zip(gradients, tangents.values(), strict=True))
    torch.testing.assert_close(along, expected)


class WithoutJvp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * 2


X = rows(5, 4)
ERRORS = [
    ("detached", lambda m: m(X).detach().mean(), RuntimeError, "carries no tangent"),
    ("item", lambda m: torch.tensor(m(X).mean().item()), RuntimeError, "carries no tangent"),
    ("another model", lambda m: (m(X), torch.ones(()))[1], RuntimeError, "carries no tangent"),
    ("whole numbers", lambda m: m(X).mean().int(), RuntimeError, "carries no tangent"),
    ("not one number", lambda m: m(X), ValueError, r"one element, or one an example, not shape \(5, 3\)"),
    ("no tensor", lambda m: float(m(X).mean().detach()), TypeError, "must return a tensor, not float"),
    ("nothing", lambda m: (m(X), None)[1], TypeError, "must return a tensor, not NoneType"),
    ("complex", lambda m: m(X).mean() * (1 + 1j), TypeError, "complex"),
    ("no forward rule", lambda m: m(X).index_reduce(0, torch.arange(5) % 2, m(X), "amax"), NotImplementedError, "index_reduce"),
    ("custom function", lambda m: WithoutJvp.apply(m(X)).mean(), NotImplementedError, "jvp"),
    ("user's error", lambda m: (m(X), 1 / 0)[1], ZeroDivisionError, "division"),
]


@pytest.mark.parametrize("method", [fg.ForwardGradient(), fg.ForwardGradient(3), fg.ForwardGradient(3, chunk_size=1)], ids=repr)
@pytest.mark.parametrize(("loss", "error", "message"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_errors_leave_the_model_as_it_was(loss: Loss, error: type[Exception], message: str, method: fg.Estimator) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    kept = {name: p.grad for name, p in model.named_parameters()}
    model[0].weight.grad = torch.ones_like(model[0].weight)
    parameters, state = list(model.parameters()), copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        fg.estimate_grad_(loss, model, method, generator=seeded())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close(model[0].weight.grad, torch.ones_like(model[0].weight), rtol=0, atol=0)
    assert all(p.grad is kept[name] for name, p in model.named_parameters() if name != "0.weight")


def settings() -> tuple[object, ...]:
    mkldnn, cuda = torch.backends.mkldnn, torch.backends.cuda
    attention = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled())
    grad = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    return (torch.backends.mha.get_fastpath_enabled(), mkldnn.enabled, mkldnn.deterministic, mkldnn.allow_tf32, *attention, *grad)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("fastpath", [False, True])
def test_settings_are_put_back(fails: bool, fastpath: bool) -> None:
    model = nn.ModuleList([Attention().eval(), Recurrent(nn.LSTM)]).double()
    seen = []

    def loss(m: nn.ModuleList) -> Tensor:
        seen.append(settings())
        value = m[0](rows(2, 3, 4)).square().mean() + m[1](rows(2, 3, 4)).mean()
        return value.detach() if fails else value

    torch.backends.mha.set_fastpath_enabled(fastpath)
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            before = settings()
            for commit in (True, False):
                objective = Objective(loss, model)
                tangents = fg.Gaussian().draw(objective.parameters, 1, seeded())
                if fails:
                    with pytest.raises(RuntimeError, match="carries no tangent"):
                        directional_derivatives(objective, tangents, commit=commit)
                else:
                    directional_derivatives(objective, tangents, commit=commit)
                assert settings() == before
        assert seen[0] != before  # or nothing was there to be put back
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
