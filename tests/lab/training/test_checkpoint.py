"""Backpropagation that recomputes activations: the same bits as plain backpropagation, fewer bytes, the model left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.support.cases import CASES, Case, classify, perceptron, regress, rows, trained
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import forwardgrad as fg

PLAIN, RECOMPUTE = fg.Backprop(), fg.Backprop(checkpoint=True)
X = rows(6, 4)


def step(loss: Any, at: Any, method: fg.Estimator = RECOMPUTE) -> fg.Estimate:
    torch.manual_seed(7)
    return fg.estimate_grad_(loss, at, method)


def assert_the_same(model: nn.Module, loss: Callable[[nn.Module], Tensor], steps: int = 2) -> None:
    """Gradients, buffers, loss and global random state after some steps with recomputation and without."""
    plain = copy.deepcopy(model)
    for _ in range(steps):
        found = []
        for m, method in ((model, RECOMPUTE), (plain, PLAIN)):
            record = step(loss, m, method)
            gradients = {name: p.grad for name, p in trained(m).items() if p.grad is not None}
            found.append((record.loss, gradients, dict(m.named_buffers()), torch.get_rng_state()))
        torch.testing.assert_close(found[0], found[1], rtol=1e-13, atol=1e-15)
        assert any(g.any() for g in found[0][1].values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_model_can_be_cut_and_gets_the_gradient_of_plain_backpropagation(case: Case) -> None:
    assert_the_same(*case.build())


def deep(width: int = 16, layers: int = 24) -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.Tanh())), nn.Linear(width, 3))


class Convolutional(nn.Module):
    """A chain inside a module, with chains, normalisation and dropout inside it."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2)) for _ in range(6)]
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.features(x))


