"""Data sets by name: splits, brightness, and the published files."""

import gzip
import sys
from pathlib import Path

import pytest
import torch
from tests.support.data_files import COUNTS, read_small, small_mnist, write

from forwardgrad.lab.data import datasets
from forwardgrad.lab.data.files import KNOWN
from forwardgrad.lab.data.splits import Dataset, divide
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import run


def test_digits_are_split_without_loss_or_overlap() -> None:
    from sklearn.datasets import load_digits

    digits = datasets.load("digits", seed=3)
    splits = (digits.train, digits.validation, digits.test)
    assert [len(s) for s in splits] == [1077, 360, 360]
    assert digits.shape == (1, 8, 8)
    assert digits.classes == 10
    assert all(s.inputs.dtype == torch.uint8 and s.labels.dtype == torch.int64 for s in splits)

    def rows(images: torch.Tensor, labels: torch.Tensor) -> list[list[int]]:
        return sorted(torch.cat([images.reshape(len(labels), -1).long(), labels[:, None]], 1).tolist())

    whole = load_digits()
    expected = rows(torch.from_numpy(whole.images), torch.from_numpy(whole.target))
    assert rows(torch.cat([s.inputs for s in splits]), torch.cat([s.labels for s in splits])) == expected


def test_pixels_lie_in_zero_to_one_and_reach_both_ends() -> None:
    digits = datasets.load("digits", seed=0)
    pixels = digits.for_model(digits.train.inputs)
    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (0, 1)
    other = Dataset("mnist", 10, digits.train, digits.validation, digits.test)
    assert torch.equal(other.for_model(torch.tensor([0, 51, 255], dtype=torch.uint8)), torch.tensor([0, 0.2, 1]))


def test_the_seed_decides_the_split_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (datasets.load("digits", seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.train.inputs, again.train.inputs)
    assert torch.equal(first.test.labels, again.test.labels)
    assert not torch.equal(first.train.inputs, other.train.inputs)
    assert torch.equal(first.test.inputs, other.test.inputs)  # no seed sees another's test images in training
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(run.stream(0, "split")))
    parts = divide(torch.arange(1797), torch.arange(1797), (1077, 360, 360), seed=0)
    assert torch.equal(torch.cat([p.inputs for p in parts]), order)
    assert all(torch.equal(p.inputs, p.labels) for p in parts)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"sklearn cannot be imported.*pip install 'forwardgrad\[lab\]'"):
        datasets.load("digits", 0)


def test_reading_needs_none_of_the_lab_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pooch", "sklearn", "requests", "rich"):
        monkeypatch.setitem(sys.modules, module, None)
    assert len(read_small(write(tmp_path, small_mnist(), packed=True))[0]) == COUNTS[0]


def test_published_mnist_unpacked_loads_too(data_dir: Path, tmp_path: Path) -> None:
    for name in KNOWN["mnist"]:
        packed = data_dir / f"{name}.gz"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(gzip.decompress(packed.read_bytes()) if packed.exists() else (data_dir / name).read_bytes())
    mnist = datasets.load("mnist", 0, data_dir=tmp_path)
    assert [len(mnist.train), len(mnist.validation), len(mnist.test)] == [50_000, 10_000, 10_000]
    assert mnist.shape == (1, 28, 28)
    assert mnist.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    # The mean brightness of the 60,000 official training images, and their count by label.
    everything = torch.cat([mnist.train.labels, mnist.validation.labels])
    assert everything.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    total = sum(int(s.inputs.sum(dtype=torch.int64)) for s in (mnist.train, mnist.validation))
    assert total / (60_000 * 784 * 255) == pytest.approx(0.1307, abs=5e-5)
    other = datasets.load("mnist", 1, data_dir=tmp_path)
    assert not torch.equal(mnist.train.labels, other.train.labels)
    assert torch.equal(mnist.test.inputs, other.test.inputs)


def test_published_cifar_loads(data_dir: Path) -> None:
    cifar = datasets.load("cifar10", 0, data_dir=data_dir)
    assert [len(cifar.train), len(cifar.validation), len(cifar.test)] == [40_000, 10_000, 10_000]
    assert cifar.shape == (3, 32, 32)
    assert cifar.test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert torch.cat([cifar.train.labels, cifar.validation.labels]).bincount().tolist() == [5000] * 10
    sums = [s.inputs.sum((0, 2, 3), dtype=torch.int64) for s in (cifar.train, cifar.validation)]
    means = ((sums[0] + sums[1]) / (50_000 * 32 * 32 * 255)).tolist()
    assert means == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-5)
