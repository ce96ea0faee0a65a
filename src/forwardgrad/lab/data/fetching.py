"""Downloads the official files of MNIST and CIFAR-10: checked, resumable, from several mirrors, never half-written."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from forwardgrad.lab.data import files
from forwardgrad.lab.data.extras import need
from forwardgrad.lab.data.texts import TEXTS
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import run

CHUNK = 1 << 16
TIMEOUT = (10, 30)  # seconds to connect, and between two packets

Report = Callable[[int], None]  # told how many bytes are there by now


@dataclass(frozen=True)
class Download:
    """One download. `contents` gives the md5 of every file that it provides once unpacked, as in `files.KNOWN`."""

    file: str
    size: int
    md5: str
    urls: tuple[str, ...]
    contents: Mapping[str, str]

    @property
    def archive(self) -> bool:
        return self.file.endswith(".tar.gz")


def _mnist(part: str, size: int, md5: str) -> Download:
    unpacked = f"MNIST/raw/{part}-ubyte"
    mirrors = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
    urls = tuple(f"{mirror}{part}-ubyte.gz" for mirror in mirrors)
    return Download(f"{unpacked}.gz", size, md5, urls, {unpacked: files.KNOWN["mnist"][unpacked]})


SOURCES: Mapping[str, tuple[Download, ...]] = {
    "digits": (),  # comes with scikit-learn
    **dict.fromkeys((*TEXTS, *run.NEXT_TOKEN), ()),  # come with packages
    "mnist": (
        _mnist("train-images-idx3", 9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        _mnist("train-labels-idx1", 28_881, "d53e105ee54ea40749a09fcbcd1e9432"),
        _mnist("t10k-images-idx3", 1_648_877, "9fb629c4189551a2d022fa330f9573f3"),
        _mnist("t10k-labels-idx1", 4_542, "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
    "cifar10": (
        Download(
            "cifar-10-python.tar.gz",
            170_498_071,
            "c58f30108f718f92721af3b95e74349a",
            ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
            files.KNOWN["cifar10"],
        ),
    ),
}


class _Failed(Exception):
    """One mirror did not deliver; another may."""


def fetch(
    name: str, data_dir: Path | str | None = None, progress: bool = True, sources: Sequence[Download] | None = None
) -> tuple[str, ...]:
    """Brings what is missing or damaged of a data set into the data folder; returns the names of the files it downloaded."""
    run.check_choice(name, run.DataName, "data set")
    root = files.folder(data_dir)
    wanted = [source for source in (SOURCES[name] if sources is None else sources) if not _present(source, name, root)]
    if wanted:
        with _bars(progress) as bar:
            for source in wanted:
                _bring(source, name, root, bar(source))
    return tuple(source.file for source in wanted)


def _present(source: Download, name: str, root: Path) -> bool:
    return all(files.file_state(root, name, relative, md5)[1] == "ok" for relative, md5 in source.contents.items())


@contextmanager
def _bars(show: bool) -> Iterator[Callable[[Download], Report]]:
    if not show:
        yield lambda source: lambda done: None
        return
    rich = need("rich.progress")
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.DownloadColumn(), rich.TimeRemainingColumn())
    with rich.Progress(*columns, console=need("rich.console").Console(stderr=True)) as progress:

        def bar(source: Download) -> Report:
            task = progress.add_task(Path(source.file).name, total=source.size)
            return lambda done: progress.update(task, completed=done)

        yield bar


def _bring(source: Download, name: str, root: Path, report: Report) -> None:
    target = root / source.file
    again = f"run `{files.remedy(name, root)}` again"
    try:
        kept = target.exists()
        _retrieve(source, target, report, again)
        if source.archive:
            _unpack(source, target, root, again)
            if not kept:
                target.unlink()
    except OSError as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error  # pooch wraps it in a paragraph
        why = cause.strerror or cause
        raise UserError(
            f"cannot write {target} ({why}): make room or allow writing there, or choose another folder, then {again}"
        ) from error


def _retrieve(source: Download, target: Path, report: Report, again: str) -> None:
    """Puts the checked download under its final name, from the first mirror that delivers it."""
    partial = target.with_name(f"{target.name}.partial")
    reasons = []
    for url in source.urls:
        resumed = partial.exists()
        why = _attempt(url, source, target, partial, report)
        if why == "wrong checksum" and resumed:  # the part from before may be to blame, so once more from the start
            why = _attempt(url, source, target, partial, report)
        if why is None:
            return
        reasons.append(f"{url}: {why}")
    raise UserError(f"could not download {target.name} ({'; '.join(reasons)}): check the network connection, then {again}")


def _attempt(url: str, source: Download, target: Path, partial: Path, report: Report) -> str | None:
    """One download from one mirror; the reason if it failed."""
    pooch, requests = need("pooch"), need("requests")

    def downloader(url: str, output: str, _: object) -> None:
        _download(url, partial, source.size, report)
        partial.replace(output)

    pooch.get_logger().setLevel("WARNING")  # the progress bar says it already
    try:
        pooch.retrieve(url, known_hash=f"md5:{source.md5}", fname=target.name, path=target.parent, downloader=downloader)
    except _Failed as error:
        return str(error)
    except requests.HTTPError as error:
        return f"HTTP status {error.response.status_code}"
    except requests.Timeout:
        return "no answer in time"
    except requests.exceptions.SSLError:
        return "its certificate is not trusted"
    except requests.ConnectionError:
        return "no connection"
    except requests.RequestException as error:
        return f"{type(error).__name__}"
    except ValueError:  # how pooch says that the hash differs; it has removed the file
        return "wrong checksum"
    return None


def _download(url: str, partial: Path, size: int, report: Report) -> None:
    """Completes `partial` to `size` bytes, asking only for what it lacks."""
    requests, urllib3 = need("requests"), need("urllib3")
    have = partial.stat().st_size if partial.exists() else 0
    if have > size:
        have = 0
    if have == size:  # stopped between the last byte and the check
        return
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, stream=True, timeout=TIMEOUT, headers=headers) as response:
        response.raise_for_status()
        resumes = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not (resumes or response.status_code == 200):
            raise _Failed(f"unexpected HTTP status {response.status_code}")
        have = have if resumes else 0
        with partial.open("ab" if resumes else "wb") as file:
            try:
                # Undecoded: some servers label a .gz file as a compressed transfer of what it holds.
                for chunk in response.raw.stream(CHUNK, decode_content=False):
                    file.write(chunk)
                    have += len(chunk)
                    report(have)
                    if have > size:
                        break
            except urllib3.exceptions.HTTPError as error:
                raise _Failed(f"broke off after {have} of {size} bytes") from error
    if have > size:
        partial.unlink()
        raise _Failed(f"sent more than the expected {size} bytes")
    if have < size:
        raise _Failed(f"broke off after {have} of {size} bytes")


def _unpack(source: Download, archive: Path, root: Path, again: str) -> None:
    """Writes the archive's known files, each checked and renamed into place; an archive with an unsafe member is refused before."""
    lacking = dict(source.contents)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            members = [tarfile.data_filter(member, str(root)) for member in tar]
            for member in members:
                if member.name not in lacking or not member.isreg() or member.size > files.LARGEST:
                    continue
                file = tar.extractfile(member)
                content = file.read() if file else b""
                if files.digest(content) != lacking.pop(member.name):
                    raise UserError(f"{member.name} in {archive} has a wrong checksum: delete {archive}, then {again}")
                _write_whole(root / member.name, content)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{archive} cannot be unpacked safely ({error}): delete it, then {again}") from error
    if lacking:
        raise UserError(f"{archive} lacks {', '.join(sorted(lacking))}: delete it, then {again}")


def _write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.partial")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
