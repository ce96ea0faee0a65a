"""Networks in sizes: parameters against formulas, what a name means, and that estimators train them with batch norm's statistics right."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import forwardgrad as fg
from forwardgrad.engines import compiled as engine
from forwardgrad.lab import models
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import Optimizer, Run, family_of

CIFAR = (3, 32, 32)
LOCAL = fg.LocalLosses(feedback=True, head="pooled", cells=4)


def counted(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def chain(widths: list[int], units: int, dense: int | None = None) -> int:
    """3×3 convolutions without bias and two numbers of batch norm a channel, dense units likewise, and a classifier of ten with a bias."""
    convolutions = sum(9 * a * b + 2 * b for a, b in zip([3, *widths], widths, strict=False))
    return convolutions + (units * dense + 2 * dense if dense else 0) + 10 * (dense or units) + 10


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vgg8b", chain([128, 256, 256, 512, 512, 512], 4 * 512, 1024)),
        ("vgg8b-w4", chain([32, 64, 64, 128, 128, 128], 4 * 128, 256)),
        ("vgg8b-x2", chain([256, 512, 512, 1024, 1024, 1024], 4 * 1024, 2048)),
        ("vgg16", chain([64, 64, 128, 128, *[256] * 3, *[512] * 6], 512)),
        ("vgg19", chain([64, 64, 128, 128, *[256] * 4, *[512] * 8], 512)),
        ("vgg19-w8", chain([8, 8, 16, 16, *[32] * 4, *[64] * 8], 64)),
    ],
)
def test_parameters_of_vgg(name: str, expected: int) -> None:
    model = models.build(name, CIFAR, 10)
    assert counted(model) == expected
    assert model(torch.rand(2, *CIFAR)).shape == (2, 10)


@pytest.mark.parametrize(("depth", "factor"), [(8, 1), (20, 1), (20, 2), (56, 1)])
def test_parameters_of_resnet(depth: int, factor: int) -> None:
    a, b, c = (size * factor for size in (16, 32, 64))
    pairs = [(3, a), *[(a, a)] * (depth // 6 * 2)]
    for narrow, wide in ((a, b), (b, c)):
        pairs += [(narrow, wide), *[(wide, wide)] * (depth // 6 * 2 - 1)]
    model = models.build(f"resnet{depth}" + (f"-x{factor}" if factor > 1 else ""), CIFAR, 10)
    assert counted(model) == sum(9 * m * n + 2 * n for m, n in pairs) + 10 * c + 10
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) == depth
    assert model(torch.rand(2, *CIFAR)).shape == (2, 10)


def test_resnet20_is_as_large_as_the_papers() -> None:
    assert counted(models.build("resnet20", CIFAR, 10)) == 269_722  # "0.27M" in table 6 of He et al.


def test_a_shortcut_takes_every_second_position_and_adds_zeros() -> None:
    x = torch.rand(2, 4, 5, 5)
    block = next(m for m in models.build("resnet8-w4", CIFAR, 10) if hasattr(m, "shortcut") and m.shortcut.new)
    found = block.shortcut(x)  # type: ignore[operator]
    assert found.shape == (2, 8, 3, 3)
    assert torch.equal(found[:, :4], x[:, :, ::2, ::2])
    assert not found[:, 4:].any()


def test_names() -> None:
    wide = family_of("resnet32-x2")
    assert wide is not None
    assert (wide.name, wide.depth, wide.wide(16)) == ("resnet", 32, 32)
    assert all(family_of(name) is None for name in ("nn", "vgg8", "vgg8b-4", "vgg8b-w", "resnet", "resnet20-w2-x2", "mine:resnet20"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet21", "6n \\+ 2 layers"),
        ("resnet2", "6n \\+ 2 layers"),
        ("vgg8b-w1", "a factor from 2 to 64"),
        ("vgg16-x100", "a factor from 2 to 64"),
        ("vgg8", "vgg8b, vgg16, vgg19, resnet20"),
    ],
)
def test_sizes_that_there_are_not(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Run("cifar10", name, {"name": "backprop"}, Optimizer("sgd", 0.1))


def test_images_that_are_too_small_are_told() -> None:
    with pytest.raises(UserError, match="needs images of 16 × 16 at least, not 8 × 8"):
        models.build("vgg8b-w4", (1, 8, 8), 10)


def shortest() -> nn.Module:
    """The stem, the first block of a narrower stage and the classifier of a ResNet: each kind of block that it has, once."""
    layers = list(models.build("resnet8-w4", (3, 16, 16), 10))  # type: ignore[call-overload]
    return nn.Sequential(*layers[:3], layers[4], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def trained(name: str, estimator: fg.Estimator, engine: str, steps: int = 3) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    model = models.build(name, (3, 16, 16), 10) if name else shortest()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(8, 3, 16, 16), torch.randint(10, (8,))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    step = fg.TrainingStep(lambda m, x, y: F.cross_entropy(m(x), y), model, optimizer, estimator, generator=generator, engine=engine)  # type: ignore[arg-type]
    return model, [float(step(x, y).loss) for _ in range(steps)]


@pytest.mark.parametrize("name", ["vgg8b-w32", "resnet8-w4"])
@pytest.mark.parametrize("estimator", [fg.Backprop(), LOCAL], ids=["backprop", "local"])
def test_running_statistics_are_those_of_one_pass_a_step_and_evaluation_uses_them(name: str, estimator: fg.Estimator) -> None:
    """The first batch norm sees what a plain pass of the first convolution gives; without a move they all are those of plain passes."""
    model, losses = trained(name, estimator, "eager", steps=1)
    torch.manual_seed(0)
    plain, x = models.build(name, (3, 16, 16), 10), torch.rand(8, 3, 16, 16)
    plain(x)  # the statistics of one ordinary pass with the weights at their start
    for (key, found), (_, expected) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=key)
    assert math.isfinite(losses[0])
    model.eval()
    with torch.no_grad():
        alone, together = model(x[:1]), model(x)[:1]
    torch.testing.assert_close(alone, together)  # in evaluation the other examples do not matter
    assert {int(b) for key, b in model.named_buffers() if key.endswith("num_batches_tracked")} == {1}


@pytest.mark.parametrize("name", ["vgg8b-w32", "resnet8-w4"])
def test_local_losses_leave_no_weight_without_a_gradient(name: str) -> None:
    model = models.build(name, (3, 16, 16), 10)
    x, y, generator, state = torch.rand(8, 3, 16, 16), torch.randint(10, (8,)), torch.Generator().manual_seed(0), {}
    for _ in range(2):  # heads are zeros at first, so blocks learn from the second step on
        model.zero_grad()
        fg.estimate_grad_(lambda m: F.cross_entropy(m(x), y), model, LOCAL, generator=generator, state=state)
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_step_as_a_graph_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a short network with all that a block may hold. The compiler, which takes a minute for it, has local losses of convolutions and
    batch norm in `test_seeded`."""
    monkeypatch.setattr(engine, "compiled", lambda traced, inputs: traced.graph)
    (eager, losses), (compiled, found) = (trained("", LOCAL, engine) for engine in ("eager", "compile"))
    assert found == pytest.approx(losses, rel=1e-3)
    for (key, a), (_, b) in zip(eager.named_buffers(), compiled.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3, msg=key)
