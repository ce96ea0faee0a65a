"""Zeroth-order steps as graphs: directions made once, the same masks in all evaluations, and the products that these share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.engines.test_compiled_kinds import wide
from tests.engines.test_engines import X, Y, compare, loss, network, sgd, uncompiled, whole  # noqa: F401  # a fixture among them
from tests.support.cases import rows, seeded
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.directions import laws
from forwardgrad.engines import compiled
from forwardgrad.estimators.same_draws import _Noted

aten = torch.ops.aten
LAWS = [fg.Gaussian(), fg.Rademacher()]


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions of small parameters are streams too."""
    monkeypatch.setattr(laws, "_WORTH_A_STREAM", 100)


@pytest.mark.usefixtures("uncompiled", "streamed")
@pytest.mark.parametrize(("law", "tangents", "dropout"), [(LAWS[0], 1, 0.4), (LAWS[1], 3, 0.4), (LAWS[0], 3, 0.0)])
def test_a_graph_takes_the_eager_steps(law: fg.Law, tangents: int, dropout: float) -> None:
    """With dropout, too: the graph draws the masks of the eager step, and the global generator ends where it ends there."""
    compare(lambda: network(dropout), fg.ZerothOrder(tangents=tangents, law=law), run=whole, graphs=1, close=1e-3)


PLACES = [
    fg.ZerothOrder(perturb=fg.LowRank(2)),
    fg.ZerothOrder(1.0, tangents=3, perturb=fg.LowRank(), sides="one", law=fg.Rademacher(), normalize=True),
    fg.ZerothOrder(tangents=3, perturb=fg.LowRank(), chunk_size=None),
    fg.ZerothOrder(tangents=3, perturb=fg.LowRank(), sides="one", chunk_size=2, maximize=True),
    fg.ZerothOrder(tangents=2, perturb=fg.PerExample()),
    fg.ZerothOrder(tangents=2, chunk_size=None, sides="one"),
    fg.ZerothOrder(perturb=fg.Sparse(0.5)),
    fg.ZerothOrder(perturb=fg.LowRank(1, period=2)),
]


@pytest.mark.some(4)
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("method", "dropout"), [*((one, 0.4) for one in PLACES), (PLACES[0], 0.0), (PLACES[2], 0.0)])
def test_a_graph_takes_the_eager_steps_where_layers_move_by_rules(method: fg.ZerothOrder, dropout: float) -> None:
    compare(lambda: network(dropout), method, run=whole, graphs=1, close=1e-3)


@pytest.mark.full
@pytest.mark.parametrize("method", [PLACES[2]], ids=repr)
def test_a_compiled_step_at_low_rank_is_the_eager_one(method: fg.ZerothOrder) -> None:
    compare(lambda: network(0.4), method, run=whole, graphs=1, close=1e-3)


@pytest.mark.full
@pytest.mark.parametrize("law", [fg.Gaussian()], ids=repr)
def test_a_compiled_step_with_dropout_is_the_eager_one(law: fg.Law) -> None:
    compare(lambda: network(0.4), fg.ZerothOrder(law=law), run=whole, graphs=1, close=1e-3)


@pytest.mark.full
@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("law", [fg.Rademacher()], ids=repr)
def test_a_compiled_step_is_the_eager_one(law: fg.Law) -> None:
    compare(wide, fg.ZerothOrder(law=law), run=whole, graphs=1, close=1e-3)


