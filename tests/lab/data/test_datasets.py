import gzip
import io
import os
import pickle
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from forwardgrad.lab.data import datasets
from forwardgrad.lab.data.cifar import PickledArray, parse_batch, read_cifar, unpickle
from forwardgrad.lab.data.files import KNOWN, digest, folder, remedy, verify
from forwardgrad.lab.data.mnist import read_mnist
from forwardgrad.lab.data.splits import Dataset, divide
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import run

COUNTS, SIZE = (7, 5), 4  # the small MNIST of these tests
TRAIN_IMAGES = "MNIST/raw/train-images-idx3-ubyte"
TRAIN_LABELS = "MNIST/raw/train-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()


def small_mnist() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    files = {}
    for prefix, n in zip(("train", "t10k"), COUNTS, strict=True):
        files[f"MNIST/raw/{prefix}-images-idx3-ubyte"] = idx(random.integers(0, 256, (n, SIZE, SIZE)))
        files[f"MNIST/raw/{prefix}-labels-idx1-ubyte"] = idx(random.integers(0, 10, n))
    return files


def write(root: Path, files: dict[str, bytes], packed: bool) -> Path:
    for relative, content in files.items():
        path = root / (f"{relative}.gz" if packed else relative)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return root


def read_small(root: Path, known: dict[str, str] | None = None) -> list[torch.Tensor]:
    train, test = read_mnist(root, COUNTS, SIZE, known or {})
    return [train.images, train.labels, test.images, test.labels]


def test_digits_are_split_without_loss_or_overlap() -> None:
    from sklearn.datasets import load_digits

    digits = datasets.load("digits", seed=3)
    splits = (digits.train, digits.validation, digits.test)
    assert [len(s) for s in splits] == [1077, 360, 360]
    assert digits.shape == (1, 8, 8)
    assert digits.classes == 10
    assert all(s.images.dtype == torch.uint8 and s.labels.dtype == torch.int64 for s in splits)

    def rows(images: torch.Tensor, labels: torch.Tensor) -> list[list[int]]:
        return sorted(torch.cat([images.reshape(len(labels), -1).long(), labels[:, None]], 1).tolist())

    whole = load_digits()
    expected = rows(torch.from_numpy(whole.images), torch.from_numpy(whole.target))
    assert rows(torch.cat([s.images for s in splits]), torch.cat([s.labels for s in splits])) == expected


def test_pixels_lie_in_zero_to_one_and_reach_both_ends() -> None:
    digits = datasets.load("digits", seed=0)
    pixels = digits.pixels(digits.train.images)
    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (0, 1)
    other = Dataset("mnist", 10, digits.train, digits.validation, digits.test)
    assert torch.equal(other.pixels(torch.tensor([0, 51, 255], dtype=torch.uint8)), torch.tensor([0, 0.2, 1]))


def test_the_seed_decides_the_split_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (datasets.load("digits", seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.test.labels, again.test.labels)
    assert not torch.equal(first.train.images, other.train.images)
    assert torch.equal(first.test.images, other.test.images)  # no seed sees another's test images in training
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(run.stream(0, "split")))
    parts = divide(torch.arange(1797), torch.arange(1797), (1077, 360, 360), seed=0)
    assert torch.equal(torch.cat([p.images for p in parts]), order)
    assert all(torch.equal(p.images, p.labels) for p in parts)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"sklearn cannot be imported.*pip install 'forwardgrad\[lab\]'"):
        datasets.load("digits", 0)


def test_reading_needs_none_of_the_lab_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pooch", "sklearn", "requests", "rich"):
        monkeypatch.setitem(sys.modules, module, None)
    assert len(read_small(write(tmp_path, small_mnist(), packed=True))[0]) == COUNTS[0]


def test_the_folder_is_the_argument_then_the_variable_then_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDGRAD_DATA", str(tmp_path / "variable"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert folder(tmp_path / "argument") == tmp_path / "argument"
    assert folder() == tmp_path / "variable"
    monkeypatch.setenv("FORWARDGRAD_DATA", "")
    assert folder() == tmp_path / "cache/forwardgrad"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder() == tmp_path / ".cache/forwardgrad"
    assert folder("~/here") == tmp_path / "here"


@pytest.mark.skipif(sys.platform == "win32", reason="pooch asks Windows itself, not the environment")
def test_the_cache_folder_is_the_one_pooch_would_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pooch = pytest.importorskip("pooch")
    monkeypatch.delenv("FORWARDGRAD_DATA", raising=False)
    for cache in (str(tmp_path), ""):
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        assert folder() == Path(pooch.os_cache("forwardgrad"))


