"""Operators without forward mode that are derived by central differences, on request."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.forward_mode.test_operators import Behind, X
from tests.support.cases import rows, seeded, trained, true_gradient
from torch import Tensor, nn

import forwardgrad as fg


class Old(torch.autograd.Function):
    """In the old style, with a context; a number and whole numbers beside the tensors, and one result that does not move."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, index: Tensor, power: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, index)
        ctx.power = power
        assert len(ctx.needs_input_grad) == 4
        still = x.sum(1)
        ctx.mark_non_differentiable(still)
        return (x @ weight).index_select(1, index).sin() ** power, still

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Any:
        x, weight, index = ctx.saved_tensors
        inner = (x @ weight).index_select(1, index)
        inner = gradient * ctx.power * inner.sin() ** (ctx.power - 1) * inner.cos()
        wide = torch.zeros(len(x), weight.shape[1], dtype=x.dtype).index_add_(1, index, inner)
        return wide @ weight.T, x.T @ wide, None, None


class New(torch.autograd.Function):
    """In the new style, without a jvp."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.exp() * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.exp() * (x + 1)


alias = Old.apply  # as torch's own documentation writes it
INDEX = torch.tensor([0, 2, 2])


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight, self.last = nn.Linear(4, 5), nn.Parameter(rows(5, 3) * 0.3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, still = alias(self.first(x), self.weight, INDEX, 3)
        return self.last(New.apply(out) + still.unsqueeze(1))


def customised() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    return Custom().double(), lambda m: F.cross_entropy(m(X[:6]), torch.arange(6) % 2)


def ctc(m: nn.Module) -> Tensor:
    lengths = torch.tensor([6, 5]), torch.tensor([3, 2])
    return F.ctc_loss(m(rows(6, 2, 4)).log_softmax(2), torch.tensor([[1, 2, 2], [3, 1, 1]]), *lengths)


def volumes(m: nn.Module) -> Tensor:
    return F.grid_sample(m(rows(1, 2, 3, 4, 4)), m(rows(8, 4)).tanh()[:, :3].reshape(1, 2, 2, 2, 3), align_corners=True).square().mean()


def product(m: nn.Module) -> Tensor:
    return m(X).scatter_reduce(1, torch.arange(15).unsqueeze(1).expand(-1, 4) % 3, m(X).sin(), "prod").sum()


LACKING: dict[str, Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]] = {
    "custom": customised,
    "ctc": lambda: (nn.Linear(4, 4).double(), ctc),
    "volumes": lambda: (nn.Linear(4, 4).double(), volumes),
    "product": lambda: (nn.Linear(4, 4).double(), product),
}
pytestmark = pytest.mark.filterwarnings("ignore:derivatives of .* are made by torch's own forward mode:UserWarning")
quiet = pytest.mark.filterwarnings("ignore:.* its derivative is a central difference:UserWarning")


@quiet
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", LACKING)
def test_differences_are_near_the_derivative_of_backpropagation(name: str, plain: bool) -> None:
    torch.manual_seed(0)
    model, loss = LACKING[name]()
    exact = true_gradient(copy.deepcopy(model), loss)
    with fg.differences(), fg.plainly() if plain else warnings.catch_warnings():
        for count in (1, 3):
            objective = fg.Objective(loss, model)
            tangents = fg.Gaussian().draw(objective.parameters, count, seeded(1))
            _, along = fg.directional_derivatives(objective, tangents)
            products = sum((g * v).reshape(count, -1).sum(1) for g, v in zip(exact.values(), tangents.values(), strict=True))
            length = sum(g.square().sum() for g in exact.values()) ** 0.5
            assert float((along - products).abs().max() / length) < 1e-7


@pytest.mark.parametrize("name", LACKING)
def test_differences_are_taken_on_request_alone(name: str) -> None:
    model, loss = LACKING[name]()
    with pytest.raises(NotImplementedError, match=r"no rule for forward mode.*with forwardgrad\.differences\(\)"):
        fg.estimate_grad_(loss, model, fg.ForwardGradient(), generator=seeded())


def test_one_warning_names_each_operator_with_cost_and_error() -> None:
    model, loss = customised()
    with warnings.catch_warnings(record=True) as caught, fg.differences():
        warnings.simplefilter("default")
        for seed in range(3):
            fg.estimate_grad_(loss, model, fg.ForwardGradient(2), generator=seeded(seed))
    told = [str(one.message) for one in caught if "central difference" in str(one.message)]
    assert sorted(text.partition(" ")[0] for text in told) == ["New", "Old"]
    assert all("2 evaluations a tangent" in text and "\n" not in text for text in told)
    assert all(one.filename == __file__ for one in caught if "central difference" in str(one.message))


@quiet
def test_directions_of_low_rank_go_through_differences() -> None:
    """The custom function has a trained weight among its arguments: that one moves too."""
    model, loss = customised()
    exact = true_gradient(copy.deepcopy(model), loss)
    with fg.differences():
        record = fg.estimate_grad_(loss, model, fg.ForwardGradient(perturb=fg.LowRank()), generator=seeded())
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    along = sum((exact[name] * p.grad).sum() for name, p in trained(model).items())  # ĝ = d v, so g·ĝ = d²
    torch.testing.assert_close(along, record.derivatives[0] ** 2, rtol=1e-6, atol=1e-9)


@quiet
def test_a_custom_function_is_afterwards_what_it_was() -> None:
    before = dict(Old.__dict__)
    model, loss = customised()
    with fg.differences():
        fg.estimate_grad_(loss, model, fg.ForwardGradient(), generator=seeded())
    assert dict(Old.__dict__) == before
    torch.testing.assert_close(true_gradient(model, loss), true_gradient(customised()[0], loss))


def test_an_explanation_and_a_check_tell_of_differences() -> None:
    model = nn.Linear(4, 4).double()
    with fg.differences():
        found = fg.explain(ctc, model)
        check = fg.check(ctc, model, fg.ForwardGradient(), repeats=10)
    assert [(row.function, row.way) for row in found.calls if row.way == "differences"] == [("ctc_loss", "differences")]
    (note,) = [row for row in check.findings if row.name == "differences"]
    assert "ctc_loss" in note.found
    assert check.passed


class Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, generator: torch.Generator | None) -> Tensor:
        return x.square() * torch.rand(x.shape, dtype=x.dtype, generator=generator) + torch.randn_like(x) * 100

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise NotImplementedError


@quiet
@pytest.mark.parametrize("count", [1, 3])
def test_a_random_operator_draws_the_same_numbers_in_every_evaluation(count: int) -> None:
    """Its noise is a thousand times what a direction does: other numbers would drown the derivative."""
    generator, x = torch.Generator(), rows(5).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return Noisy.apply(x, generator).sum()

    tangents = {"tensor 0": rows(count, 5)}
    generator.manual_seed(3)
    torch.manual_seed(5)
    with fg.differences():
        value, along = fg.directional_derivatives(fg.Objective(loss, x), tangents)
    following = torch.rand(1)
    drawn = torch.rand(5, dtype=torch.float64, generator=generator.manual_seed(3))
    torch.testing.assert_close(along, (2 * x * drawn * tangents["tensor 0"]).sum(1).detach(), rtol=1e-6, atol=1e-7)
    torch.manual_seed(5)
    generator.manual_seed(3)
    torch.testing.assert_close(value, loss(x).detach())
    torch.testing.assert_close(following, torch.rand(1))  # the generators stand where an ordinary pass leaves them


@quiet
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_an_operator_of_low_precision_is_evaluated_in_float64(dtype: torch.dtype, error: float) -> None:
    """What is left is the rounding of the model's own numbers: differences in float32 would be off by 1e-3, in bfloat16 by all."""
    x = rows(6).to(dtype).requires_grad_()
    tangents = {"tensor 0": rows(1, 6).to(dtype)}
    with fg.differences():
        _, along = fg.directional_derivatives(fg.Objective(lambda x: New.apply(x).double().sum(), x), tangents)
    exact = (x.double().exp() * (x.double() + 1) * tangents["tensor 0"].double()).sum().detach()
    assert abs(float(along[0]) / float(exact) - 1) < error


