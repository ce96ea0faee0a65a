"""MNIST from its files: read as written, and every damage told."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.support.data_files import COUNTS, SIZE, TRAIN_IMAGES, TRAIN_LABELS, idx, read_small, small_mnist, write

from forwardgrad.lab.data.files import digest
from forwardgrad.lab.errors import UserError


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
