"""Blocks that learn before the loss is there: the step is that of the whole model, or one warning says that it is not quite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.layerwise import CLASSES, batch, both, loss, perceptron, same, take
from torch import Tensor, nn

import forwardgrad as fg

FACTOR, PATH = "the loss has another factor, label or option than in the step before", "the model took another path through its calls"


class Body(nn.Module):
    """Layers a model of one's own puts together."""

    def __init__(self, run: Callable[[Body, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run = run
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.last = nn.BatchNorm1d(6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.run(self, x))
        return out


def body(run: Callable[[Body, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Body(run).double()


def tied(m: Body, x: Tensor) -> Tensor:
    return F.relu(m.first(F.relu(m.second(F.relu(m.first(x))))))


def tied_norm(m: Body, x: Tensor) -> Tensor:
    return F.relu(m.norm(m.second(F.relu(m.norm(m.first(x))))))


def read_behind(m: Body, x: Tensor) -> Tensor:
    h = F.relu(m.second(F.relu(m.first(x))))
    return h @ m.first.weight.detach()


def data_behind(m: Body, x: Tensor) -> Tensor:
    h = F.relu(m.second(F.relu(m.first(x))))
    return h * m.first.weight.data.norm()


def written_to(m: Body, x: Tensor) -> Tensor:
    h = F.relu(m.first(x))
    h.mul_(2)
    h[:, 0] = 0
    return F.relu(m.second(F.dropout(h, 0.5, inplace=True)))


def skipping(m: Body, x: Tensor) -> Tensor:
    h = F.relu(m.first(x))
    return F.relu(m.second(h) + h)


def smaller(number: int) -> tuple[Any, ...]:
    return batch(number, (12, 5, 1)[number % 3])


def whole_numbers(number: int) -> tuple[Any, ...]:
    x, y = batch(number)
    return x, y.int()


def other_order(number: int) -> tuple[Any, ...]:
    x, y = batch(number)
    return x, ([x, y] if number < 3 else [y, x])


def fewer(number: int) -> tuple[Any, ...]:
    x, y = batch(number)
    return x, ([x, y] if number < 3 else [y])


def one_of(model: nn.Module, x: Tensor, tensors: list[Tensor]) -> Tensor:
    return F.cross_entropy(model(x), next(t for t in tensors if t.dim() == 1))


def eval_at_times(number: int, step: fg.TrainingStep) -> None:
    step.model.train(number % 3 != 2)


def frozen_at_times(number: int, step: fg.TrainingStep) -> None:
    step.model.get_parameter("2.weight").requires_grad_(number not in (2, 3))


def with_dropout() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, CLASSES)]
    return nn.Sequential(*layers).double()


def tagger() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Embedding(9, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, CLASSES)]
    return nn.Sequential(*layers).double()


def sentences(number: int) -> tuple[Any, ...]:
    generator, length = torch.Generator().manual_seed(number), 5 + number % 2
    tags = torch.randint(CLASSES, (4, length), generator=generator)
    return torch.randint(9, (4, length), generator=generator), tags.masked_fill(tags == number % 3, -100)


def by_token(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).transpose(1, 2), y)


# Name: what is asked of `take`, and whether blocks do learn early in some step.
EQUAL: dict[str, tuple[dict[str, Any], bool]] = {
    "as it is": ({}, True),
    "similarity": ({"similarity": 0.4}, True),
    "sum over examples": ({"loss": lambda m, x, y: F.cross_entropy(m(x), y, reduction="sum")}, True),
    "loss an example": ({"loss": lambda m, x, y: F.cross_entropy(m(x), y, reduction="none")}, True),
    "factor": ({"loss": lambda m, x, y: 0.3 * F.cross_entropy(m(x), y)}, True),
    "tensor as a factor": ({"loss": lambda m, x, y: F.cross_entropy(m(x), y) * y.double().mean()}, False),
    "ignored labels": ({"batch": lambda n: (batch(n)[0], batch(n)[1].masked_fill(torch.arange(12) % 4 == n % 4, -100))}, True),
    "batches of other sizes": ({"batch": smaller, "steps": 9}, True),
    "labels made inside": ({"batch": whole_numbers, "loss": lambda m, x, y: F.cross_entropy(m(x), y.long())}, False),
    "labels in another place": ({"batch": other_order, "loss": one_of}, True),
    "fewer tensors": ({"batch": fewer, "loss": one_of}, True),
    "penalty": ({"loss": lambda m, x, y: F.cross_entropy(m(x), y) + 0.1 * m[0].weight.square().sum()}, False),
    "a target for every token": ({"make": tagger, "batch": sentences, "loss": by_token}, True),
    "fewer classes than words": ({"make": tagger, "batch": sentences, "loss": by_token, "classes": 2}, True),
    "targets laid flat": (
        {"make": tagger, "batch": sentences, "loss": lambda m, x, y: F.cross_entropy(m(x).flatten(0, 1), y.flatten())},
        False,
    ),
    "tied weights": ({"make": body(tied)}, False),
    "tied norm": ({"make": body(tied_norm)}, False),
    "read behind its block": ({"make": body(read_behind)}, False),
    "data behind its block": ({"make": body(data_behind)}, False),
    "values written to": ({"make": body(written_to)}, True),
    "residual sum": ({"make": body(skipping)}, True),
    "dropout": ({"make": with_dropout}, True),
    "train and eval": ({"make": with_dropout, "between": eval_at_times, "steps": 9}, True),
    "frozen at times": ({"between": frozen_at_times, "steps": 7}, True),
    "some layers": ({"ends": ("2.*",)}, False),
}


@pytest.mark.some(10)
@pytest.mark.parametrize("name", EQUAL)
def test_a_step_is_that_of_the_whole_model(name: str) -> None:
    options, early = EQUAL[name]
    one, other = both(**options)
    same(one, other)
    assert one.empty
    assert (one.early > 0) == early
    assert other.early == 0
    assert one.said == other.said


class Told(nn.Module):
    """Layers are left out as a coin says, in some steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.last = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)]), nn.Linear(6, CLASSES)
        self.skipped = -1

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = x if index == self.skipped else F.relu(layer(x))
        out: Tensor = self.last(x)
        return out


class Coins(Told):
    """Layers are left out by torch's coins, which fall alike where an evaluation is made again."""

    def forward(self, x: Tensor) -> Tensor:
        self.skipped = int(torch.randint(4, ()))
        return super().forward(x)


def skip_the_third(number: int, step: fg.TrainingStep) -> None:
    step.model.skipped = 2 if number in (3, 4, 6) else -1


def changing_factor(number: int, step: fg.TrainingStep) -> None:
    step.model.factor = (1.0, 1.5)[number >= 3]


def changing_number(number: int, step: fg.TrainingStep) -> None:
    step.model.factor = (1, 2)[number >= 3]


def either_label(number: int) -> tuple[Any, ...]:
    x, y = batch(number)
    return x, y, (y + 1) % CLASSES, number


CHANGING: dict[str, tuple[str, dict[str, Any]]] = {
    "factor": (FACTOR, {"loss": lambda m, x, y: F.cross_entropy(m(x), y) * m.factor, "between": changing_factor}),
    "whole number as a factor": (PATH, {"loss": lambda m, x, y: F.cross_entropy(m(x), y) * m.factor, "between": changing_number}),
    "labels": (FACTOR, {"batch": either_label, "loss": lambda m, x, y, z, n: F.cross_entropy(m(x), y if n < 3 else z)}),
    "class weights": (FACTOR, {"loss": lambda m, x, y: F.cross_entropy(m(x), y, weight=1 + torch.bincount(y, minlength=CLASSES).double())}),
    "smoothing": (FACTOR, {"loss": lambda m, x, y: F.cross_entropy(m(x), y, label_smoothing=m.factor / 4), "between": changing_factor}),
    "coins": (PATH, {"make": lambda: Coins().double()}),
    "path": (PATH, {"make": lambda: Told().double(), "between": skip_the_third}),
}


@pytest.mark.parametrize("name", CHANGING)
def test_what_did_not_hold_is_told_once_and_not_relied_on_again(name: str) -> None:
    text, options = CHANGING[name]
    one, other = both(**options, steps=10)
    assert [warning for warning in one.said if "blocks of this step had learned" in warning] == one.said
    assert len(one.said) == 1
    assert one.said[0].startswith(text)
    assert other.said == []
    assert 0 < one.early < 9
    assert torch.equal(one.numbers()["passes"], other.numbers()["passes"])


def test_a_path_that_changes_in_the_middle_teaches_each_block_once() -> None:
    """Adam of each classifier counts one step a step, and so does the optimizer's for each layer that is on the path."""
    one = take(lambda: Told().double(), between=skip_the_third, steps=8)
    assert len(one.said) == 1
    steps = [float(one.step.state[f"head.{index}.step.weight"]) for index in range(4)]
    assert steps == [8, 8, 8, 5]
    model, moved = one.step.model, one.step.optimizer.state
    assert [float(moved[model.get_parameter(f"layers.{index}.weight")]["step"]) for index in range(4)] == [8, 8, 5, 8]
    assert float(moved[model.get_parameter("last.weight")]["step"]) == 8


def test_the_early_blocks_of_a_strayed_step_moved_as_those_of_the_whole_model() -> None:
    """Only what lies behind the change is other than meant, since it saw blocks that had moved."""
    one, other = both(lambda: Told().double(), between=skip_the_third, steps=4)
    for name in ("layers.0.weight", "layers.0.bias"):
        assert torch.equal(one.step.model.state_dict()[name], other.step.model.state_dict()[name])
    found, wanted = (taken.step.model.state_dict()["last.weight"] for taken in (one, other))
    assert not torch.equal(found, wanted)
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.01)


def test_methods_whose_blocks_end_elsewhere_do_not_take_each_others_word() -> None:
    """Two methods under one loss and model: what one knows of a path is nothing that the other may learn by."""
    found = []
    for kinds in ((fg.LocalLosses, fg.LocalLosses), (_Late, _Late)):
        model = perceptron()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        every, some = (kind(feedback=True, ends=ends) for kind, ends in zip(kinds, (None, ("0.*", "4.*")), strict=True))
        steps = [fg.TrainingStep(loss, model, optimizer, method, generator=torch.Generator(), state={}) for method in (every, some)]
        for number in range(6):
            steps[number % 2](*batch(number))
        found.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


class _Late(fg.LocalLosses):
    layerwise = False  # type: ignore[assignment]


def test_a_transform_of_torch_func_behind_blocks_is_refused() -> None:
    def squared(m: Body, x: Tensor) -> Tensor:
        h = F.relu(m.first(x))
        if m.transformed:
            h = torch.func.vmap(lambda row: m.second.weight @ row)(h)
        return F.relu(m.third(h))

    def turn(number: int, step: fg.TrainingStep) -> None:
        step.model.transformed = number >= 3

    with pytest.raises(RuntimeError, match=r"inside torch\.func\.grad, vmap or jvp"):
        take(body(squared), between=turn)  # type: ignore[arg-type]
