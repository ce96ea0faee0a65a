"""How losses of independent examples are scaled and add up: a part of `layouts`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from tests.support.cases import rows
from tests.support.layout import LABELS, Build, C, D, H, Layout, Loss, N, T, classified, perceptron, scored
from torch import Tensor, nn

LOSSES: list[Layout] = []


def whole(make: Build) -> Build:
    LOSSES.append(Layout(make.__name__, make, True))
    return make


def plain_loss(name: str, score: Callable[[nn.Module, Tensor], Tensor], apart: bool | None = True) -> None:
    LOSSES.append(Layout(name, lambda: scored(score), apart))


def _weights(m: nn.Module) -> Tensor:
    return sum((p.square().sum() for p in m.parameters()), torch.zeros((), dtype=torch.float64))


SOFT, TARGET, BITS = rows(N, C).softmax(1), rows(N, C).cos(), (rows(N, C) > 0).double()
plain_loss("accumulated", lambda m, z: F.cross_entropy(z, LABELS) / 4)
plain_loss("scaled_by_a_grad_scaler", lambda m, z: F.cross_entropy(z, LABELS) * 65536)
plain_loss("ascended", lambda m, z: 1 - (1 - F.cross_entropy(z, LABELS)))
plain_loss("a_penalty_times_zero", lambda m, z: F.cross_entropy(z, LABELS) + 0 * z.square().sum())
plain_loss("two_losses_of_one_output", lambda m, z: 0.3 * F.cross_entropy(z, LABELS) + 2 * F.mse_loss(z, TARGET))
plain_loss("weight_decay_in_the_loss", lambda m, z: F.cross_entropy(z, LABELS) + 0.1 * _weights(m))
plain_loss("a_penalty_on_the_output", lambda m, z: F.cross_entropy(z, LABELS) + 0.01 * z.logsumexp(1).square().mean())
plain_loss("added_by_python", lambda m, z: sum([F.cross_entropy(z, LABELS), F.mse_loss(z, TARGET)]))
plain_loss("stacked_and_added", lambda m, z: torch.stack([F.cross_entropy(z, LABELS), F.mse_loss(z, TARGET)]).sum())
plain_loss("weighted_mean", lambda m, z: (F.cross_entropy(z, LABELS, reduction="none") * rows(N).exp()).sum() / rows(N).exp().sum())
plain_loss("nll_of_log_softmax", lambda m, z: F.nll_loss(F.log_softmax(z, 1), LABELS))
plain_loss("picked_log_probabilities", lambda m, z: -z.log_softmax(1).gather(1, LABELS[:, None]).mean())
plain_loss("huber", lambda m, z: F.huber_loss(z, TARGET, delta=0.5))
plain_loss("smooth_l1", lambda m, z: F.smooth_l1_loss(z, TARGET))
plain_loss("l1", lambda m, z: F.l1_loss(z, TARGET))
plain_loss("squares_by_hand", lambda m, z: ((z - TARGET) ** 2).mean())
plain_loss("summed_squares", lambda m, z: F.mse_loss(z, TARGET, reduction="sum"))
plain_loss("binary", lambda m, z: F.binary_cross_entropy_with_logits(z, BITS))
plain_loss("pos_weight", lambda m, z: F.binary_cross_entropy_with_logits(z, BITS, pos_weight=torch.tensor([1.0, 2.0, 3.0]).double()))
plain_loss("binary_of_probabilities", lambda m, z: F.binary_cross_entropy(z.sigmoid(), BITS))
plain_loss("soft_targets", lambda m, z: F.cross_entropy(z, SOFT))
plain_loss("distilled", lambda m, z: F.kl_div(F.log_softmax(z / 2, 1), SOFT, reduction="batchmean") * 4)
plain_loss("label_smoothing", lambda m, z: F.cross_entropy(z, LABELS, label_smoothing=0.1))
plain_loss("ignore_index", lambda m, z: F.cross_entropy(z, torch.tensor([0, -100, 1, 2])))
plain_loss("class_weights", lambda m, z: F.cross_entropy(z, LABELS, weight=torch.tensor([1.0, 2.0, 3.0]).double()))
plain_loss("summed", lambda m, z: F.cross_entropy(z, LABELS, reduction="sum"))
plain_loss("summed_and_divided", lambda m, z: F.cross_entropy(z, LABELS, reduction="sum") / N)
plain_loss("one_loss_an_example", lambda m, z: F.cross_entropy(z, LABELS, reduction="none"))
plain_loss("one_loss_an_example_averaged", lambda m, z: F.cross_entropy(z, LABELS, reduction="none").mean())
plain_loss(
    "focal",
    lambda m, z: ((1 - (-F.cross_entropy(z, LABELS, reduction="none")).exp()) ** 2 * F.cross_entropy(z, LABELS, reduction="none")).mean(),
)
plain_loss("margin", lambda m, z: (1 - z[torch.arange(N), LABELS] + z.mean(1)).relu().mean())
plain_loss("temperature", lambda m, z: F.cross_entropy(z / 0.5, LABELS))
plain_loss("a_root_of_the_mean", lambda m, z: F.mse_loss(z, TARGET).sqrt(), apart=False)
plain_loss("perplexity", lambda m, z: F.cross_entropy(z, LABELS).exp(), apart=False)
plain_loss("a_product_of_two_losses", lambda m, z: F.cross_entropy(z, LABELS) * F.mse_loss(z, TARGET), apart=False)
plain_loss("a_balance_over_the_batch", lambda m, z: F.cross_entropy(z, LABELS) - 0.1 * (z.softmax(1).mean(0).log()).mean(), apart=False)


def worded(score: Callable[[Tensor, Tensor], Tensor]) -> tuple[nn.Module, Loss]:
    """A class for every word of a sentence, words on their own: [N, T, C]."""
    model = nn.Sequential(nn.Embedding(9, H), nn.Linear(H, H), nn.Tanh(), nn.Linear(H, C))
    words = torch.arange(N * T).reshape(N, T) % 9
    return model, lambda m: score(m(words), words % C)


@whole
def token_level_after_a_reshape() -> tuple[nn.Module, Loss]:
    return worded(lambda z, tags: F.cross_entropy(z.reshape(-1, C), tags.reshape(-1)))


@whole
def token_level_with_classes_second() -> tuple[nn.Module, Loss]:
    return worded(lambda z, tags: F.cross_entropy(z.transpose(1, 2), tags))


@whole
def token_level_shifted() -> tuple[nn.Module, Loss]:
    """The next word, as language models are trained."""
    return worded(lambda z, tags: F.cross_entropy(z[:, :-1].reshape(-1, C), tags[:, 1:].reshape(-1)))


@whole
def token_level_with_padding() -> tuple[nn.Module, Loss]:
    return worded(lambda z, tags: F.cross_entropy(z.reshape(-1, C), tags.masked_fill(tags == 1, -100).reshape(-1)))


@whole
def zeros_in_the_last_layer() -> tuple[nn.Module, Loss]:
    """Independent examples behind a last layer of zeros: no derivative shows anything at first."""
    model = perceptron()
    nn.init.zeros_(model[2].weight)
    return classified(model, rows(N, D))
