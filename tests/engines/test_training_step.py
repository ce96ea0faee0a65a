import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import rows, seeded
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.engines import compiled
from forwardgrad.training_step import EngineName


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def test_a_step_is_zero_grad_estimate_and_the_optimizers_move() -> None:
    x, y = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0, 1, 2])
    results = []
    for whole in (True, False):
        torch.manual_seed(0)
        model, generator = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.Generator().manual_seed(2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        step = fg.TrainingStep(loss, model, optimizer, fg.ForwardGradient(tangents=3), generator=generator)
        for _ in range(3):
            if whole:
                record = step(x, y)
            else:
                optimizer.zero_grad()
                record = fg.estimate_grad_(lambda m: loss(m, x, y), model, fg.ForwardGradient(tangents=3), generator=generator)
                optimizer.step()
        results.append([record.loss, record.derivatives, *model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_nesterov_is_asked_at_its_look_ahead_point() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    step = fg.TrainingStep(
        lambda m, x: m(x).square().sum() / 2, model, fg.Nesterov(model.parameters(), 0.1, momentum=0.5), fg.Backprop(), state={}
    )
    step(torch.ones(1, 1))  # θ = 1 → 0.9, velocity −0.1
    step(torch.ones(1, 1))  # gradient at 0.85: velocity −0.05 − 0.085
    assert torch.allclose(model.weight, torch.tensor(0.765))


def weighted(model: nn.Module, x: Tensor, y: Tensor, weights: Tensor, scale: float = 1.0) -> Tensor:
    return scale * (F.cross_entropy(model(x), y, reduction="none") * weights).mean()


@pytest.mark.parametrize("engine", ["eager", "compile"])
def test_a_batch_may_be_given_by_name(engine: EngineName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "compiled", lambda traced, inputs: traced.graph)
    x, y, w = rows(6, 5, dtype=torch.float32), torch.arange(6) % 3, torch.arange(6.0)
    calls = {
        "position": lambda step: step(x, y, w, 2.0),
        "mixed": lambda step: step(x, y, weights=w, scale=2.0),
        "name": lambda step: step(y=y, x=x, scale=2.0, weights=w),
    }
    found = []
    for call in calls.values():
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        step = fg.TrainingStep(
            weighted,
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            fg.ForwardGradient(perturb=fg.LowRank()),
            generator=seeded(),
            engine=engine,
        )
        found.append([call(step).loss for _ in range(3)] + [model.weight])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
