"""A model may keep what its layers gave. After a step that is plain tensors: they hold no tangents, and can be saved and copied."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from tests.estimators.test_contract import NO_BACKWARD
from tests.support.cases import seeded
from torch import Tensor, nn

import forwardgrad as fg

# Where several directions of zeroth order share an evaluation, a model keeps what it was given inside torch's `vmap`.
METHODS = [method for method in NO_BACKWARD if not (isinstance(method, fg.ZerothOrder) and method.chunk_size is None)]


class Keeping(nn.Module):
    """Two layers that leave their outputs behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = {"hidden": torch.relu(self.first(x))}
        self.kept["logits"] = self.second(self.kept["hidden"])
        self.kept["passed on"] = self.kept["logits"].detach()
        return self.kept["logits"]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_model_with_kept_outputs_is_saved_and_copied_after_a_step(method: fg.Estimator) -> None:
    model, x, y = Keeping(), torch.randn(6, 5, generator=seeded(0)), torch.arange(6) % 3
    loss_fn = nn.CrossEntropyLoss()
    state: dict[str, Tensor] = {}
    for seed in range(2):  # the second step of some methods goes another way
        fg.estimate_grad_(lambda model: loss_fn(model(x), y), model, method, generator=torch.Generator().manual_seed(seed), state=state)
    file = io.BytesIO()
    torch.save(model.kept, file)
    file.seek(0)
    loaded, copied = torch.load(file, weights_only=True), copy.deepcopy(model).kept
    for name, kept in model.kept.items():
        assert not vars(kept), f"{name} still carries {list(vars(kept))}"
        assert torch.equal(loaded[name], kept)
        assert torch.equal(copied[name], kept)
