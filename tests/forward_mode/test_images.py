"""What a compiler is given instead of pooling, ReLUs and sums of taps: the same numbers as torch's own, at the edges too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.engines.test_engines import compare, loss, sgd
from tests.estimators.test_contract import short
from tests.support.cases import rows, seeded
from torch import Tensor, nn
from torch.func import jvp

import forwardgrad as fg
from forwardgrad.engines import compiled
from forwardgrad.forward_mode.rules.images import pooled, shifted, windows

aten = torch.ops.aten
LAST = torch.channels_last
ODD = torch.tensor([0.0, 0.0, 1.0, 1.0, -1.0, -2.0, float("inf"), -float("inf"), float("nan")], dtype=torch.float64)


def images(shape: tuple[int, ...], form: torch.memory_format, *, odd: bool) -> Tensor:
    """Images of ordinary numbers, or of few different ones, so that windows have ties, infinities and what is no number."""
    x = ODD[torch.randint(len(ODD), shape, generator=seeded(1))] if odd else rows(*shape)
    return x.contiguous(memory_format=form)


@pytest.mark.parametrize("rectified", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("odd", [False, True], ids=["ordinary", "odd"])
@pytest.mark.parametrize("form", [torch.contiguous_format, LAST], ids=["contiguous", "channels last"])
@pytest.mark.parametrize(
    ("shape", "size"), [((3, 5, 6, 8), (2, 2)), ((2, 3, 7, 5), (2, 2)), ((2, 2, 9, 4), (3, 1)), ((1, 1, 2, 2), (2, 2))]
)
def test_pooling_element_by_element_is_pooling(
    shape: tuple[int, ...], size: tuple[int, int], form: torch.memory_format, odd: bool, rectified: bool
) -> None:
    x, moves = images(shape, form, odd=odd), torch.stack([rows(*shape).contiguous(memory_format=form) * k for k in (1, 2, 3)])
    values = F.relu(x) if rectified else x
    wanted, winners = F.max_pool2d(values, size, return_indices=True)
    out, found = pooled(values, moves, size, rectified=rectified)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)
    assert out.is_contiguous(memory_format=form)
    for moved, tangent in zip(moves, found, strict=True):
        at_winners = moved.flatten(2).gather(2, winners.flatten(2)).view_as(wanted)
        assert torch.equal(tangent, torch.where(wanted <= 0, 0.0, at_winners) if rectified else at_winners)
        if not odd:
            assert torch.equal(tangent, jvp(lambda x: F.max_pool2d(F.relu(x) if rectified else x, size), (x,), (moved,))[1])


@pytest.mark.parametrize(
    ("call", "size"),
    [
        ({"kernel_size": 2}, (2, 2)),
        ({"kernel_size": (3, 2), "stride": (3, 2)}, (3, 2)),
        ({"kernel_size": [2], "stride": []}, (2, 2)),
        ({"kernel_size": 2, "padding": 0, "dilation": (1, 1), "ceil_mode": False}, (2, 2)),
        ({"kernel_size": 3, "ceil_mode": True}, (3, 3)),
        ({"kernel_size": 3, "stride": 2}, None),
        ({"kernel_size": 2, "padding": 1}, None),
        ({"kernel_size": 2, "dilation": 2}, None),
        ({"kernel_size": 4, "ceil_mode": True}, None),
        ({"kernel_size": 4}, None),
        ({"kernel_size": (1, 10)}, None),
    ],
)
def test_windows_stand_side_by_side_or_are_left_to_torch(call: dict[str, Any], size: tuple[int, int] | None) -> None:
    assert windows({"input": torch.zeros(1, 1, 9, 6), **call}) == size


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 2)])
@pytest.mark.parametrize(("size", "dilation"), [((3, 3), (1, 1)), ((2, 3), (3, 2)), ((1, 1), (1, 1))])
def test_a_sum_of_shifted_taps_is_a_convolution(
    count: int, stride: tuple[int, int], padding: tuple[int, int], size: tuple[int, int], dilation: tuple[int, int]
) -> None:
    x, filters = rows(2, 4, 9, 8), rows(count, 4, *size)
    each = x.movedim(1, 3) @ filters.flatten(2).permute(2, 0, 1).flatten(0, 1).T
    found = shifted(each, count, size, stride, padding, dilation)
    torch.testing.assert_close(found, F.conv2d(x, filters, None, stride, padding, dilation))


def network(*, inplace: bool = False, form: torch.memory_format = LAST, pool: nn.Module | None = None, groups: int = 1) -> nn.Module:
    """Convolutions of few and of many channels, padded and not, strided and not; odd sizes, so that pooling leaves a row out."""
    torch.manual_seed(4)
    layers = [
        nn.Conv2d(2, 16, 3, padding=1),
        nn.ReLU(inplace),
        nn.Conv2d(16, 20, 3, groups=groups),
        nn.ReLU(inplace),
        pool or nn.MaxPool2d(2),
    ]
    layers += [nn.Conv2d(20, 18, (3, 2), stride=(1, 2), padding=1), nn.MaxPool2d(2), nn.ReLU(inplace), nn.Flatten(), nn.LazyLinear(3)]
    model = nn.Sequential(*layers)
    model(torch.zeros(1, 2, 13, 11))
    return model.to(memory_format=form)  # type: ignore[call-overload, no-any-return]


KINDS: dict[str, dict[str, Any]] = {
    "": {},
    "in place": {"inplace": True},
    "contiguous": {"form": torch.contiguous_format},
    "overlapping": {"pool": nn.MaxPool2d(3, stride=2)},
    "padded": {"pool": nn.MaxPool2d(2, padding=1)},
    "ceil": {"pool": nn.MaxPool2d(2, ceil_mode=True)},
    "groups": {"groups": 4},
}
METHODS = [
    fg.Backprop(),
    fg.ForwardGradient(),
    fg.ForwardGradient(tangents=3),
    fg.ForwardGradient(perturb=fg.LowRank()),
    fg.ForwardGradient(perturb=fg.LowRank(), tangents=3),
    fg.ForwardGradient(perturb=fg.LowRank(2), tangents=2),
    fg.ForwardGradient(perturb=fg.PerExample()),
    fg.ForwardGradient(perturb=fg.Activity(), tangents=2),
]


PAIRS = [("", method) for method in METHODS] + [
    (kind, method) for kind in list(KINDS)[1:] for method in (METHODS[2], METHODS[3], METHODS[4])
]


def stepped(kind: str, method: fg.Estimator, close: float, dtype: torch.dtype = torch.float64) -> None:
    """Steps of the engine are those of the eager one."""
    options = KINDS[kind]
    x = rows(5, 2, 13, 11, dtype=dtype).contiguous(memory_format=options.get("form", LAST))
    take = lambda step: [step(x, torch.arange(5) % 3) for _ in range(3)]  # noqa: E731
    compare(lambda: network(**options).to(dtype), method, sgd, run=take, graphs=1, close=close)


@pytest.mark.some(4)
@pytest.mark.product
@pytest.mark.parametrize(("kind", "method"), PAIRS, ids=[f"{kind}-{short(method)}" for kind, method in PAIRS])
def test_convolutions_take_the_same_steps_in_a_graph(kind: str, method: fg.Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "compiled", lambda traced, inputs: traced.graph)
    stepped(kind, method, 1e-9)
    if not kind:
        stepped(kind, method, 2e-4, torch.float32)


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "method"), [("", METHODS[2]), ("", METHODS[4]), ("contiguous", METHODS[3])], ids=["dense", "rank 1", "contiguous"]
)
def test_convolutions_take_the_same_steps_compiled(kind: str, method: fg.Estimator) -> None:
    stepped(kind, method, 1e-9)


@pytest.mark.full
@pytest.mark.parametrize("where", ["input", "weight"])
def test_what_is_not_a_number_stays_so(where: str) -> None:
    def run(engine: str) -> tuple[Tensor, Tensor, bool]:
        model, images, labels = (
            network().float(),
            rows(5, 2, 13, 11, dtype=torch.float32).contiguous(memory_format=LAST),
            torch.arange(5) % 3,
        )
        step = fg.TrainingStep(loss, model, sgd(model), METHODS[3], generator=seeded(3), engine=engine)  # type: ignore[arg-type]
        for _ in range(2):
            step(images, labels)
        with torch.no_grad():
            (images[0, 0] if where == "input" else model[0].weight[0, 0])[1, 1] = torch.nan  # type: ignore[index, union-attr]
        record = step(images, labels)
        return record.loss, record.derivatives, all(bool(p.isnan().all()) for p in model.parameters())

    for engine in ("eager", "compile"):
        found, derivatives, spread = run(engine)
        assert found.isnan()
        assert derivatives.isnan().all()
        assert spread


@pytest.mark.parametrize(("kernel", "size", "batch", "count"), [(1, 5, 4, 3), (1, 3, 4, 3), ((3, 1), 5, 4, 2), (2, 5, 8, 3), (3, 4, 2, 3)])
def test_small_images_of_many_channels_are_no_exception(
    kernel: Any, size: int, batch: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "compiled", lambda traced, inputs: traced.graph)

    def model() -> nn.Module:
        torch.manual_seed(4)
        layers = [nn.Conv2d(2, 16, 1), nn.ReLU(), nn.Conv2d(16, 20, kernel), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)]
        made = nn.Sequential(*layers)
        made(torch.zeros(1, 2, size, size))
        return made.to(memory_format=LAST, dtype=torch.float64)  # type: ignore[call-overload, no-any-return]

    x, labels = rows(batch, 2, size, size).contiguous(memory_format=LAST), torch.arange(batch) % 3
    method = fg.ForwardGradient(perturb=fg.LowRank(), tangents=count)
    compare(model, method, sgd, run=lambda step: [step(x, labels) for _ in range(3)], graphs=1, close=1e-9)
