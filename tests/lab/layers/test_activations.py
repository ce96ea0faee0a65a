"""Where the places between layers lie, and how their activations become features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from forwardgrad.lab import models
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.layers.activations import features, layers, pooled


def test_behind_a_layer_is_what_the_next_one_takes_in() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(7, 2, 3)
    assert layers(model, x) == ["1", "3"]
    found = features(model, ["1", "3"], x.split(4), 100)
    with torch.no_grad():
        expected = [x.flatten(1), model[:3](x), model(x)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_convolutions_are_pooled_and_nothing_is_left_changed() -> None:
    torch.manual_seed(0)
    model = models.build("cnn", (1, 28, 28), 10)
    model[1].eval()
    x = torch.rand(3, 1, 28, 28)
    names = layers(model, x)
    assert names == ["0", "2", "5", "7", "11", "13"]
    found = features(model, names, [x], 1024)
    assert [None if one is None else one.shape[1] for one in found] == [784, 1024, 1024, 1024, 1024, 1024, 10]
    with torch.no_grad():
        first = model[:2](x)
    torch.testing.assert_close(found[1], nn.functional.adaptive_avg_pool2d(first, 4).flatten(1))
    assert model.training
    assert not model[1].training  # as it was before
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("shape", "channels_first", "width"),
    [((2, 10), True, 8), ((2, 5), True, 5), ((2, 4, 3, 3), True, 4), ((2, 4, 6, 6), True, 4), ((2, 2, 6, 6), True, 8),
     ((2, 6, 4), False, 8), ((2, 3, 20), False, 8), ((2, 2, 3, 3, 3), True, 2), ((2, 2, 2, 2, 2, 2), True, 8), ((2,), True, 1)],
)  # fmt: skip
def test_the_finest_grid_with_few_enough_numbers(shape: tuple[int, ...], channels_first: bool, width: int) -> None:
    assert pooled(torch.rand(shape), 8, channels_first=channels_first).shape == (2, width)


def test_means_are_over_positions_and_the_channels_stay() -> None:
    channels = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1).expand(2, 3, 5, 5)
    torch.testing.assert_close(pooled(channels, 4, channels_first=True), torch.tensor([[1.0, 2.0, 3.0]] * 2))
    torch.testing.assert_close(pooled(channels.movedim(1, -1), 4, channels_first=False), torch.tensor([[1.0, 2.0, 3.0]] * 2))


class Words(nn.Module):
    """Words in front, a layer that is called twice, a recurrent layer, and examples second at the end where asked."""

    def __init__(self, *, second: bool = False) -> None:
        super().__init__()
        self.words, self.mix, self.walk, self.out = nn.Embedding(9, 4), nn.Linear(4, 4), nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 2)
        self.norm, self.second = nn.LayerNorm(4), second

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(torch.tanh(self.mix(self.norm(self.words(x)))))
        h = self.walk(h)[0]
        out: Tensor = self.out(h.transpose(0, 1) if self.second else h[:, -1])
        return out[-1] if self.second else out


def test_words_have_no_features_and_a_layer_that_is_called_twice_counts_once() -> None:
    model, x = Words(), torch.randint(9, (5, 6))
    names = layers(model, x)
    assert names == ["words", "mix", "walk", "out"]
    found = features(model, names, [x], 100)
    assert found[0] is None
    assert [None if one is None else tuple(one.shape) for one in found[1:]] == [(5, 24), (5, 24), (5, 3), (5, 2)]


def test_a_place_without_a_row_for_every_example_is_refused() -> None:
    model, x = Words(second=True), torch.randint(9, (5, 6))
    with pytest.raises(UserError, match=r"in front of out have shape \(6, 5, 3\), no row for each of 5 examples"):
        features(model, layers(model, x), [x], 100)
