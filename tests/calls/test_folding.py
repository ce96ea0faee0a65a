"""Calls of members side by side as one call, against the calls of each alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from forwardgrad.calls.folding import attention_in_one, attention_together, beside, linear_in_one
from forwardgrad.forward_mode import levels

MEMBERS = 5


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("mask", ["none", "matrix", "by batch", "whole", "truths", "of each member", "causal"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)], ids=str)
def test_attention_of_members_is_that_of_each(lead: tuple[int, ...], mask: str) -> None:
    q, k = random(MEMBERS, *lead, 4, 6), random(MEMBERS, *lead, 4, 6).flip(0)
    v = random(*lead, 4, 6)  # shared
    shapes = {"matrix": (4, 4), "by batch": (*lead[:-1], *[1] * len(lead[-1:]), 4, 4), "whole": (*lead, 4, 4), "truths": (*lead, 4, 4)}
    given = random(*shapes[mask]) if mask in shapes else None
    given = given > -1 if mask == "truths" and given is not None else given
    causal = {"is_causal": mask == "causal"}
    each = random(MEMBERS, 4, 4) if mask == "of each member" else None
    found = vmap(lambda q, k, m: attention_in_one(q, k, v, given if each is None else m, **causal))(q, k, each if each is not None else q)
    alone = [F.scaled_dot_product_attention(q[i], k[i], v, given if each is None else each[i], **causal) for i in range(MEMBERS)]
    torch.testing.assert_close(found, torch.stack(alone), equal_nan=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
def test_a_linear_layer_of_members_is_that_of_each(lead: tuple[int, ...], bias: bool) -> None:
    x, w, b = random(MEMBERS, *lead, 4), random(MEMBERS, 3, 4), random(MEMBERS, 3)
    found = vmap(lambda x: linear_in_one(x, w[0], b[0] if bias else None))(x)
    torch.testing.assert_close(found, F.linear(x, w[0], b[0] if bias else None))
    if bias:  # weights of each member
        own = vmap(linear_in_one)(x, w, b)
        torch.testing.assert_close(own, torch.stack([F.linear(x[i], w[i], b[i]) for i in range(MEMBERS)]))


def test_a_copy_beside_others_may_be_written_to_by_each_member() -> None:
    counter, mean = torch.zeros((), dtype=torch.int64), random(3)

    def member(number: Tensor) -> tuple[Tensor, Tensor]:
        own, running = beside(counter, number), beside(mean, number)
        return own.add_(1), running.mul_(number)

    counts, means = vmap(member)(torch.arange(4.0, dtype=torch.float64))
    assert counts.tolist() == [1, 1, 1, 1]
    assert counts.dtype == torch.int64
    torch.testing.assert_close(means, torch.arange(4.0, dtype=torch.float64).unsqueeze(1) * mean)
    assert int(counter) == 0


def test_what_is_made_together_belongs_to_each_member_and_leaves_what_is_shared() -> None:
    each, shared = random(MEMBERS, 3, 4), random(3, 4)
    before = shared.clone()

    def made(x: levels.Members, y: levels.Members, z: levels.Members) -> Tensor:
        assert [one.shared for one in (x, y, z)] == [False, True, False]
        assert [one.all.shape for one in (x, y, z)] == [(MEMBERS, 3, 4), (MEMBERS, 3, 4), (MEMBERS, 4, 3)]
        return x.all.add_(y.all) + z.all.mT

    found = vmap(lambda x: levels.together(made, x.clone(), shared, x.mT), in_dims=1)(each.movedim(0, 1))
    torch.testing.assert_close(found, 2 * each + shared)
    assert torch.equal(shared, before)


def test_members_of_a_stack() -> None:
    each, shared = random(MEMBERS, 3), random(3)

    def member(x: Tensor) -> Tensor:
        assert levels.hangs_on_member(x)
        assert not levels.hangs_on_member(shared)
        return levels.member(each.flip(0)) + x

    torch.testing.assert_close(vmap(member)(each), each + each.flip(0))


@pytest.mark.parametrize("mask", [False, True])
def test_attention_together_is_that_of_each(mask: bool) -> None:
    q, k, v = random(MEMBERS, 2, 3, 4, 6), random(MEMBERS, 2, 3, 4, 6).flip(0), random(2, 3, 4, 6)
    given = random(2, 1, 4, 4) if mask else None
    found = vmap(lambda q, k: attention_together(q, k, v, given, scale=0.3))(q, k)
    alone = [F.scaled_dot_product_attention(q[i], k[i], v, given, scale=0.3) for i in range(MEMBERS)]
    torch.testing.assert_close(found, torch.stack(alone))