def test_the_remedy_names_the_folder_only_when_it_is_not_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDGRAD_DATA", str(tmp_path))
    assert remedy("mnist", tmp_path) == "forwardgrad data fetch mnist"
    assert remedy("cifar10", tmp_path / "a b") == f"forwardgrad data fetch cifar10 --data-dir '{tmp_path}/a b'"


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_is_read_as_written(tmp_path: Path, packed: bool) -> None:
    files = small_mnist()
    images, labels, _, test_labels = read_small(write(tmp_path, files, packed))
    assert images.shape == (COUNTS[0], 1, SIZE, SIZE)
    assert images.dtype == torch.uint8
    assert bytes(images.flatten().tolist()) == files[TRAIN_IMAGES][16:]
    assert bytes(labels.tolist()) == files[TRAIN_LABELS][8:]
    assert labels.dtype == torch.int64
    assert len(test_labels) == COUNTS[1]


def image_file(**change: bytes) -> bytes:
    good = small_mnist()[TRAIN_IMAGES]
    parts = {"magic": good[:4], "shape": good[4:16], "values": good[16:]} | change
    return parts["magic"] + parts["shape"] + parts["values"]


SHAPE = struct.pack(">3I", COUNTS[0] - 1, SIZE, SIZE)
BROKEN = {
    "empty": (TRAIN_IMAGES, b"", "inside its header"),
    "cut in the header": (TRAIN_IMAGES, image_file()[:11], "ends after 11 bytes, inside its header"),
    "magic number": (TRAIN_IMAGES, image_file(magic=b"\x01\0\x08\x03"), "starts with 01000803"),
    "type": (TRAIN_IMAGES, image_file(magic=b"\0\0\x0d\x03"), "starts with 00000d03"),
    "dimensions": (TRAIN_IMAGES, image_file(magic=b"\0\0\x08\x01"), "starts with 00000801"),
    "count": (TRAIN_IMAGES, image_file(shape=SHAPE, values=image_file()[32:]), r"shape \(6, 4, 4\), not \(7, 4, 4\)"),
    "cut": (TRAIN_IMAGES, image_file()[:-1], "has 111 values, not 112"),
    "too long": (TRAIN_IMAGES, image_file() + b"\0", "has 113 values, not 112"),
    "fewer labels": (TRAIN_LABELS, idx(np.zeros(COUNTS[0] - 1)), r"shape \(6,\), not \(7,\)"),
    "label": (TRAIN_LABELS, idx(np.full(COUNTS[0], 10)), "label 10 is not a digit"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_mnist_file_is_named_with_the_fault_and_the_command(tmp_path: Path, case: str, packed: bool) -> None:
    relative, content, fault = BROKEN[case]
    write(tmp_path, small_mnist() | {relative: content}, packed)
    with pytest.raises(UserError, match=fault) as caught:
        read_small(tmp_path)
    assert str(tmp_path / relative) in str(caught.value)
    assert f"`forwardgrad data fetch mnist --data-dir {tmp_path}`" in str(caught.value)


@pytest.mark.parametrize("damage", ["not gzip", "cut", "checksum"])
def test_a_broken_gzip_file_is_named(tmp_path: Path, damage: str) -> None:
    write(tmp_path, small_mnist(), packed=True)
    path = tmp_path / f"{TRAIN_IMAGES}.gz"
    packed = path.read_bytes()
    path.write_bytes({"not gzip": b"<html>", "cut": packed[:-12], "checksum": packed[:-8] + b"0000" + packed[-4:]}[damage])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz is damaged .*forwardgrad data fetch mnist"):
        read_small(tmp_path)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    relative=st.sampled_from(sorted(small_mnist())), where=st.floats(0, 1, exclude_max=True), bits=st.integers(0, 255), packed=st.booleans()
)
@example(relative=TRAIN_IMAGES, where=0.99, bits=1, packed=False)  # a pixel: of the right form, so accepted
@example(relative=TRAIN_LABELS, where=0.99, bits=0, packed=True)
def test_damage_anywhere_is_an_error_or_harmless(tmp_path: Path, relative: str, where: float, bits: int, packed: bool) -> None:
    """`bits` flipped in one byte, or the file cut there when `bits` is 0."""
    files, root = small_mnist(), tmp_path / str(packed)
    path = write(root, files, packed) / (f"{relative}.gz" if packed else relative)
    intact = read_small(root)
    content = bytearray(path.read_bytes())
    at = int(where * len(content))
    content[at] ^= bits
    path.write_bytes(content if bits else content[:at])
    known = {name: digest(c) for name, c in files.items()}
    for checked in (known, {}):
        try:
            found = read_small(root, checked)
        except UserError as error:
            assert str(path) in str(error)  # noqa: PT017 - either outcome is right
            continue
        assert bits
        assert [t.shape for t in found] == [t.shape for t in intact]
        assert int(found[1].max()) < 10
        if checked or packed:
            assert all(torch.equal(a, b) for a, b in zip(found, intact, strict=True))


def test_a_missing_file_is_named_with_the_command(tmp_path: Path) -> None:
    write(tmp_path, small_mnist(), packed=False)
    (tmp_path / TRAIN_LABELS).unlink()
    with pytest.raises(UserError) as caught:
        read_small(tmp_path)
    assert f"{tmp_path / TRAIN_LABELS}.gz is missing: run `forwardgrad data fetch mnist --data-dir {tmp_path}`" in str(caught.value)
    with pytest.raises(UserError, match="data_batch_1 is missing: run `forwardgrad data fetch cifar10"):
        datasets.load("cifar10", 0, data_dir=tmp_path)


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / f"{TRAIN_IMAGES}.gz").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot read .*train-images-idx3-ubyte\.gz \(Is a directory\).*forwardgrad data fetch mnist"):
        datasets.load("mnist", 0, data_dir=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot read .*data_batch_1"):
        datasets.load("cifar10", 0, data_dir=tmp_path / "file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root and Windows read everything")
def test_a_folder_without_permission_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path, small_mnist(), packed=True)
    (tmp_path / "MNIST").chmod(0)
    try:
        with pytest.raises(UserError, match=r"cannot read .*Permission denied"):
            read_small(tmp_path)
    finally:
        (tmp_path / "MNIST").chmod(0o700)


