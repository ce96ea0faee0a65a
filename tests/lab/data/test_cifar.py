"""CIFAR-10 from its files: read as written, and no pickle runs anything."""

import io
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.support.data_files import batch, small_cifar

from forwardgrad.lab.data.cifar import PickledArray, parse_batch, read_cifar, unpickle
from forwardgrad.lab.errors import UserError


def test_a_batch_is_read_as_written() -> None:
    split = parse_batch(batch(3), 3)
    assert np.array_equal(split.inputs.reshape(3, -1).numpy(), np.random.default_rng(3).integers(0, 256, (3, 3072)))
    assert split.inputs.shape == (3, 3, 32, 32)
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
