"""Where a model may be cut: balanced, or as it is asked for, and never inside a block."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn

import forwardgrad as fg


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),  # 0 to 3
        *(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()),  # 4 to 7
        *(nn.Linear(24, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)),  # 8 to 11
    )


def widths(stages: list[nn.Sequential]) -> list[int]:
    return [sum(p.numel() for p in stage.parameters()) for stage in stages]


def test_stages_hold_the_modules_of_the_model_under_their_names() -> None:
    model = network()
    stages = fg.split_stages(model, 3, at=(4, 8))
    assert [len(stage) for stage in stages] == [4, 4, 4]
    assert list(model.state_dict()) == [name for stage in stages for name in stage.state_dict()]
    assert all(one is other for one, other in zip(model, (module for stage in stages for module in stage), strict=True))
    assert fg.split_stages(model, 1)[0].state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_largest_stage_is_as_small_as_can_be(count: int) -> None:
    model = nn.Sequential(*(module for width in (3, 40, 7, 60, 5, 5, 30) for module in (nn.Linear(width, width), nn.ReLU())))
    sizes = [width * (width + 1) for width in (3, 40, 7, 60, 5, 5, 30)]
    ways = combinations(range(1, len(sizes)), count - 1)
    best = min(max(sum(sizes[start:end]) for start, end in zip((0, *cuts), (*cuts, len(sizes)), strict=True)) for cuts in ways)
    assert max(widths(fg.split_stages(model, count))) == best


def test_a_model_is_cut_without_memory_for_it() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(10**6, 10**6), nn.ReLU(), nn.Linear(10**6, 3))
    assert widths(fg.split_stages(model, 2)) == [10**12 + 10**6, 3 * 10**6 + 3]


@pytest.mark.parametrize(
    ("at", "said"),
    [
        ((1,), "BatchNorm2d belongs to the block of the Conv2d in front of it: choose from 4, 7, 8, 9$"),
        ((2,), "ReLU belongs to the block of the"),
        ((3,), "MaxPool2d belongs to the block of the"),
        ((6,), "ReLU belongs to the block"),
        ((10,), "the LayerNorm in front of it belongs to the block of the next layer"),
        ((11,), "the LayerNorm in front of it"),
        ((7, 8), "the stage of modules 7 to 7 has no block of its own"),
        ((8, 4), "rising numbers"),
        ((12,), "rising numbers"),
        ((0,), "rising numbers"),
        (("4",), "rising numbers"),
        ((4,), None),
        ((4, 9), None),
    ],
)
def test_a_cut_lies_behind_a_block(at: tuple[int, ...], said: str | None) -> None:
    if said is None:
        fg.split_stages(network(), len(at) + 1, at=at)
        return
    with pytest.raises(ValueError, match=said):
        fg.split_stages(network(), len(at) + 1, at=at)


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="a Linear cannot be cut"):
        fg.split_stages(nn.Linear(3, 3), 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="into 4 stages at most, and not into 5"):
        fg.split_stages(network(), 5)
    with pytest.raises(ValueError, match="whole number of at least 1"):
        fg.split_stages(network(), 0)
    with pytest.raises(ValueError, match="3 stages begin at 2 modules"):
        fg.split_stages(network(), 3, at=(4,))
    tied = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"0\.weight and 2\.weight are one parameter"):
        fg.split_stages(tied, 2)


def test_what_is_not_trained_is_no_block() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="there is no block in front of it"):
        fg.split_stages(model, 2, at=(2,))
    assert [len(stage) for stage in fg.split_stages(model, 2)] == [4, 1]