def batch(n: int = 3, protocol: int = 4, **change: object) -> bytes:
    random = np.random.default_rng(n)
    values: dict[str, object] = {"data": random.integers(0, 256, (n, 3072)).astype(np.uint8), "labels": [i % 10 for i in range(n)]}
    return pickle.dumps({key.encode(): value for key, value in (values | change).items()}, protocol=protocol)


def test_a_batch_is_read_as_written() -> None:
    split = parse_batch(batch(3), 3)
    assert np.array_equal(split.images.reshape(3, -1).numpy(), np.random.default_rng(3).integers(0, 256, (3, 3072)))
    assert split.images.shape == (3, 3, 32, 32)
    assert split.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"labels": [0, 1]},
        {"labels": [0, 1, 10]},
        {"labels": [0, 1, -1]},
        {"labels": [0, 1, 2.0]},
        {"labels": None},
        {"data": None},
        {"data": np.zeros((3, 3071), np.uint8)},
        {"data": np.zeros((3072, 3), np.uint8)},
        {"data": np.zeros((3, 3072), np.int8)},
        {"data": np.zeros((3, 3072), np.uint16)},
        {"data": np.asfortranarray(np.zeros((3, 3072), np.uint8))},
    ],
    ids=str,
)
def test_a_batch_of_another_form_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="it does not hold"):
        parse_batch(batch(3, **change), 3)


class Call:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "function", [os.system, eval, exec, getattr, np.frombuffer, np.load, np.fromfile, io.open, shutil.rmtree], ids=lambda f: f.__name__
)
def test_a_pickle_cannot_call_anything(tmp_path: Path, function: object, protocol: int) -> None:
    harmful = pickle.dumps(Call(function, f"touch {tmp_path / 'made'}"), protocol=protocol)
    with pytest.raises(ValueError, match=r"it asks for .*, which no data file needs"):
        unpickle(harmful)
    assert not (tmp_path / "made").exists()
    if function is os.system:
        pickle.loads(harmful)
        assert (tmp_path / "made").exists()  # the harm is real, so the line before could fail


def test_pickled_arrays_are_not_handed_to_numpy() -> None:
    """Not even numpy's own constructors run, which a forged pickle could give a false size."""
    for allowed in (b"numpy\nndarray", b"numpy\ndtype", b"numpy.core.multiarray\n_reconstruct", b"numpy._core.multiarray\n_reconstruct"):
        assert isinstance(unpickle(b"c" + allowed + b"\n(I999999999999\ntR."), PickledArray)
    for refused in (
        b"numpy\nload",
        b"numpy\nndarray.tofile",
        b"numpy.core.multiarray\nfromfile",
        b"forwardgrad.lab.data.cifar\nPickledArray",
    ):
        with pytest.raises(ValueError, match="it asks for"):
            unpickle(b"c" + refused + b"\n.")