class Residual(nn.Module):
    """The elements of a ModuleList, called with a keyword; the dropout draws from inside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"block": Block()}) for _ in range(8)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["block"](x, scale=x.new_tensor(0.5))[0]
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.drop = nn.Linear(8, 64), nn.Linear(64, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, None]:
        return x + scale * self.drop(self.narrow(self.wide(x).tanh().square().exp())), None


class Peak(TorchDispatchMode):
    """The most bytes that the results of operations held at any one time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.alive = 0, dict[int, tuple[StorageWeakRef, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {address: entry for address, entry in self.alive.items() if not entry[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return result


DEEP: list[tuple[str, Any, Any, float]] = [
    ("perceptron", deep, classify(rows(500, 16)), 0.5),
    ("cnn", Convolutional, classify(rows(20, 1, 12, 12)), 0.6),
    ("module list", Residual, regress(rows(100, 8)), 0.4),
]


@pytest.mark.parametrize(("make", "loss", "share"), [d[1:] for d in DEEP], ids=[d[0] for d in DEEP])
def test_deep_models_keep_fewer_bytes(make: Any, loss: Any, share: float) -> None:
    """Saved for the backward pass, and alive at the peak: the first leaves out what begins a segment, the second leaves out nothing."""
    torch.manual_seed(0)
    model = make().double()
    saved, peak = {}, {}
    for method in (PLAIN, RECOMPUTE):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: (sizes.append(t.nbytes), t)[1], lambda t: t):
            step(loss, copy.deepcopy(model), method)
        saved[method] = sum(sizes)
        copied = copy.deepcopy(model)
        with Peak() as mode:
            step(loss, copied, method)
        peak[method] = mode.bytes
    assert saved[RECOMPUTE] < 0.2 * saved[PLAIN]
    assert peak[RECOMPUTE] < share * peak[PLAIN]


@pytest.mark.parametrize("make", [deep, Convolutional, Residual])
def test_deep_models_get_the_gradient_of_plain_backpropagation(make: Any) -> None:
    torch.manual_seed(0)
    shape = {deep: (5, 16), Convolutional: (4, 1, 8, 8), Residual: (5, 8)}[make]
    assert_the_same(make().double(), regress(rows(*shape)))


def test_each_layer_of_a_chain_is_called_twice() -> None:
    model, calls = deep(4, 3).double(), []
    for index, layer in enumerate(model):
        layer.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    record = step(regress(X), model)
    assert record.forward_passes == 2
    assert calls == [*range(7), *(4, 5, 6), *(2, 3), *(0, 1)]  # three segments, the last one first when it goes backwards


class Drifting(nn.Module):
    """A layer whose result depends on a buffer that it changes: a second look must find it as the first did."""

    def __init__(self, exchanges: bool) -> None:
        super().__init__()
        self.layer, self.exchanges = nn.Linear(4, 4), exchanges
        self.register_buffer("calls", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        result = (self.layer(x) * self.calls.clone()).tanh()
        if self.exchanges:
            self.calls = self.calls * 2
        else:
            self.calls.mul_(2)
        return result


@pytest.mark.parametrize("exchanges", [False, True])
def test_recomputation_finds_the_buffers_of_the_first_time_and_changes_none(exchanges: bool) -> None:
    torch.manual_seed(0)
    drifting = Drifting(exchanges)
    model = nn.Sequential(drifting, nn.Linear(4, 4), drifting, nn.Linear(4, 4), Drifting(exchanges)).double()
    calls = drifting.calls
    assert_the_same(model, regress(X))
    assert float(drifting.calls) == 16.0  # two calls a step, two steps
    assert (drifting.calls is calls) == (not exchanges)


class Fails(Exception):
    """What a user's loss raises."""


def exploding(m: nn.Module) -> Tensor:
    m(X)
    raise Fails


@pytest.mark.parametrize("loss", [lambda m: m(X).square().mean(), exploding], ids=["works", "fails"])
def test_forwards_are_put_back(loss: Any) -> None:
    model = nn.Sequential(perceptron(), nn.ModuleList([nn.Linear(3, 3)])[0], nn.Tanh()).double()
    own = nn.Linear(3, 3).double()
    own.forward = lambda x: x * 2  # type: ignore[method-assign]  # as wrappers of users do
    whole = nn.ModuleDict({"chain": model, "own": own}).double()
    before = own.forward
    state = copy.deepcopy({name: vars(m).get("forward") for name, m in model.named_modules()})
    try:
        step(lambda m: loss(m["chain"]) + m["own"](X[:, :3]).sum(), whole)
    except Fails:
        assert all(p.grad is None for p in whole.parameters())
    assert own.forward is before
    assert {name: vars(m).get("forward") for name, m in model.named_modules()} == state
    assert set(state.values()) == {None}


def test_a_forward_that_was_exchanged_by_the_user_is_the_one_that_is_called() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 1)]).double()
    forward = model[0].forward
    model[0].forward = lambda x: forward(x).sin()  # type: ignore[method-assign]
    plain = nn.Sequential(model[0], model[1])
    step(lambda m: m[1](m[0](X)).square().mean(), model)
    expected = torch.autograd.grad(plain(X).square().mean(), list(model.parameters()))
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected), rtol=1e-13, atol=1e-15)


def test_hooks_of_a_chain_inside_a_chain_are_called() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    inner.register_forward_hook(lambda module, args, output: output * 3)
    assert_the_same(nn.Sequential(inner, nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double(), regress(X))


@pytest.mark.parametrize(
    ("loss", "make", "message"),
    [
        (lambda m: m(X).mean(), lambda: nn.Linear(4, 1), "made of several layers"),
        (lambda t: t.square().sum(), lambda: torch.ones(3, requires_grad=True), "made of several layers"),
        (lambda m: m[2](m[1](m[0](X))).mean(), perceptron, "never calls the forward of a piece"),
    ],
    ids=["one layer", "a tensor", "layers by hand"],
)
def test_what_cannot_be_cut_is_told(loss: Any, make: Any, message: str) -> None:
    at = make()
    at = at.double() if isinstance(at, nn.Module) else at
    with pytest.raises(ValueError, match=message):
        step(loss, at)
    assert all(p.grad is None for p in (at.parameters() if isinstance(at, nn.Module) else [at]))
