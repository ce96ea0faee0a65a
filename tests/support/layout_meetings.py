"""Examples that meet before the loss or in it: a part of `layouts`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.support.cases import rows
from tests.support.layout import LABELS, C, D, H, Loss, N, Steps, cases, classified, embedded, perceptron
from torch import Tensor, nn

case, MEETINGS = cases()


@case(False)
def a_sum_across_examples() -> tuple[nn.Module, Loss]:
    return classified(Steps(lambda m, x: m.b((m.a(x) + m.a(x).sum(0)).tanh()), a=nn.Linear(D, H), b=nn.Linear(H, C)), rows(N, D))


@case(False)
def a_running_sum_across_examples() -> tuple[nn.Module, Loss]:
    return classified(Steps(lambda m, x: m.b(m.a(x).cumsum(0).tanh()), a=nn.Linear(D, H), b=nn.Linear(H, C)), rows(N, D))


@case(False)
def contrastive() -> tuple[nn.Module, Loss]:
    model = nn.ModuleList([perceptron(), perceptron()])
    return model, lambda m: F.cross_entropy(m[0](rows(N, D)) @ m[1](rows(N, D).flip(0)).T, torch.arange(N))


@case(False)
def both_ways_with_a_temperature() -> tuple[nn.Module, Loss]:
    model = nn.ModuleDict({"a": perceptron(), "b": perceptron()})
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.5)))

    def loss(m: nn.Module) -> Tensor:
        logits = m.scale.exp() * F.normalize(m["a"](rows(N, D))) @ F.normalize(m["b"](rows(N, D).cos())).T
        return (F.cross_entropy(logits, torch.arange(N)) + F.cross_entropy(logits.T, torch.arange(N))) / 2

    return model, loss


@case(False)
def in_batch_negatives() -> tuple[nn.Module, Loss]:
    """InfoNCE of two views in one batch, the pair of each row half a batch away."""

    def score(z: Tensor) -> Tensor:
        z = F.normalize(z)
        alike = (z @ z.T / 0.5).masked_fill(torch.eye(2 * N, dtype=torch.bool), -1e9)
        return F.cross_entropy(alike, torch.arange(2 * N).roll(N))

    return embedded(score, rows(2 * N, D))


@case(False)
def supervised_contrastive() -> tuple[nn.Module, Loss]:
    def score(z: Tensor) -> Tensor:
        z = F.normalize(z)
        same, other = LABELS[:, None] == LABELS, ~torch.eye(N, dtype=torch.bool)
        log = (z @ z.T).masked_fill(~other, -1e9).log_softmax(1)
        return -(log * (same & other)).sum() / N

    return embedded(score)


@case(True)
def triplets() -> tuple[nn.Module, Loss]:
    """Anchors, positives and negatives are three batches: a triplet is an example."""

    def loss(m: nn.Module) -> Tensor:
        anchor, near, far = (m(x) for x in rows(3, N, D))
        gap = (anchor - near).square().sum(1) - (anchor - far).square().sum(1) + 1
        return torch.where(gap > 0, gap, 0.0).mean()

    return perceptron(), loss


@case(False)
def triplets_in_the_batch() -> tuple[nn.Module, Loss]:
    """The negative of an example is its neighbour."""

    def score(z: Tensor) -> Tensor:
        gap = (z - z.flip(1)).square().sum(1) - (z - z.roll(1, 0)).square().sum(1) + 1
        return torch.where(gap > 0, gap, 0.0).mean()

    return embedded(score)


@case(False)
def attention_over_the_batch() -> tuple[nn.Module, Loss]:
    """A sequence without a dimension of the batch: its rows attend to one another."""
    model = Steps(
        lambda m, x: m.out(m.att(m.inp(x), m.inp(x), m.inp(x))[0]),
        inp=nn.Linear(D, 8),
        att=nn.MultiheadAttention(8, 2),
        out=nn.Linear(8, C),
    )
    return classified(model, rows(N, D))


@case(False)
def standardised_by_hand() -> tuple[nn.Module, Loss]:
    def walk(m: Steps, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.b(((h - h.mean(0)) / (h.var(0) + 0.1).sqrt()).tanh())

    return classified(Steps(walk, a=nn.Linear(D, H), b=nn.Linear(H, C)), rows(N, D))


@case(False)
def rolled_over_the_batch() -> tuple[nn.Module, Loss]:
    return classified(Steps(lambda m, x: m.b((m.a(x) * m.a(x).roll(1, 0)).tanh()), a=nn.Linear(D, H), b=nn.Linear(H, C)), rows(N, D))


@case(False)
def pairwise_logits() -> tuple[nn.Module, Loss]:
    """A score for every pair of examples."""
    target = (LABELS[:, None] == LABELS).double()
    return embedded(lambda z: F.binary_cross_entropy_with_logits((z[:, None] * z[None]).sum(2), target))


@case(False)
def softmax_over_the_batch() -> tuple[nn.Module, Loss]:
    return embedded(lambda z: (z.softmax(0) * rows(N, C)).sum(1).mean())


@case(False)
def the_hardest_example() -> tuple[nn.Module, Loss]:
    return embedded(lambda z: F.cross_entropy(z, LABELS, reduction="none").logsumexp(0))


@case(False)
def mixed_up_inside() -> tuple[nn.Module, Loss]:
    """Mixup of hidden activities of two examples."""
    model = Steps(lambda m, x: m.b((0.7 * m.a(x) + 0.3 * m.a(x).flip(0)).relu()), a=nn.Linear(D, H), b=nn.Linear(H, C))
    return classified(model, rows(N, D))


@case(False)
def graph_network() -> tuple[nn.Module, Loss]:
    """Two layers, A f(A x), with a loss at every node."""
    adjacency = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]).double() / 3
    return classified(Steps(lambda m, x: adjacency @ m.b((adjacency @ m.a(x)).relu()), a=nn.Linear(D, H), b=nn.Linear(H, C)), rows(N, D))


@case(False, "batch_norm_in_training")
def batch_norm() -> tuple[nn.Module, Loss]:
    return classified(nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(H), nn.ReLU(), nn.Linear(H, C)), rows(N, D))


@case(True)
def batch_norm_in_eval() -> tuple[nn.Module, Loss]:
    model, loss = batch_norm()
    return model.eval(), loss


@case(False)
def hidden_behind_zeros() -> tuple[nn.Module, Loss]:
    """Examples meet before a last layer of zeros: no derivative says so at first."""
    model, loss = a_sum_across_examples()
    nn.init.zeros_(model.b.weight)
    return model, loss


@case(False)
def hidden_behind_a_gate() -> tuple[nn.Module, Loss]:
    """What examples add to one another is multiplied by a parameter that is zero at first."""
    model = Steps(lambda m, x: m.b((m.a(x) + m.gate * m.a(x).mean(0)).tanh()), a=nn.Linear(D, H), b=nn.Linear(H, C))
    model.register_parameter("gate", nn.Parameter(torch.zeros(())))
    return classified(model, rows(N, D))
