"""Where the files of data sets are, and what is said where one is missing, damaged or not to be read."""

import os
import sys
from pathlib import Path

import pytest
from tests.support.data_files import TRAIN_IMAGES, TRAIN_LABELS, read_small, small_cifar, small_mnist, write

from forwardgrad.lab.data import datasets
from forwardgrad.lab.data.files import digest, folder, remedy, verify
from forwardgrad.lab.errors import UserError


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
