"""Disks that fail: every file operation of some work is noted, so that what a power cut leaves can be built; or space runs out."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("lost", "kept", "removals", "additions")  # which changes of names since their folder's last fsync reach the disk
DATA = ("lost", "torn", "kept")  # what of a file's bytes since its last fsync does
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class File:
    """A file as programs see it, and what of it is on the disk for sure."""

    content: bytes = b""
    synced: bytes = b""

    def left(self, data: str) -> bytes:
        if data == "kept" or self.content == self.synced:
            return self.content
        return self.synced if data == "lost" else self.content[: (len(self.content) + 1) // 2]


Entry = File | None  # None is a folder


@dataclass
class Folder:
    """Names in a folder: those on the disk for sure, and changes since: (what kind, name that goes, name that comes, what it is)."""

    sure: dict[str, Entry] = field(default_factory=dict)
    pending: list[tuple[str, str | None, str | None, Entry]] = field(default_factory=list)

    def left(self, names: str) -> dict[str, Entry]:
        found = dict(self.sure)
        for kind, goes, comes, what in self.pending:
            if names == "kept" or names == kind:
                found.pop(goes or "", None)
                if comes:
                    found[comes] = what
        return found


class Disk:
    """The folder `root` as a disk, told of every operation: `cut` is asked for the trees that power cuts after the last one may leave."""

    def __init__(self) -> None:
        self.folders = {Path(): Folder()}
        self.live: dict[Path, Entry] = {}

    def create(self, path: Path, content: Entry) -> None:
        self.live[path] = content
        self.folders[path.parent].pending.append(("additions", None, path.name, content))
        if content is None:
            self.folders[path] = Folder()

    def remove(self, path: Path) -> None:
        self.live.pop(path)
        self.folders[path.parent].pending.append(("removals", path.name, None, None))

    def rename(self, path: Path, to: Path) -> None:
        assert path.parent == to.parent
        self.live[to] = self.live.pop(path)
        self.folders[path.parent].pending.append(("additions", path.name, to.name, self.live[to]))

    def sync(self, folder: Path) -> None:
        self.folders[folder] = Folder(self.folders[folder].left("kept"))

    def cuts(self) -> Iterator[dict[Path, bytes | None]]:
        """Every tree that a power cut now may leave: paths with their content, None for a folder."""
        for names in NAMES:
            for data in DATA:
                yield dict(self._tree(Path(), names, data))

    def _tree(self, folder: Path, names: str, data: str) -> Iterator[tuple[Path, bytes | None]]:
        for name, what in self.folders[folder].left(names).items():
            yield folder / name, what.left(data) if what is not None else None
            if what is None:
                yield from self._tree(folder / name, names, data)


class Operations:
    """Between the lab and the system: tells `happened` of every operation under `root` that changes a file or waits for the disk.

    `before` is called ahead of each that takes space, and may raise.
    """

    def __init__(self, root: Path, happened: Callable[[Disk], None] = lambda disk: None, before: Callable[[], None] = lambda: None) -> None:
        self.root, self.disk, self.happened, self.before = root, Disk(), happened, before
        self.open: dict[int, Path] = {}
        self.writers: dict[int, File] = {}

    def inside(self, path: Any) -> Path | None:
        path = Path(os.fspath(path))
        return path.relative_to(self.root) if path != self.root and path.is_relative_to(self.root) else None

    @contextmanager
    def watched(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("open", "fdopen", "fsync", "mkdir", "replace", "unlink"):
                patch.setattr(os, name, getattr(self, f"_{name}")(getattr(os, name)))
            ACTIVE.append(self)
            try:
                yield
            finally:
                ACTIVE.remove(self)

    def _open(self, real: Any) -> Any:
        def call(path: Any, flags: int, *rest: Any, **options: Any) -> int:
            at = self.inside(path)
            new = at is not None and flags & os.O_CREAT and not os.path.lexists(path)
            if new:
                self.before()
            handle = int(real(path, flags, *rest, **options))
            self.writers.pop(handle, None)
            self.open[handle] = at if at is not None else Path() if Path(os.fspath(path)) == self.root else Path("/")
            if new and at is not None:
                self.disk.create(at, File())
                self.happened(self.disk)
            if at is not None and isinstance(found := self.disk.live.get(at), File):
                self.writers[handle] = found
            return handle

        return call

    def _fdopen(self, real: Any) -> Any:
        def call(handle: int, mode: str, *rest: Any) -> Any:
            file = real(handle, mode, *rest)
            return _Writer(file, self, self.writers[handle]) if handle in self.writers and "w" in mode else file

        return call

    def _fsync(self, real: Any) -> Any:
        def call(handle: int) -> None:
            if handle in self.writers:
                self.before()
                self.writers[handle].synced = self.writers[handle].content
            elif self.open.get(handle) in self.disk.folders:
                self.before()
                self.disk.sync(self.open[handle])
            self.happened(self.disk)  # the real one is spared: this disk does not fail

        return call

    def _mkdir(self, real: Any) -> Any:
        def call(path: Any, *rest: Any, **options: Any) -> None:
            at = self.inside(path)
            if at is not None:
                self.before()
            real(path, *rest, **options)
            if at is not None:
                self.disk.create(at, None)
                self.happened(self.disk)

        return call

    def _replace(self, real: Any) -> Any:
        def call(path: Any, to: Any, **options: Any) -> None:
            at, target = self.inside(path), self.inside(to)
            if at is not None:
                self.before()
            real(path, to, **options)
            if at is not None and target is not None:
                self.disk.rename(at, target)
                self.happened(self.disk)

        return call

    def _unlink(self, real: Any) -> Any:
        def call(path: Any, **options: Any) -> None:
            real(path, **options)
            if (at := self.inside(path)) is not None:
                self.disk.remove(at)
                self.happened(self.disk)

        return call


class _Writer:
    """A file that tells of its writes."""

    def __init__(self, file: Any, operations: Operations, content: File) -> None:
        self.file, self.operations, self.content = file, operations, content

    def write(self, data: bytes) -> int:
        self.operations.before()
        written = int(self.file.write(data))
        self.content.content += data
        self.operations.happened(self.operations.disk)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


ACTIVE: list[Operations] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Nothing under a watched folder may be written past the watch."""
    if event == "open" and ACTIVE and isinstance(arguments[0], (str, bytes, os.PathLike)) and arguments[1] is not None:
        path = Path(os.fsdecode(arguments[0]))
        assert not (arguments[2] & WRITES and ACTIVE[-1].inside(path)), f"{path} was written past the watch"


sys.addaudithook(_audit)


def build(tree: dict[Path, bytes | None], root: Path) -> None:
    """The tree as files."""
    root.mkdir()
    for path, content in sorted(tree.items()):
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)


def key(tree: dict[Path, bytes | None]) -> str:
    """What is the same for the same trees, whatever their temporary files and locks are called."""
    parts = sorted((str(path), "" if content is None else hashlib.sha256(content).hexdigest()) for path, content in tree.items())
    return repr([part for part in parts if "/." not in part[0]])


def full(after: int, *, stays: bool) -> Callable[[], None]:
    """Raises 'no space left' at the operation of this number, and at all later ones where it `stays` so."""
    count = 0

    def before() -> None:
        nonlocal count
        count += 1
        if count == after or (stays and count > after):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return before
