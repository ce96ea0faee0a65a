"""`ZerothOrder(in_place=True)`: the estimate of the copies, in the memory of a forward pass, with parameters that come back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import rows, seeded
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.diagnostics import peak_bytes

X, WORDS = rows(8, 257), torch.tensor([[3, 0, 5], [1, 3, 3]])
LAWS = [fg.Gaussian(), fg.Rademacher()]


def network() -> nn.Sequential:
    """A weight of more than 2¹⁶ numbers, an odd number of them, and small ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(257, 257), nn.Tanh(), nn.Linear(257, 3)).double()


def loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), torch.arange(8) % 3)


@pytest.mark.parametrize("sides", ["two", "one"])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_the_estimate_is_that_of_moved_copies(law: fg.Law, sides: str) -> None:
    found = []
    for in_place in (False, True):
        model = network()
        record = fg.estimate_grad_(loss, model, fg.ZerothOrder(tangents=2, law=law, sides=sides, in_place=in_place), generator=seeded(1))  # type: ignore[arg-type]
        found.append((record, model))
    (copied, one), (moved, other) = found
    torch.testing.assert_close(moved.derivatives, copied.derivatives, rtol=1e-9, atol=1e-10)
    assert moved.forward_passes == copied.forward_passes
    for p, q, begun in zip(one.parameters(), other.parameters(), network().parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(q, begun, rtol=0, atol=1e-15)  # a few last bits


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_a_step_of_plain_sgd_holds_blocks_beside_a_forward_pass(law: fg.Law) -> None:
    """The weight has 16.8 MB and the pass 33 kB. A block of a direction and its scratch take 5.3 MB."""
    model = nn.Linear(2048, 2048, bias=False)
    step = fg.TrainingStep(
        lambda m: m(torch.ones(1, 2048)).square().sum(),
        model,
        torch.optim.SGD(model.parameters(), lr=1e-6),
        fg.ZerothOrder(law=law, in_place=True),
        generator=seeded(0),
    )
    step()
    before = model.weight.detach().clone()
    assert peak_bytes(step, [before.device]) < 7_000_000
    assert not torch.equal(model.weight, before)


def test_parameters_come_back_where_the_loss_raises() -> None:
    model, calls = network(), list[int]()

    def breaks(m: nn.Module) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no loss today")
        return loss(m)

    with pytest.raises(RuntimeError, match="no loss today"):
        fg.estimate_grad_(breaks, model, fg.ZerothOrder(in_place=True), generator=seeded(0))
    for p, q in zip(model.parameters(), network().parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-15)


def test_a_padding_row_stays_and_what_is_not_used_has_no_gradient() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(6, 4, padding_idx=3), "spare": nn.Linear(2, 2)}).double()
    kept = copy.deepcopy(model.state_dict())

    def of(m: nn.Module) -> Tensor:
        return m["words"](WORDS).sin().sum()  # type: ignore[index, no-any-return]

    found = []
    for in_place in (False, True):
        record = fg.estimate_grad_(of, model, fg.ZerothOrder(in_place=in_place), generator=seeded(0))
        found.append(record.derivatives)
        assert model["spare"].weight.grad is None  # type: ignore[union-attr]
        model.zero_grad()
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match=r"in_place=True cannot hold the padding row of words\.weight still"):
        fg.estimate_grad_(
            lambda m: F.embedding(WORDS, m["words"].weight, padding_idx=1).sum(), model, fg.ZerothOrder(in_place=True), generator=seeded(0)
        )
    torch.testing.assert_close(model.state_dict(), kept, rtol=0, atol=1e-15)


@pytest.mark.parametrize("asked", [{"perturb": fg.LowRank()}, {"perturb": fg.Sparse(0.5)}, {"chunk_size": None}, {"chunk_size": 2}])
def test_what_it_does_not_go_with(asked: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"it goes with perturb=Dense\(\) and chunk_size=1"):
        fg.ZerothOrder(in_place=True, tangents=2, **asked)  # type: ignore[arg-type]


def test_a_step_in_place_is_not_taken_again_from_a_log() -> None:
    assert not fg.ZerothOrder(in_place=True).loggable
    assert not fg.ZerothOrder(in_place=True).replayable


def test_a_compiled_step_is_an_eager_one() -> None:
    model = network()
    pieces = loss, model, torch.optim.SGD(model.parameters(), lr=0.01), fg.ZerothOrder(in_place=True)
    step = fg.TrainingStep(*pieces, generator=seeded(0), engine="compile")
    with pytest.warns(UserWarning, match="falls back to eager steps: in_place=True moves the parameters a block at a time"):
        step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_blocks_are_the_bits_of_the_part(law: fg.Law, dtype: torch.dtype) -> None:
    """More than one block of a stream, and a last one that is not whole."""
    like = torch.zeros(2 * 2**17 + 300_001, dtype=dtype)
    part = law.part(like, torch.Generator(), lambda: 7, None)
    law.add_part_(like, 1.0, torch.Generator(), 7)
    assert torch.equal(like, part)


def test_rows_that_the_loss_shortens_where_they_stand_are_refused() -> None:
    """They stand at moved values then, and would not come back."""
    model = nn.Embedding(6, 4, max_norm=0.1).double()
    begun = model.weight.detach().clone()
    with pytest.raises(ValueError, match="max_norm shortens rows where they stand"):
        fg.estimate_grad_(lambda m: m(WORDS).square().sum(), model, fg.ZerothOrder(in_place=True), generator=seeded(0))
    torch.testing.assert_close(model.weight, begun, rtol=0, atol=1e-15)


def test_a_loss_that_writes_to_a_parameter_is_refused() -> None:
    def clipped(model: nn.Linear) -> Tensor:
        with torch.no_grad():
            model.weight.clamp_(-0.01, 0.01)
        return model(X).square().sum()

    model = nn.Linear(257, 2).double()
    begun = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="the loss writes to weight"):
        fg.estimate_grad_(clipped, model, fg.ZerothOrder(in_place=True), generator=seeded(0))  # type: ignore[arg-type]
    torch.testing.assert_close(model.weight, begun, rtol=0, atol=1e-15)
