"""A model that takes other calls while it is compiled is surveyed for those, and gets its graph."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from tests.engines.test_engines import uncompiled  # noqa: F401  # a fixture
from tests.support.cases import rows, seeded
from torch import Tensor, nn

import forwardgrad as fg


class Masked(nn.Module):
    """Its mask is made by other calls in a graph, as those of transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        mask = torch.ones_like(h).mul(2.0) if torch.compiler.is_compiling() else torch.full_like(h, 2.0)
        return self.b(h * mask)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("perturb", [fg.Activity(), fg.PerExample()], ids=lambda p: p.name)
def test_a_model_that_knows_that_it_is_compiled_gets_a_graph(perturb: fg.Perturbation) -> None:
    x, y = rows(6, 4), torch.arange(6) % 3
    moved = []
    for engine in ("eager", "compile"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Masked().double()
        step = fg.TrainingStep(
            lambda m, x, y: F.cross_entropy(m(x), y),
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            fg.ForwardGradient(perturb=perturb),
            generator=seeded(),
            engine=engine,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*falls back")
            for _ in range(3):
                step(x, y)
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-9, atol=1e-12)
