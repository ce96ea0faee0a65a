"""Models and losses that the library is tested on: small, float64 unless the name says otherwise, the same weights at every call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forwardgrad.testing import Case as Case
from forwardgrad.testing import Loss as Loss


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape)))


def classify(x: Tensor, classes: int = 3) -> Loss:
    return lambda model: F.cross_entropy(model(x), torch.arange(len(x)) % classes)


def regress(x: Tensor) -> Loss:
    return lambda model: (model(x) - 0.5).square().mean()


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def convolutional() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))


class Tied(nn.Module):
    """Embedding and output layer share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.out(self.block(self.embedding(words).mean(dim=1)))


class Attention(nn.Module):
    """A transformer block around nn.MultiheadAttention."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))


class ScaledDotProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent, self.out = kind(4, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.recurrent(x)[0])


def normalised(train: bool) -> tuple[nn.Module, Loss]:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    return model.train(train), classify(rows(6, 4))


def averaging() -> tuple[nn.Module, Loss]:
    """momentum=None makes BatchNorm average over all batches, which reads the counter as a number; the loss is a module with a buffer."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, momentum=None), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), label_smoothing=0.1)
    return model, lambda m: criterion(m(rows(4, 1, 4, 4)), torch.tensor([0, 1, 2, 0]))


def frozen() -> tuple[nn.Module, Loss]:
    model = perceptron()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model, classify(rows(6, 4))


def module_list() -> tuple[nn.Module, Loss]:
    """A container without forward, a parameter without dimensions, one outside any layer, and one transposed in memory."""
    model = nn.ModuleList([nn.Linear(4, 3), nn.Linear(3, 1)])
    model.scale = nn.Parameter(torch.tensor(1.5))
    model.transposed = nn.Parameter(torch.randn(3, 2).t())
    return model, lambda m: (m.scale * m[1](m[0](rows(6, 4)).tanh()).mean() + m.transposed.square()[0].sum()) ** 2


def dropout() -> tuple[nn.Module, Loss]:
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 3)), classify(rows(6, 4))


def layer_norm() -> tuple[nn.Module, Loss]:
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 1)), regress(rows(6, 4))


def embedding() -> tuple[nn.Module, Loss]:
    return nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(6, 3)), classify(torch.tensor([[0, 1], [2, 2], [5, 0]]))


def tied() -> tuple[nn.Module, Loss]:
    return Tied(), classify(torch.tensor([[0, 1], [2, 2], [5, 0], [4, 3]]), classes=6)


def shared() -> tuple[nn.Module, Loss]:
    """One module under two names, with parameters and with buffers."""
    block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
    return nn.Sequential(block, nn.Sequential(block, nn.Linear(4, 3))), classify(rows(6, 4))


def branching() -> tuple[nn.Module, Loss]:
    """Shapes and branches that depend on values of the primal pass, and operations in place."""

    def loss(model: nn.Module) -> Tensor:
        hidden = model(rows(6, 4))
        chosen = hidden[hidden > 0]
        return chosen.square_().mul_(2.0).sum() if chosen.sum() > 0.1 else hidden.sum()

    return perceptron(), loss


def one_dimension() -> tuple[nn.Module, Loss]:
    """Convolutions with a stride, padding, groups and holes."""
    layers = [nn.Conv1d(4, 4, 3, stride=2, padding=1, groups=2), nn.Tanh(), nn.Conv1d(4, 6, 2, dilation=2, groups=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(18, 3)), classify(rows(4, 4, 9))


def overlapping() -> tuple[nn.Module, Loss]:
    """Max-pooling with windows that overlap, before a ReLU in place and behind one; an even kernel that keeps the size."""
    first = [nn.Conv2d(1, 3, 3, padding="same", dilation=2), nn.MaxPool2d(3, stride=2, padding=1), nn.ReLU(inplace=True)]
    second = [nn.Conv2d(3, 3, 2, padding="same", dilation=2), nn.ReLU(), nn.MaxPool2d(2, stride=1, ceil_mode=True), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(12, 3)), classify(rows(4, 1, 6, 6))


def group_norm() -> tuple[nn.Module, Loss]:
    layers = [nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*layers), classify(rows(4, 1, 4, 4))


def layer_norm_classes() -> tuple[nn.Module, Loss]:
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3)), classify(rows(6, 4))


def padded() -> tuple[nn.Module, Loss]:
    """Word 2 is padding; a ReLU stands behind the embedding."""
    model = nn.Sequential(nn.Embedding(7, 3, padding_idx=2), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3))
    return model, classify(torch.tensor([[0, 1], [2, 2], [5, 2]]))


