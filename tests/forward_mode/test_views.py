"""Rules of views, sums and products of matrices, against torch's own forward mode; and what may be written to afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.forward_mode.test_rules import V, X, explicit, plain
from tests.support.cases import rows
from torch import Tensor

from forwardgrad.forward_mode.guard import Unfollowed

Y = rows(6, 5)
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {  # of a tensor [4, 3, 6]
    "transpose": lambda x: x.transpose(0, -1),
    "swapaxes": lambda x: torch.swapaxes(x, 1, 2),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "unsqueeze last": lambda x: torch.unsqueeze(x, -1),
    "unsqueeze third": lambda x: x.unsqueeze(3),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "squeeze of more": lambda x: x.squeeze(0),
    "squeeze all": lambda x: x[:, :1].squeeze(),
    "permute": lambda x: x.permute(2, 0, 1),
    "permute list": lambda x: torch.permute(x, (-1, 0, 1)),
    "contiguous": lambda x: x.transpose(0, 1).contiguous(),
    "clone": lambda x: x.clone(),
    "mT": lambda x: x.mT,
    "T": lambda x: x[0].T * x[1].t(),
    "number": lambda x: x[1],
    "slices": lambda x: x[1:, None, ..., ::2],
    "last": lambda x: x[..., -1],
    "mask": lambda x: x[x > 0],
    "list": lambda x: x[[0, 2]],
    "tensor": lambda x: x[torch.tensor([0, 2, 2])],
    "true": lambda x: x[True],
    "chunk": lambda x: torch.cat([part * index for index, part in enumerate(x.chunk(2, 1))], 1),
    "chunk by name": lambda x: sum(torch.chunk(x, chunks=3, dim=-1)),
    "split": lambda x: torch.cat([part * index for index, part in enumerate(x.split([1, 2, 3], dim=2))], -1),
    "torch.split": lambda x: sum(torch.split(x, 2)),
    "unbind": lambda x: sum(part * index for index, part in enumerate(x.unbind(1))),
    "cat with what stands still": lambda x: torch.cat([X, x, X * 2], dim=1),
    "concat": lambda x: torch.concat([x, x.tanh()]),
    "sum": lambda x: x.sum(),
    "sum of one": lambda x: x.sum(1),
    "sum of some": lambda x: x.sum((0, -1), keepdim=True),
    "mean": lambda x: torch.mean(x),
    "mean of one": lambda x: x.mean(dim=-2, keepdim=True),
    "mean of some": lambda x: x.mean([0, 1]),
    "matmul": lambda x: x @ x.mT,
    "matmul from the left": lambda x: torch.matmul(X[0].t(), x),
    "matmul from the right": lambda x: x @ Y,
    "matmul of two and three": lambda x: x[0] @ x.transpose(1, 2),
    "bmm": lambda x: torch.bmm(x, x.tanh().transpose(1, 2)),
    "mm": lambda x: x[0].mm(x[1].t()),
    "matrix and vector": lambda x: x @ x[0, 0],
}
BY_DUALS = {"squeeze all": "squeeze", "mask": "__getitem__", "list": "__getitem__", "tensor": "__getitem__", "true": "__getitem__"}
BY_DUALS |= {"matrix and vector": "matmul"}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", VIEWS)
def test_a_rule_gives_what_torch_does(name: str, count: int) -> None:
    function, tangents = VIEWS[name], V[:count]
    value, moves = plain(function, X.clone(), tangents)
    out, moved, found = explicit(function, X.clone(), tangents)
    assert torch.equal(out, value)
    torch.testing.assert_close(moved, moves, rtol=1e-12, atol=1e-13)
    assert {way.function for way in found if way.kind == "dual numbers"} <= {BY_DUALS.get(name, "add"), "__radd__"}


LOOKS: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda h: h.transpose(0, 1),
    "unsqueeze": lambda h: h.unsqueeze(0),
    "squeeze": lambda h: h.squeeze(0),
    "permute": lambda h: h.permute(1, 0, 2),
    "contiguous": lambda h: h.contiguous(),
    "mT": lambda h: h.mT,
    "part": lambda h: h[1:],
    "chunk": lambda h: h.chunk(2)[0],
    "split": lambda h: h.split(2)[1],
    "unbind": lambda h: h.unbind()[0],
}


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("name", LOOKS)
def test_neither_a_view_nor_what_it_shows_may_be_written_to(name: str, behind: bool) -> None:
    def function(x: Tensor) -> Tensor:
        h = x * 2
        part = LOOKS[name](h)
        (h if behind else part).mul_(3)
        return h.sum() + part.sum()

    with pytest.raises(Unfollowed, match="mul_ writes in place"):
        explicit(function, X, V)


def test_a_copy_may_be_written_to() -> None:
    def function(x: Tensor) -> Tensor:
        h = x * 2
        copy = h.transpose(0, 1).contiguous().mul_(3)
        other = h[1].clone().mul_(x[0])
        return copy.sum() + other.sum() + h.sum()

    value, moves = plain(function, X, V)
    out, moved, _ = explicit(function, X, V)
    torch.testing.assert_close(out, value)
    torch.testing.assert_close(moved, moves)
