"""Files of another data set where MNIST's belong."""

import gzip
import math
import struct
from pathlib import Path

import pytest

from forwardgrad.lab.data import datasets
from forwardgrad.lab.errors import UserError


@pytest.mark.parametrize("packed", [True, False])
def test_another_data_set_in_mnists_place_is_told_how_own_data_are_used(tmp_path: Path, packed: bool) -> None:
    """Of the same shape, as Fashion-MNIST is, or of another one."""
    for shape, why in (((60_000, 28, 28), "its checksum is wrong"), ((1_000, 32, 32), r"it declares the shape \(1000, 32, 32\)")):
        content = bytes((0, 0, 8, 3)) + struct.pack(">3I", *shape) + bytes(math.prod(shape))
        path = tmp_path / "MNIST" / "raw" / f"train-images-idx3-ubyte{'.gz' if packed else ''}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content, 1) if packed else content)
        with pytest.raises(UserError, match=rf"{path.name} is damaged or of another data set \({why}") as told:
            datasets.load("mnist", 0, data_dir=tmp_path)
        assert "data of your own belong in a study that names them by import path (docs/studies.md)" in str(told.value)
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(UserError, match=rf"{path.name} is damaged \("):  # what is cut short is nobody's data
            datasets.load("mnist", 0, data_dir=tmp_path)
