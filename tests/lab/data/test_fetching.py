import dataclasses
import gzip
import http.server
import io
import socket
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from forwardgrad.lab.data import fetching
from forwardgrad.lab.data.files import KNOWN, digest, file_state
from forwardgrad.lab.errors import UserError

pytest.importorskip("pooch")

FILE = "MNIST/raw/train-images-idx3-ubyte"
CONTENT = bytes(i * i % 251 for i in range(300_000))  # several chunks
PACKED = gzip.compress(CONTENT, compresslevel=0, mtime=0)
assert len(PACKED) > 3 * fetching.CHUNK


class Server:
    """A small web server; `sent` lists (path, status, bytes sent)."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ranges = True  # whether it heeds Range headers
        self.labels_gzip = False  # whether it calls .gz files compressed transfers
        self.breaks_after: int | None = None
        self.sent: list[tuple[str, int, int]] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/"

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        content = self.files.get(request.path[1:])
        if content is None:
            self.sent.append((request.path, 404, 0))
            request.send_error(404)
            return
        start, status = 0, 200
        if self.ranges and "Range" in request.headers:
            start, status = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-")), 206
        body = content[start:]
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        if status == 206:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.labels_gzip:
            request.send_header("Content-Encoding", "gzip")
        request.end_headers()
        body = body[: self.breaks_after]
        self.sent.append((request.path, status, len(body)))
        request.wfile.write(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    server = Server()
    server.files["good.gz"] = PACKED
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


@pytest.fixture
def dead() -> Iterator[str]:
    """The address of a server that takes no connection."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unheard.getsockname()[1]}/"


def source(*urls: str, packed: bytes = PACKED) -> fetching.Download:
    return fetching.Download(f"{FILE}.gz", len(packed), digest(packed), urls, {FILE: digest(CONTENT)})


def files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir())


def get(root: Path, *sources: fetching.Download) -> tuple[str, ...]:
    return fetching.fetch("mnist", root, progress=False, sources=sources)


# Success -----------------------------------------------------------------------------------------------------------------------------


def test_a_file_is_fetched_whole_and_only_once(server: Server, tmp_path: Path) -> None:
    wanted = source(server.url + "good.gz")
    assert get(tmp_path / "new", wanted) == (f"{FILE}.gz",)
    assert (tmp_path / "new" / f"{FILE}.gz").read_bytes() == PACKED
    assert files(tmp_path / "new") == [f"{FILE}.gz"]
    assert get(tmp_path / "new", wanted) == ()
    assert server.sent == [("/good.gz", 200, len(PACKED))]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_a_fetched_file_has_the_permissions_of_any_new_file(server: Server, tmp_path: Path) -> None:
    get(tmp_path, source(server.url + "good.gz"))
    (tmp_path / "plain").touch()
    assert (tmp_path / f"{FILE}.gz").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("old", [f"{FILE}.gz", FILE])
def test_a_damaged_file_is_replaced(server: Server, tmp_path: Path, old: str) -> None:
    (tmp_path / old).parent.mkdir(parents=True)
    (tmp_path / old).write_bytes(b"damaged")
    get(tmp_path, source(server.url + "good.gz"))
    assert file_state(tmp_path, "mnist", FILE, digest(CONTENT)) == (f"{FILE}.gz", "ok")


def test_a_good_unpacked_file_is_enough(dead: str, tmp_path: Path) -> None:
    (tmp_path / FILE).parent.mkdir(parents=True)
    (tmp_path / FILE).write_bytes(CONTENT)
    assert get(tmp_path, source(dead)) == ()


def test_the_bytes_are_kept_as_sent_when_they_are_labelled_as_compressed(server: Server, tmp_path: Path) -> None:
    server.labels_gzip = True
    get(tmp_path, source(server.url + "good.gz"))
    assert (tmp_path / f"{FILE}.gz").read_bytes() == PACKED


