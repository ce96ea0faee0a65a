import torch
import torch.nn.functional as F
from torch import Tensor, nn

import forwardgrad as fg


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
