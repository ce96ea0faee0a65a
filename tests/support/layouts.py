"""Small cases of every layout of examples: where they stand in tensors, and in what folds.

`CASES` has all, those of `layout_meetings` and `layout_losses` with them; each builds a model and a loss in float64 from fixed seeds, and
says whether examples are apart. Batches have 4 examples (`N`); the other sizes differ from it, so that a wrong dimension has a wrong size,
but where the name of a case says that they are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tests.support.cases import rows
from tests.support.layout import LABELS, C, D, H, Loss, N, P, Steps, T, cases, classified, embedded, perceptron, sequence
from tests.support.layout_losses import LOSSES
from tests.support.layout_meetings import MEETINGS
from torch import Tensor, nn

case, PLACES = cases()


# Batch first


@case(True)
def batch_first() -> tuple[nn.Module, Loss]:
    return classified(perceptron(), rows(N, D))


@case(True)
def images() -> tuple[nn.Module, Loss]:
    layers = [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, C)]
    return classified(nn.Sequential(*layers), rows(N, 1, 6, 6))


@case(True)
def sequences_batch_first() -> tuple[nn.Module, Loss]:
    model = Steps(
        lambda m, x: m.out(m.rnn(m.inp(x))[0][:, -1]), inp=nn.Linear(D, H), rnn=nn.LSTM(H, H, batch_first=True), out=nn.Linear(H, C)
    )
    return classified(model, rows(N, T, D))


def encoder(batch_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)


@case(True)
def transformer_batch_first() -> tuple[nn.Module, Loss]:
    return classified(
        Steps(lambda m, x: m.out(m.enc(m.inp(x)).mean(1)), inp=nn.Linear(D, 8), enc=encoder(True), out=nn.Linear(8, C)), rows(N, T, D)
    )


# Time first


def over_time(walk: Callable[[Steps, Tensor], Tensor], x: Tensor | None = None, **layers: nn.Module) -> tuple[nn.Module, Loss]:
    model = Steps(lambda m, x: m.out(walk(m, m.inp(x))), inp=nn.Linear(D, 8), out=nn.Linear(8, C), **layers)
    return classified(model, sequence() if x is None else x)


@case(True)
def lstm_time_first() -> tuple[nn.Module, Loss]:
    return over_time(lambda m, h: m.rnn(h)[0][-1], rnn=nn.LSTM(8, 8))


@case(True)
def gru_time_first() -> tuple[nn.Module, Loss]:
    return over_time(lambda m, h: m.rnn(h)[1][-1], rnn=nn.GRU(8, 8))


@case(True)
def transformer_time_first() -> tuple[nn.Module, Loss]:
    return over_time(lambda m, h: m.enc(h).mean(0), enc=encoder(False))


@case(True)
def transformer_time_first_in_eval() -> tuple[nn.Module, Loss]:
    model, loss = transformer_time_first()
    return model.eval(), loss


@case(True)
def transformer_time_first_of_equal_sizes() -> tuple[nn.Module, Loss]:
    return over_time(lambda m, h: m.enc(h).mean(0), rows(N, N, D), enc=encoder(False))


@case(True)
def attention_time_first() -> tuple[nn.Module, Loss]:
    return over_time(lambda m, h: m.att(h, h, h, need_weights=False)[0][0], att=nn.MultiheadAttention(8, 2))


@case(True)
def attention_time_first_with_its_weights() -> tuple[nn.Module, Loss]:
    return over_time(lambda m, h: m.att(h, h, h)[0].mean(0), att=nn.MultiheadAttention(8, 2))


@case(True)
def cumsum_over_time_of_equal_sizes() -> tuple[nn.Module, Loss]:
    return over_time(lambda m, h: m.mid(h.cumsum(0)).tanh()[-1], rows(N, N, D), mid=nn.Linear(8, 8))


@case(True)
def a_loss_at_every_time() -> tuple[nn.Module, Loss]:
    model = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, C))
    return model, lambda m: F.cross_entropy(m(sequence()).flatten(0, 1), torch.arange(T * N) % C)


# The batch last


@case(True)
def channels_then_batch() -> tuple[nn.Module, Loss]:
    """Layers on the transpose, as x.T @ W.T, with values kept as [channels, batch]."""
    model = Steps(lambda m, x: m.b(m.a(x.T).T.relu().T), a=nn.Linear(D, H), b=nn.Linear(H, C))
    return classified(model, rows(D, N))


@case(True)
def weights_from_the_left() -> tuple[nn.Module, Loss]:
    model = Steps(lambda m, x: m.b.weight @ (m.a.weight @ x + m.a.bias[:, None]).tanh(), a=nn.Linear(D, H), b=nn.Linear(H, C, bias=False))
    return model, lambda m: F.cross_entropy(m(rows(D, N)).T, LABELS)


@case(True)
def one_channel_an_example() -> tuple[nn.Module, Loss]:
    """Examples as positions of a convolution of width one: [1, channels, batch]."""
    model = nn.Sequential(nn.Conv1d(D, H, 1), nn.Tanh(), nn.Conv1d(H, C, 1))
    return model, lambda m: F.cross_entropy(m(rows(1, D, N)), LABELS[None])


@case(True)
def classes_in_the_middle() -> tuple[nn.Module, Loss]:
    """A linear layer over the last dimension of [classes, features], the batch in front."""
    model = Steps(lambda m, x: m.b(m.a(x).tanh()).squeeze(-1), a=nn.Linear(D, H), b=nn.Linear(H, 1))
    return classified(model, rows(N, C, D))


# Folds, tokens, packing, broadcasting


def patched(front: bool) -> tuple[nn.Module, Loss]:
    def walk(m: Steps, x: Tensor) -> Tensor:
        folded = (x.transpose(0, 1) if front else x).reshape(-1, D)  # [P * N, D] or [N * P, D]
        h = m.b(m.a(folded).relu())
        return h.reshape(P, N, C).mean(0) if front else h.reshape(N, P, C).mean(1)

    return classified(Steps(walk, a=nn.Linear(D, H), b=nn.Linear(H, C)), rows(N, P, D))


@case(True)
def patches_in_front_of_the_batch() -> tuple[nn.Module, Loss]:
    return patched(True)


@case(True)
def patches_behind_the_batch() -> tuple[nn.Module, Loss]:
    return patched(False)


@case(True)
def tokens_flattened_around_attention() -> tuple[nn.Module, Loss]:
    """[N * T] tokens before and after an attention that sees [N, T]."""

    def walk(m: Steps, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x.reshape(N * T, D)).reshape(N, T, 3, H).unbind(2)
        mixed = (q @ k.transpose(1, 2) / math.sqrt(H)).softmax(2) @ v
        return m.out(mixed.reshape(N * T, H).tanh()).reshape(N, T, C)

    model = Steps(walk, qkv=nn.Linear(D, 3 * H), out=nn.Linear(H, C))
    return model, lambda m: F.cross_entropy(m(rows(N, T, D)).transpose(1, 2), torch.arange(N * T).reshape(N, T) % C)


@case(True)
def flattened_tokens_scored_one_by_one() -> tuple[nn.Module, Loss]:
    """As many terms as tokens, and tokens of a sentence depend on one another: sentences are apart, tokens are not."""
    model, _ = tokens_flattened_around_attention()
    return model, lambda m: F.cross_entropy(m(rows(N, T, D)).reshape(N * T, C), torch.arange(N * T) % C)


@case(True)
def packed_sequences() -> tuple[nn.Module, Loss]:
    """Two sentences in one row, kept apart by a mask in blocks; each token has a term of its own. Sentences are the examples."""
    which = torch.tensor([0, 0, 0, 1, 1, 1, 1])

    def walk(m: Steps, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).chunk(3, -1)
        alike = (q @ k.transpose(1, 2)).masked_fill(which[:, None] != which, -1e9)
        return m.out((alike.softmax(2) @ v).tanh())

    model = Steps(walk, qkv=nn.Linear(D, 3 * H), out=nn.Linear(H, C))
    return model, lambda m: F.cross_entropy(m(rows(1, T, D))[0], torch.arange(T) % C)


@case(True, shared=True)
def one_example_for_all() -> tuple[nn.Module, Loss]:
    """One context passes a layer once and is expanded to the batch: every term depends on it."""
    context = rows(1, D)
    model = Steps(lambda m, x: m.b((m.a(x) + m.c(context).expand(N, H)).tanh()), a=nn.Linear(D, H), c=nn.Linear(D, H), b=nn.Linear(H, C))
    return classified(model, rows(N, D))


@case(False)
def one_example_broadcast() -> tuple[nn.Module, Loss]:
    """The first example is added to all."""
    return classified(Steps(lambda m, x: m.b((m.a(x) + m.a(x[:1])).tanh()), a=nn.Linear(D, H), b=nn.Linear(H, C)), rows(N, D))


@case(True, shared=True)
def positions_as_an_embedding() -> tuple[nn.Module, Loss]:
    """Positions [1, T] are embedded once for all examples; words, one by one, are apart."""
    words = torch.arange(N * T).reshape(N, T) % 9
    walk = lambda m, x: m.out((m.words(x) + m.places(torch.arange(T)[None])).tanh().mean(1))  # noqa: E731
    return classified(Steps(walk, words=nn.Embedding(9, H), places=nn.Embedding(T, H), out=nn.Linear(H, C)), words)


@case(True)
def positions_as_a_parameter() -> tuple[nn.Module, Loss]:
    """A parameter [1, T, H] is no layer's output: it moves as a whole."""
    model = Steps(lambda m, x: m.out((m.inp(x) + m.places).tanh().mean(1)), inp=nn.Linear(D, H), out=nn.Linear(H, C))
    model.register_parameter("places", nn.Parameter(torch.randn(1, T, H)))
    return classified(model, rows(N, T, D))


