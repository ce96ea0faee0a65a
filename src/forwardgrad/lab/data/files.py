"""Finds the official files of MNIST and CIFAR-10, compares them to known checksums, and says what to do where one is wrong.

Nothing here goes on the network; `forwardgrad.lab.data.fetching` does that.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shlex
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from forwardgrad.lab.errors import UserError

FileState = Literal["ok", "missing", "damaged"]

CLASSES = 10  # of every data set here
LARGEST = 1 << 26  # bytes; no official file, unpacked, is larger

# The md5 of every official file's content. MNIST's are of the unpacked files, so that it does not matter who packed them.
KNOWN: Mapping[str, Mapping[str, str]] = {
    "digits": {},
    "movie-reviews": {},
    "movie-reviews-16": {},
    "drug-reviews": {},
    "movie-words": {},
    "drug-words": {},
    "mnist": {
        "MNIST/raw/train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "MNIST/raw/train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "MNIST/raw/t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "MNIST/raw/t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "cifar10": {
        "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
        "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
        "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
        "cifar-10-batches-py/batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
}


class Missing(UserError):
    """A file of a data set is not there."""


class Damaged(UserError):
    """A file of a data set is not what was published."""


def folder(data_dir: Path | str | None = None) -> Path:
    """`data_dir`, else $FORWARDGRAD_DATA, else the user's cache folder: the folder that holds MNIST/ and cifar-10-batches-py/."""
    chosen = data_dir or os.environ.get("FORWARDGRAD_DATA", "").strip() or _cache()
    try:
        return Path(chosen).expanduser()
    except RuntimeError as error:
        raise UserError(f"{chosen} has no meaning here ({error}): name the data folder with --data-dir or FORWARDGRAD_DATA") from error


def _cache() -> str:
    # The same folders as pooch.os_cache("forwardgrad"), spelled out so that they do not depend on what is installed.
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
        return f"{local}/forwardgrad/forwardgrad/Cache"
    if sys.platform == "darwin":
        return "~/Library/Caches/forwardgrad"
    base = os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    return f"{base}/forwardgrad"


def remedy(name: str, root: Path) -> str:
    """The command that mends the files of a data set in `root`."""
    option = "" if root == folder() else f" --data-dir {shlex.quote(str(root))}"
    return f"forwardgrad data fetch {name}{option}"


def verify(data_dir: Path | str | None = None, names: Sequence[str] | None = None) -> list[tuple[str, FileState]]:
    """Every official file of these data sets (of all, if left out) as (path relative to the data folder, state)."""
    if unknown := [name for name in names or () if not KNOWN.get(name)]:
        raise UserError(f"no files belong to the data set {unknown[0]!r}: choose from {', '.join(name for name in KNOWN if KNOWN[name])}")
    root = folder(data_dir)
    return [file_state(root, name, relative, md5) for name in names or KNOWN for relative, md5 in KNOWN[name].items()]


def file_state(root: Path, name: str, relative: str, md5: str) -> tuple[str, FileState]:
    """The file that `load` would read for `relative`, and whether its content has this md5."""
    try:
        path, content = read(root, name, relative)
    except Missing:
        return _candidates(name, relative)[0], "missing"
    except Damaged:
        return _candidates(name, relative)[0], "damaged"
    return path.relative_to(root).as_posix(), "ok" if digest(content) == md5 else "damaged"


def digest(content: bytes) -> str:
    """The md5 of a file's content, as its publisher gives it."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _candidates(name: str, relative: str) -> tuple[str, ...]:
    # The packed file first: it is what a fetch brings, so a fetch also mends a folder whose unpacked file is damaged.
    return (f"{relative}.gz", relative) if name == "mnist" else (relative,)


def read(root: Path, name: str, relative: str) -> tuple[Path, bytes]:
    """The path and the unpacked content of one file. Content beyond LARGEST is cut; a check of length or checksum then refuses it."""
    for candidate in _candidates(name, relative):
        path = root / candidate
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                return path, file.read(LARGEST + 1)
        except FileNotFoundError:
            continue
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _damaged(path, error, name, root) from error
        except OSError as error:
            why = error.strerror or error
            other = f"fill another folder with `forwardgrad data fetch {name} --data-dir FOLDER`"
            raise UserError(f"cannot read {path} ({why}): make it readable, or {other}") from error
    raise Missing(f"{root / _candidates(name, relative)[0]} is missing: run `{remedy(name, root)}`, or name the folder that has it")


class OtherData(ValueError):
    """A file that can be read and is not the official one: damaged, or of another data set."""


@contextmanager
def told(path: Path, name: str, root: Path) -> Iterator[None]:
    """Turn what a parser finds wrong with a file of a data set into one sentence that says what to do."""
    try:
        yield
    except OtherData as error:
        own = "data of your own belong in a study that names them by import path (docs/studies.md)"
        remedied = f"run `{remedy(name, root)}` for the official one; {own}"
        raise Damaged(f"{path} is damaged or of another data set ({error}): {remedied}") from error
    except ValueError as error:
        raise _damaged(path, error, name, root) from error


def _damaged(path: Path, why: object, name: str, root: Path) -> Damaged:
    return Damaged(f"{path} is damaged ({why}): run `{remedy(name, root)}`")