def test_persistent_ids_and_garbage_are_refused() -> None:
    class Persistent(pickle.Pickler):
        def persistent_id(self, item: object) -> object:
            return "file:/etc/passwd" if item == "outside" else None

    stream = io.BytesIO()
    Persistent(stream).dump(["outside"])
    for content in (stream.getvalue(), b"", b"<html>", batch()[:-20], b"\x80\x04]."[:-1]):
        with pytest.raises(ValueError, match="it cannot be unpickled"):
            unpickle(content)


def small_cifar(root: Path) -> dict[str, str]:
    known = {}
    for i, relative in enumerate(KNOWN["cifar10"]):
        (root / relative).parent.mkdir(exist_ok=True)
        (root / relative).write_bytes(batch(3, labels=[i, i, i]))
        known[relative] = digest((root / relative).read_bytes())
    return known


def test_cifar_files_are_read_in_order_and_checked_before_they_are_interpreted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = small_cifar(tmp_path)
    train, test = read_cifar(tmp_path, 3, known)
    assert train.labels.tolist() == [i for i in range(5) for _ in range(3)]
    assert test.labels.tolist() == [5, 5, 5]
    monkeypatch.setattr("forwardgrad.lab.data.cifar.unpickle", lambda content: pytest.fail("interpreted before it was checked"))
    with pytest.raises(
        UserError,
        match=r"data_batch_1 is damaged or of another data set \(its checksum is wrong\): run `forwardgrad data fetch cifar10 --data-dir",
    ):
        read_cifar(tmp_path, 3)


def test_verify_tells_ok_missing_and_damaged_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {state for _, state in verify(tmp_path)} == {"missing"}
    assert len(verify(tmp_path)) == 11
    files = small_mnist()
    known = {"mnist": {name: digest(content) for name, content in files.items()}, "cifar10": small_cifar(tmp_path)}
    monkeypatch.setattr("forwardgrad.lab.data.files.KNOWN", known)
    write(tmp_path, files, packed=True)
    assert {state for _, state in verify(tmp_path)} == {"ok"}
    (tmp_path / f"{TRAIN_IMAGES}.gz").unlink()
    write(tmp_path, {TRAIN_IMAGES: files[TRAIN_IMAGES]}, packed=False)
    (tmp_path / f"{TRAIN_LABELS}.gz").write_bytes(b"no gzip")
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte.gz").unlink()
    with (tmp_path / "cifar-10-batches-py/batches.meta").open("ab") as file:
        file.write(b"more")
    states = dict(verify(tmp_path))
    assert states.pop(TRAIN_IMAGES) == "ok"
    assert states.pop(f"{TRAIN_LABELS}.gz") == "damaged"
    assert states.pop("MNIST/raw/t10k-labels-idx1-ubyte.gz") == "missing"
    assert states.pop("cifar-10-batches-py/batches.meta") == "damaged"
    assert len(states) == 7
    assert set(states.values()) == {"ok"}


def test_the_published_files_are_known(data_dir: Path) -> None:
    assert {state for _, state in verify(data_dir)} == {"ok"}


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
    total = sum(int(s.images.sum(dtype=torch.int64)) for s in (mnist.train, mnist.validation))
    assert total / (60_000 * 784 * 255) == pytest.approx(0.1307, abs=5e-5)
    other = datasets.load("mnist", 1, data_dir=tmp_path)
    assert not torch.equal(mnist.train.labels, other.train.labels)
    assert torch.equal(mnist.test.images, other.test.images)


def test_published_cifar_loads(data_dir: Path) -> None:
    cifar = datasets.load("cifar10", 0, data_dir=data_dir)
    assert [len(cifar.train), len(cifar.validation), len(cifar.test)] == [40_000, 10_000, 10_000]
    assert cifar.shape == (3, 32, 32)
    assert cifar.test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert torch.cat([cifar.train.labels, cifar.validation.labels]).bincount().tolist() == [5000] * 10
    sums = [s.images.sum((0, 2, 3), dtype=torch.int64) for s in (cifar.train, cifar.validation)]
    means = ((sums[0] + sums[1]) / (50_000 * 32 * 32 * 255)).tolist()
    assert means == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-5)
