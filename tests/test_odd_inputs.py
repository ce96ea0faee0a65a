"""Batches without examples, and models without shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import convolutional, rows, seeded
from torch import Tensor, nn

import forwardgrad as fg

METHODS = [
    *(fg.ForwardGradient(tangents=count, perturb=kind()) for kind in fg.PERTURBATIONS for count in (1, 3)),
    fg.ForwardGradient(perturb=fg.Activity(), exact_output=True),
    fg.ForwardGradient(control_variate=0.9),
    fg.ForwardGradient(tangents=2, combine="projection"),
    *(fg.Backprop(), fg.Backprop(checkpoint=True), fg.ZerothOrder(), fg.Guess(), fg.FixedFeedback(), fg.Readout()),
    *(fg.LearnedFeedback(), fg.LearnedFeedback(use="control-variate"), fg.LocalLosses(), fg.LocalLosses(feedback=True)),
]
MODELS = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 3)), (4,)),
    "convolutional": (convolutional, (1, 6, 6)),
    "sequences": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(10, 3)), (2, 4)),
}
NONE = torch.zeros(0, dtype=torch.int64)


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    make, shape = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double(), rows(4, *shape), torch.zeros(0, *shape, dtype=torch.float64)


def summed(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), torch.arange(len(x)) % 3, reduction="sum")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_sum_over_no_examples_has_no_gradient_and_teaches_nothing(method: fg.Estimator, model: str) -> None:
    network, x, empty = build(model)
    state: dict[str, Tensor] = {}
    fg.estimate_grad_(lambda m: summed(m, x), network, method, generator=seeded(), state=state)
    learned, weights = {name: t.clone() for name, t in state.items()}, {name: p.detach().clone() for name, p in network.named_parameters()}
    network.zero_grad()
    record = fg.estimate_grad_(lambda m: summed(m, empty), network, method, generator=seeded(), state=state)
    assert float(record.loss) == 0
    assert not any(bool(p.grad.any()) for p in network.parameters() if p.grad is not None)
    assert state.keys() == learned.keys()
    assert all(torch.equal(learned[name], t) for name, t in state.items())
    step = fg.TrainingStep(summed, network, torch.optim.SGD(network.parameters(), lr=1.0), method, generator=seeded(), state=state)
    step(empty)
    assert all(torch.equal(weights[name], p) for name, p in network.named_parameters())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_mean_over_no_examples_is_refused(method: fg.Estimator, model: str) -> None:
    network, _, empty = build(model)
    state: dict[str, Tensor] = {}
    step = fg.TrainingStep(
        lambda m: F.cross_entropy(m(empty), NONE), network, torch.optim.SGD(network.parameters(), lr=1.0), method, generator=seeded()
    )
    before = [p.detach().clone() for p in network.parameters()]
    with pytest.raises(ValueError, match="the batch has no examples, and their mean loss is nan: leave empty batches out"):
        fg.estimate_grad_(lambda m: F.cross_entropy(m(empty), NONE), network, method, generator=seeded(), state=state)
    with pytest.raises(ValueError, match="the batch has no examples"):
        step()
    with pytest.raises(ValueError, match="the loss has no element, but shape"):
        fg.estimate_grad_(lambda m: F.cross_entropy(m(empty), NONE, reduction="none"), network, method, generator=seeded(), state=state)
    assert not any(bool(t.any()) for t in state.values())
    assert all(p.grad is None for p in network.parameters())
    assert all(map(torch.equal, before, network.parameters()))


@pytest.mark.parametrize("perturb", [kind() for kind in fg.PERTURBATIONS], ids=lambda p: p.name)
def test_a_penalty_on_weights_keeps_its_gradient(perturb: fg.Perturbation) -> None:
    """One direction: ĝ·∇f = d², whatever it is."""
    network, _, empty = build("perceptron")

    def loss(m: nn.Module) -> Tensor:
        return summed(m, empty) + m[0].weight.square().sum()

    record = fg.estimate_grad_(loss, network, fg.ForwardGradient(perturb=perturb), generator=seeded())
    along = float((network[0].weight.grad * 2 * network[0].weight.detach()).sum())
    assert along == pytest.approx(float(record.derivatives) ** 2, rel=1e-9)
    assert along > 0


BATCHED = [kind() for kind in fg.PERTURBATIONS if kind is not fg.SplitWeights]  # whose directions take turns


@pytest.mark.parametrize("perturb", BATCHED, ids=lambda p: p.name)
def test_ensembles_do_the_same(perturb: fg.Perturbation) -> None:
    models = [build("perceptron")[0] for _ in range(2)]
    ensemble, empty = fg.Ensemble(models), torch.zeros(2, 0, 4, dtype=torch.float64)
    generators, method = [seeded(0), seeded(1)], fg.ForwardGradient(tangents=2, perturb=perturb)
    fg.estimate_grads_(lambda m, x: m(x).square().sum(), ensemble, (empty,), method, generators=generators)
    assert all(not bool(p.grad.any()) for model in models for p in model.parameters())
    with pytest.raises(ValueError, match="the batch has no examples"):
        fg.estimate_grads_(lambda m, x: m(x).square().mean(), ensemble, (empty,), method, generators=generators)


@pytest.mark.parametrize(
    "method", [fg.Backprop(), fg.ForwardGradient(), fg.ForwardGradient(perturb=fg.Activity()), fg.ZerothOrder()], ids=repr
)
def test_a_lazy_module_is_to_be_called_once_before(method: fg.Estimator) -> None:
    network = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, 3))
    x = rows(4, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"model\.0\.weight has no shape yet, .* call the model once on a batch"):
        fg.estimate_grad_(lambda m: summed(m, x), network, method, generator=seeded())
    network(x)
    fg.estimate_grad_(lambda m: summed(m, x), network, method, generator=seeded())
    assert network[0].weight.grad.shape == (5, 4)