@case(True, shared=True)
def weights_from_a_network() -> tuple[nn.Module, Loss]:
    """A layer makes the weights [C, H] of another out of its own inputs: its rows are classes."""
    model = Steps(lambda m, x: m.a(x).tanh() @ m.c(rows(C, D)).T, a=nn.Linear(D, H), c=nn.Linear(D, H))
    return classified(model, rows(N, D))


@case(True)
def group_norm() -> tuple[nn.Module, Loss]:
    layers = [nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, C)]
    return classified(nn.Sequential(*layers), rows(N, 1, 4, 4))


@case(True)
def siamese() -> tuple[nn.Module, Loss]:
    """The model is called twice; pairs are the examples."""
    near = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)

    def loss(m: nn.Module) -> Tensor:
        apart = (m(rows(N, D)) - m(rows(N, D).sin())).square().sum(1)
        return (near * apart + (1 - near) * (2 - apart).relu()).mean()

    return perceptron(), loss


@case(True)
def two_views_in_one_batch() -> tuple[nn.Module, Loss]:
    """Both views of a pair go through at once, [2 * N, D]: a term belongs to two rows."""

    def score(z: Tensor) -> Tensor:
        one, other = z.chunk(2)
        return (1 - F.cosine_similarity(one, other)).mean()

    return embedded(score, rows(2 * N, D))


@case(True)
def two_heads() -> tuple[nn.Module, Loss]:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(D, H), nn.ReLU()), "label": nn.Linear(H, C), "value": nn.Linear(H, 1)})

    def loss(m: nn.Module) -> Tensor:
        h = m["body"](rows(N, D))
        return F.cross_entropy(m["label"](h), LABELS) + 0.5 * F.mse_loss(m["value"](h)[:, 0], rows(N))

    return model, loss


@case(None)
def one_example_alone() -> tuple[nn.Module, Loss]:
    """No dimension of the batch."""
    return perceptron(), lambda m: F.cross_entropy(m(rows(D)), torch.tensor(1))


@case(None)
def a_batch_of_one() -> tuple[nn.Module, Loss]:
    return perceptron(), lambda m: F.cross_entropy(m(rows(1, D)), torch.tensor([1]))


CASES = [*PLACES, *MEETINGS, *LOSSES]
