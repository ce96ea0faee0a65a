"""The paper's networks, against its parameter counts and layer sizes."""

import pytest
import torch
from torch import nn

from forwardgrad.lab import models
from forwardgrad.lab.errors import UserError

MNIST, CIFAR, DIGITS = (1, 28, 28), (3, 32, 32), (1, 8, 8)


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("logistic", MNIST, 7_850),
        ("mlp", DIGITS, 64 * 64 + 64 + 64 * 10 + 10),
        ("nn", MNIST, 1_863_690),
        ("cnn", MNIST, 1_171_274),
        ("cifar-cnn", CIFAR, 17_967_690),
    ],
)
def test_parameter_counts(name: str, shape: tuple[int, int, int], parameters: int) -> None:
    model = models.build(name, shape, 10)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.rand(2, *shape)).shape == (2, 10)


def test_the_cnn_shrinks_as_the_paper_says() -> None:
    sizes, x = [], torch.rand(1, *MNIST)
    for layer in models.build("cnn", MNIST, 10):
        x = layer(x)
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)):
            sizes.append(x.shape[-1])
    assert sizes == [26, 24, 12, 10, 8, 4]


def test_hidden_layers_are_followed_by_relu_and_the_last_by_nothing() -> None:
    kinds = [type(layer).__name__ for layer in models.build("nn", MNIST, 10)]
    assert kinds == ["Flatten", "Linear", "ReLU", "Linear", "ReLU", "Linear"]


def test_initialisation_is_pytorchs_own() -> None:
    torch.manual_seed(3)
    ours = models.build("logistic", MNIST, 10)[1]
    torch.manual_seed(3)
    assert torch.equal(ours.weight, nn.Linear(784, 10).weight)


def test_images_too_small_for_the_network_are_told() -> None:
    with pytest.raises(UserError, match="needs larger images"):
        models.build("cnn", DIGITS, 10)


def test_an_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="cifar-cnn"):
        models.build("resnet", MNIST, 10)