@pytest.mark.usefixtures("uncompiled", "streamed")
@pytest.mark.parametrize(("law", "dropout"), [(LAWS[0], 0.4), (LAWS[1], 0.0)])
def test_a_graph_measures_the_central_difference_along_the_direction_it_moves(law: fg.Law, dropout: float) -> None:
    """The direction is read off the move of plain SGD, θ − γdv; the difference is taken by hand, in float64, under the same masks."""
    torch.manual_seed(2)
    rate, epsilon = 0.1, 1e-4
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Dropout(dropout), nn.Linear(64, 3)).double()
    x = X.double()
    step = fg.TrainingStep(
        loss, model, torch.optim.SGD(model.parameters(), rate), fg.ZerothOrder(epsilon, law=law), generator=seeded(), engine="compile"
    )
    step(x, Y)
    for seed in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        torch.manual_seed(seed)
        record = step(x, Y)
        after = torch.get_rng_state()
        v = [(b - p.detach()) / (rate * record.derivatives) for p, b in zip(model.parameters(), before, strict=True)]
        twin, values = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Dropout(dropout), nn.Linear(64, 3)).double(), []
        for sign in (1, -1):
            torch.manual_seed(seed)
            with torch.no_grad():
                for p, b, part in zip(twin.parameters(), before, v, strict=True):
                    p.copy_(b + sign * epsilon * part)
                values.append(loss(twin, x, Y))
        torch.testing.assert_close(record.derivatives[0], (values[0] - values[1]) / (2 * epsilon), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(record.loss, (values[0] + values[1]) / 2, rtol=1e-12, atol=0)
        assert torch.equal(torch.get_rng_state(), after) or not dropout
        if law == fg.Rademacher():
            assert all(((part.abs() - 1).abs() < 1e-6).all() for part in v)


def targets(method: fg.Estimator, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The operators in the graph of a step."""
    graphs: list[Any] = []

    def kept(traced: Any, inputs: list[Tensor]) -> Any:
        graphs.append(traced.graph)
        return traced.graph

    monkeypatch.setattr(compiled, "compiled", kept)
    fg.TrainingStep(loss, model, sgd(model), method, generator=seeded(), engine="compile")(X, Y)
    return [node.target for node in graphs[0].graph.nodes]


@pytest.mark.usefixtures("streamed")
def test_a_graph_makes_directions_and_the_products_of_the_first_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = targets(fg.ZerothOrder(), wide(), monkeypatch)
    assert found.count(aten.log.default) == 3  # of the three weights' streams; biases are drawn outside
    assert sum(found.count(product) for product in (aten.mm.default, aten.addmm.default)) == 2 + 2 * 2
    assert aten.bernoulli_.float not in found


def test_two_evaluations_share_no_product_of_what_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a layer of another kind x is another in each evaluation: the linear layer gets moved weights."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))
    found = targets(fg.ZerothOrder(), model, monkeypatch)
    assert sum(found.count(product) for product in (aten.mm.default, aten.addmm.default)) == 2 * 2


@pytest.mark.usefixtures("uncompiled")
def test_random_numbers_that_follow_from_moved_parameters_are_no_graph() -> None:
    def noisy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y) + torch.bernoulli(model(x).sigmoid()).mean()

    with pytest.warns(
        UserWarning, match=r"falls back to eager steps: NotImplementedError: aten.bernoulli.default draws by what a tensor holds"
    ):
        compare(network, fg.ZerothOrder(), loss=noisy, graphs=0, close=0)


def test_the_dropout_of_a_gpu_keeps_its_mask() -> None:
    x, other, noted = rows(6, 5), rows(6, 5) + 1, _Noted()
    torch.manual_seed(0)
    with noted:
        one, mask = torch.native_dropout(x, 0.3, True)
        noise = torch.rand(3)
        noted.next = 0
        two, again = torch.native_dropout(other, 0.3, True)
        same = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(one, torch.native_dropout(x, 0.3, True)[0])
    assert torch.equal(mask, again)
    assert not mask.all()
    torch.testing.assert_close(two, other * mask / 0.7)
    assert torch.equal(noise, same)


def test_attention_that_drops_nothing_draws_nothing() -> None:
    x, noted = rows(2, 3, 4, 5, dtype=torch.float32), _Noted()
    with noted:
        found = [F.scaled_dot_product_attention(x, x, x), F.scaled_dot_product_attention(x, x, x, dropout_p=0.0)]
    for one in found:
        torch.testing.assert_close(one, F.scaled_dot_product_attention(x, x, x))


def test_evaluations_that_draw_differently_are_told() -> None:
    noted = _Noted()
    with noted:
        torch.rand(3)
        noted.next = 0
        with pytest.raises(NotImplementedError, match="two evaluations of the loss draw different random numbers"):
            torch.randn(3)