def test_progress_is_shown_on_the_error_stream(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    fetching.fetch("mnist", tmp_path, sources=[source(server.url + "good.gz")])
    out, err = capsys.readouterr()
    assert out == ""
    assert Path(FILE).name in err


# Mirrors and resuming ----------------------------------------------------------------------------------------------------------------


def test_the_second_mirror_is_used_when_the_first_is_dead_or_lacks_the_file(server: Server, dead: str, tmp_path: Path) -> None:
    get(tmp_path, source(dead + "good.gz", server.url + "absent.gz", server.url + "good.gz"))
    assert (tmp_path / f"{FILE}.gz").read_bytes() == PACKED
    assert [status for _, status, _ in server.sent] == [404, 200]


def test_the_second_mirror_is_used_when_the_first_sends_something_else(server: Server, tmp_path: Path) -> None:
    server.files |= {"bad.gz": bytes(len(PACKED)), "long.gz": PACKED + b"more"}
    get(tmp_path, source(server.url + "bad.gz", server.url + "long.gz", server.url + "good.gz"))
    assert (tmp_path / f"{FILE}.gz").read_bytes() == PACKED
    assert [path for path, _, _ in server.sent] == ["/bad.gz", "/long.gz", "/good.gz"]


def test_a_broken_download_continues_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.breaks_after = 3 * fetching.CHUNK
    with pytest.raises(UserError, match=f"broke off after {3 * fetching.CHUNK} of {len(PACKED)} bytes"):
        get(tmp_path, source(server.url + "good.gz"))
    assert files(tmp_path) == [f"{FILE}.gz.partial"]
    assert (tmp_path / f"{FILE}.gz.partial").read_bytes() == PACKED[: 3 * fetching.CHUNK]
    server.breaks_after = None
    get(tmp_path, source(server.url + "good.gz"))
    assert (tmp_path / f"{FILE}.gz").read_bytes() == PACKED
    assert server.sent[1:] == [("/good.gz", 206, len(PACKED) - 3 * fetching.CHUNK)]
    assert files(tmp_path) == [f"{FILE}.gz"]


def partial(root: Path, content: bytes) -> None:
    (root / FILE).parent.mkdir(parents=True)
    (root / f"{FILE}.gz.partial").write_bytes(content)


def test_a_server_that_cannot_resume_sends_everything_again(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    partial(tmp_path, PACKED[:1000])
    get(tmp_path, source(server.url + "good.gz"))
    assert (tmp_path / f"{FILE}.gz").read_bytes() == PACKED
    assert server.sent == [("/good.gz", 200, len(PACKED))]


def test_a_complete_partial_file_needs_no_network(dead: str, tmp_path: Path) -> None:
    partial(tmp_path, PACKED)
    get(tmp_path, source(dead))
    assert files(tmp_path) == [f"{FILE}.gz"]


@pytest.mark.parametrize("rest", [b"another file", bytes(len(PACKED)), bytes(len(PACKED) + 1)], ids=["begun", "complete", "too long"])
def test_a_partial_file_of_something_else_is_started_over(server: Server, tmp_path: Path, rest: bytes) -> None:
    partial(tmp_path, rest)
    get(tmp_path, source(server.url + "good.gz"))
    assert (tmp_path / f"{FILE}.gz").read_bytes() == PACKED


# Failure -----------------------------------------------------------------------------------------------------------------------------


def test_a_wrong_checksum_is_refused_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.files["bad.gz"] = bytes(len(PACKED))
    with pytest.raises(UserError) as caught:
        get(tmp_path, source(server.url + "bad.gz"))
    assert f"{server.url}bad.gz: wrong checksum" in str(caught.value)
    assert f"`forwardgrad data fetch mnist --data-dir {tmp_path}`" in str(caught.value)
    assert files(tmp_path) == []


def test_a_longer_file_is_refused_without_reading_it_all(server: Server, tmp_path: Path) -> None:
    server.files["endless.gz"] = PACKED * 3
    with pytest.raises(UserError, match=f"sent more than the expected {len(PACKED)} bytes"):
        get(tmp_path, source(server.url + "endless.gz"))
    assert files(tmp_path) == []
    done: list[int] = []
    with pytest.raises(fetching._Failed):
        fetching._download(server.url + "endless.gz", tmp_path / "partial", len(PACKED), done.append)
    assert len(PACKED) < max(done) <= len(PACKED) + fetching.CHUNK


def test_every_mirror_that_failed_is_named_with_its_reason(server: Server, dead: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        get(tmp_path, source(dead + "x.gz", server.url + "absent.gz"))
    assert f"{dead}x.gz: no connection; {server.url}absent.gz: HTTP status 404" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fetching, "TIMEOUT", (5, 0.05))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UserError, match="no answer in time"):
            get(tmp_path, source(f"http://127.0.0.1:{silent.getsockname()[1]}/"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_sentence(server: Server, tmp_path: Path) -> None:
    (tmp_path / FILE).parent.mkdir(parents=True)
    (tmp_path / f"{FILE}.gz.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*train-images-idx3-ubyte\.gz.* \(No space left on device\): make room"):
        get(tmp_path, source(server.url + "good.gz"))
    assert len(server.sent) == 1


def test_a_folder_that_cannot_be_written_is_one_sentence(server: Server, tmp_path: Path) -> None:
    (tmp_path / "MNIST").mkdir()
    (tmp_path / "MNIST/raw").symlink_to("nowhere/at/all")
    with pytest.raises(UserError, match=r"cannot write .*MNIST.raw.* \(.*\): make room or allow writing"):
        get(tmp_path, source(server.url + "good.gz"))


@pytest.mark.parametrize("module", ["pooch", "rich.progress"])
def test_without_the_lab_extra_the_error_says_what_to_install(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install 'forwardgrad\[lab\]'"):
        fetching.fetch("mnist", tmp_path, sources=[source(server.url + "good.gz")])


def test_digits_need_no_download_and_unknown_names_are_refused(tmp_path: Path) -> None:
    assert fetching.fetch("digits", tmp_path) == ()
    with pytest.raises(UserError, match="unknown data set"):
        fetching.fetch("svhn", tmp_path)


# Archives ----------------------------------------------------------------------------------------------------------------------------

MEMBERS = {f"cifar-10-batches-py/{name}": name.encode() * 100 for name in ("data_batch_1", "test_batch")}


def tar(members: dict[str, bytes | str]) -> bytes:
    """A .tar.gz; a member given as text is a symbolic link to it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def archive(server: Server, members: dict[str, bytes | str]) -> fetching.Download:
    packed = server.files["a.tar.gz"] = tar(members)
    known = {name: digest(content) for name, content in MEMBERS.items()}
    return fetching.Download("a.tar.gz", len(packed), digest(packed), (server.url + "a.tar.gz",), known)


def get_archive(root: Path, wanted: fetching.Download) -> tuple[str, ...]:
    return fetching.fetch("cifar10", root, progress=False, sources=[wanted])


def test_the_known_files_of_an_archive_are_unpacked_and_nothing_else(server: Server, tmp_path: Path) -> None:
    wanted = archive(server, MEMBERS | {"cifar-10-batches-py/readme.html": b"hello", "link": "cifar-10-batches-py/test_batch"})
    assert get_archive(tmp_path, wanted) == ("a.tar.gz",)
    assert files(tmp_path) == sorted(MEMBERS)
    assert all((tmp_path / name).read_bytes() == content for name, content in MEMBERS.items())
    assert get_archive(tmp_path, wanted) == ()
    assert len(server.sent) == 1


def test_an_archive_that_is_there_is_used_and_kept(server: Server, tmp_path: Path) -> None:
    wanted = archive(server, dict(MEMBERS))
    (tmp_path / "a.tar.gz").write_bytes(server.files["a.tar.gz"])
    get_archive(tmp_path, wanted)
    assert files(tmp_path) == ["a.tar.gz", *sorted(MEMBERS)]
    assert server.sent == []


@pytest.mark.parametrize(
    "bad",
    [{"../outside": b"x"}, {"cifar-10-batches-py/../../outside": b"x"}, {"link": "../outside"}, {"link": "/etc/passwd"}],
    ids=str,
)
def test_an_archive_with_a_member_outside_is_refused_before_anything_is_written(
    server: Server, tmp_path: Path, bad: dict[str, bytes | str]
) -> None:
    root = tmp_path / "deep/base"
    with pytest.raises(UserError, match=r"a\.tar\.gz cannot be unpacked safely"):
        get_archive(root, archive(server, MEMBERS | bad))
    assert files(tmp_path) == ["deep/base/a.tar.gz"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"cifar-10-batches-py/test_batch": b"other"}, "test_batch in .*wrong checksum"),
        ({"cifar-10-batches-py/test_batch": "data_batch_1"}, "lacks cifar-10-batches-py/test_batch"),
    ],
)
def test_a_wrong_member_is_refused(server: Server, tmp_path: Path, change: dict[str, bytes | str], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        get_archive(tmp_path, archive(server, MEMBERS | change))
    assert not (tmp_path / "cifar-10-batches-py/test_batch").exists()


def test_a_member_too_large_is_not_unpacked(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forwardgrad.lab.data.files.LARGEST", 1100)
    with pytest.raises(UserError, match="lacks cifar-10-batches-py/data_batch_1:"):
        get_archive(tmp_path, archive(server, dict(MEMBERS)))
    assert files(tmp_path) == ["a.tar.gz", "cifar-10-batches-py/test_batch"]


@pytest.mark.parametrize("damage", ["cut", "no archive"])
def test_an_archive_that_cannot_be_read_is_one_sentence(server: Server, tmp_path: Path, damage: str) -> None:
    wanted = archive(server, dict(MEMBERS))
    packed = server.files["a.tar.gz"] = {"cut": server.files["a.tar.gz"][:-30], "no archive": b"<html>"}[damage]
    wanted = dataclasses.replace(wanted, size=len(packed), md5=digest(packed))
    with pytest.raises(UserError, match=r"a\.tar\.gz cannot be unpacked safely"):
        get_archive(tmp_path, wanted)


def test_the_official_sources_provide_exactly_the_known_files() -> None:
    assert set(fetching.SOURCES) == set(KNOWN)
    for name, sources in fetching.SOURCES.items():
        assert {key: md5 for s in sources for key, md5 in s.contents.items()} == KNOWN[name]
        assert all(url.endswith(f"/{Path(s.file).name}") and url.startswith("https://") for s in sources for url in s.urls)


def test_the_official_mnist_downloads_are_the_published_files(data_dir: Path) -> None:
    for wanted in fetching.SOURCES["mnist"]:
        if (data_dir / wanted.file).exists():
            packed = (data_dir / wanted.file).read_bytes()
            assert (len(packed), digest(packed)) == (wanted.size, wanted.md5)