class Pooled(nn.Module):
    """A transformer block whose positions are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block, self.out = nn.Linear(4, 4), Attention(), nn.Linear(4, 3)
        self.block.out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(self.embedding(x)).mean(dim=1))


class Residual(nn.Module):
    """What a layer passes on is used twice, before the ReLU behind it and after."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.out(h + self.second(h.relu()).relu())


def tagged() -> tuple[nn.Module, Loss]:
    """A class for every word of a sentence."""
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    words, tags = torch.tensor([[0, 1, 6], [2, 2, 3]]), torch.tensor([[0, 1, 2], [2, 2, 0]])
    return model, lambda m: F.cross_entropy(m(words).transpose(1, 2), tags)


def one_example() -> tuple[nn.Module, Loss]:
    """No dimension of the batch."""
    layers = [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(0), nn.Linear(8, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)]
    return nn.Sequential(*layers), lambda m: F.cross_entropy(m(rows(1, 6, 6)), torch.tensor(1))


def each_example() -> tuple[nn.Module, Loss]:
    """A loss an example, of a kind without a rule."""
    return perceptron(), lambda m: m(rows(6, 4)).exp().sum(dim=1).log()


def autocast() -> tuple[nn.Module, Loss]:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.ReLU(), nn.Linear(5, 3))

    def loss(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return classify(rows(3, 1, 6, 6, dtype=torch.float32))(m)

    return model, loss


def captured() -> tuple[nn.Module, Loss]:
    """A penalty that walks the parameters, and a loss of shape [1, 1]."""
    return perceptron(), lambda m: (m(rows(6, 4)).exp().mean() + sum(p.square().sum() for p in m.parameters())).reshape(1, 1)


CASES = [
    Case("mlp", lambda: (perceptron(), classify(rows(6, 4))), output="labels"),
    Case("cnn", lambda: (convolutional(), classify(rows(3, 1, 6, 6))), output="labels"),
    Case("cnn channels_last", lambda: (convolutional().to(memory_format=torch.channels_last), classify(rows(3, 1, 6, 6))), output="labels"),
    Case("tied", tied, output="labels"),
    Case("shared module", shared, output="labels"),
    Case("layer norm", layer_norm),
    Case("batch norm train", lambda: normalised(train=True), output="labels"),
    Case("batch norm eval", lambda: normalised(train=False), output="labels"),
    Case("batch norm average", averaging, output="labels"),
    Case("embedding", embedding, output="labels"),
    Case("attention train", lambda: (Attention(dropout=0.3), regress(rows(2, 3, 4))), random=True),
    Case("attention eval", lambda: (Attention(dropout=0.3).eval(), regress(rows(2, 3, 4)))),
    Case("attention function", lambda: (ScaledDotProduct(), regress(rows(2, 3, 4)))),
    Case("lstm", lambda: (Recurrent(nn.LSTM), regress(rows(5, 2, 4)))),
    Case("gru", lambda: (Recurrent(nn.GRU), regress(rows(5, 2, 4)))),
    Case("dropout", dropout, random=True, output="labels"),
    Case("frozen", frozen, output="labels"),
    Case("module list", module_list),
    Case("branching", branching),
    Case("penalty", captured),
    Case("conv1d", one_dimension, output="labels"),
    Case("overlapping pools", overlapping, output="labels"),
    Case("group norm", group_norm, output="labels"),
    Case("layer norm classes", layer_norm_classes, output="labels"),
    Case("padded embedding", padded, output="labels"),
    Case("attention classes", lambda: (Pooled(), classify(rows(3, 3, 4))), output="labels"),
    Case("residual", lambda: (Residual(), classify(rows(6, 4))), output="labels"),
    Case("tagged words", tagged, output="reshaped"),
    Case("one example", one_example, output="single"),
    Case("loss an example", each_example),
    Case("autocast", autocast, exact=False, output="labels"),
    Case("float32", lambda: (perceptron(), classify(rows(6, 4, dtype=torch.float32))), exact=False, output="labels"),
    Case("bfloat16", lambda: (perceptron().bfloat16(), classify(rows(6, 4, dtype=torch.bfloat16))), exact=False, output="labels"),
]
EXACT = [case for case in CASES if case.exact]


GIVEN_UP = pytest.mark.filterwarnings("ignore:derivatives of .* are made by torch's own forward mode:UserWarning")
"""For tests of models that cannot be followed, on purpose."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, once each, in the order in which directions are drawn."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def true_gradient(model: nn.Module, loss: Loss) -> dict[str, Tensor]:
    """Plain torch: the gradient by reverse mode, the model left as it was; random layers start from seed 7."""
    before = {name: b.clone() for name, b in model.named_buffers()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        gradients = torch.autograd.grad(loss(model).mean(), list(trained(model).values()))
    with torch.no_grad():
        for name, b in model.named_buffers():
            b.copy_(before[name])
    return dict(zip(trained(model), gradients, strict=True))