class Single(torch.autograd.Function):
    """Computes in float32, whatever it is given; `strict` takes nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strict: bool) -> Tensor:
        if strict and x.dtype != torch.float32:
            raise TypeError("float32 alone")
        return (x.float().exp() * x.float()).to(x.dtype)


@quiet
@pytest.mark.parametrize(("dtype", "strict"), [(torch.float64, False), (torch.float32, False), (torch.float32, True)])
def test_an_operator_that_computes_in_float32_has_a_step_to_suit(dtype: torch.dtype, strict: bool) -> None:
    x, tangents = rows(6).to(dtype).requires_grad_(), {"tensor 0": rows(1, 6).to(dtype)}
    with fg.differences():
        _, along = fg.directional_derivatives(fg.Objective(lambda x: Single.apply(x, strict).sum(), x), tangents)
    exact = (x.exp() * (x + 1) * tangents["tensor 0"]).sum().detach()
    assert abs(float(along[0] / exact) - 1) < 1e-3


class Writes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)


class Hidden(torch.autograd.Function):
    """Reads a tensor that it was not given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: list[Any]) -> Tensor:
        return x * held[0].tensor


class Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@quiet
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda h: Writes.apply(h * 1), "writes into its arguments"),
        (lambda h: h.clone().index_reduce_(0, torch.arange(15) % 2, h, "amax"), "writes into its arguments"),
        (lambda h: Hidden.apply(h.detach() + h[:1] * 1, [Held(h)]), "was not given: hand it over"),
    ],
    ids=["custom", "in place", "hidden"],
)
def test_what_writes_or_reads_unseen_has_no_differences(function: Callable[[Tensor], Tensor], message: str) -> None:
    model = Behind(function).double()
    with fg.differences(), pytest.raises(NotImplementedError, match=message) as caught:
        fg.estimate_grad_(lambda m: m(X).mean(), model, fg.ForwardGradient(), generator=seeded())
    assert "\n" not in str(caught.value)


@quiet
def test_infinite_arguments_and_results_stand_still() -> None:
    x = torch.tensor([1.0, -torch.inf, 2.0], dtype=torch.float64, requires_grad=True)
    tangents = {"tensor 0": torch.tensor([[1.0, 0.0, 3.0]], dtype=torch.float64)}
    with fg.differences():
        _, along = fg.directional_derivatives(
            fg.Objective(lambda x: x.index_reduce(0, torch.tensor([0]), x[2:], "amax").nan_to_num(neginf=0).sum(), x), tangents
        )
    torch.testing.assert_close(along, torch.tensor([6.0], dtype=torch.float64))
