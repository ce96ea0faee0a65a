"""The slow networks that tests and measurements are made on are as slow as they say, and leave nothing behind."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from tests.support.networks import NAMESPACES, PREFIX, Link, Network, NoNetwork, check, counted, enter, network


@pytest.fixture
def namespaces() -> None:
    try:
        check(relay=True)
    except NoNetwork as missing:
        pytest.skip(str(missing))


def on(namespace: str, work: Callable[[], object]) -> object:
    """What some work on a namespace's network finds, done in a thread that ends with it."""
    found: list[object] = []

    def inside() -> None:
        enter(namespace)
        found.append(work())

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join(60)
    return found[0]


@contextmanager
def connected(joined: Network) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a TCP connection between the first two machines. A socket stays on the network that it was made on."""
    server = on(joined.machines[1], lambda: socket.create_server((joined.address(1), 5000)))
    assert isinstance(server, socket.socket)
    with server:
        near = on(joined.machines[0], lambda: socket.create_connection((joined.address(1), 5000), timeout=30))
        assert isinstance(near, socket.socket)
        with near, server.accept()[0] as far:
            far.settimeout(30)
            yield near, far


def sent(near: socket.socket, far: socket.socket, size: int) -> float:
    """Seconds in which so many bytes are there."""
    writer = threading.Thread(target=near.sendall, args=(bytes(size),))
    began = time.monotonic()
    writer.start()
    while size:
        size -= len(far.recv(65_536))
    writer.join()
    return time.monotonic() - began


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("link", [Link(rate=1), Link(rate=1, delay=0.05)], ids=["tc", "relay"])
def test_no_byte_is_faster_than_the_rate(link: Link) -> None:
    with network(2, link) as joined, connected(joined) as (near, far):
        assert sent(near, far, 40_000) > (40_000 - 3200) * 8e-6 + link.delay


@pytest.mark.usefixtures("namespaces")
def test_a_delayed_link_delays_each_way() -> None:
    with network(2, Link(delay=0.05)) as joined, connected(joined) as (near, far):
        began = time.monotonic()
        near.sendall(b"there")
        far.recv(10)
        far.sendall(b"back")
        near.recv(10)
        assert time.monotonic() - began >= 0.1


@pytest.mark.usefixtures("namespaces")
def test_lost_frames_are_sent_again_and_counted() -> None:
    size = 100_000
    with network(2, Link(delay=0.001, loss=0.1)) as joined, connected(joined) as (near, far):
        sent(near, far, size)
        given, arrived = (on(machine, counted) for machine in joined.machines[:2])
    assert isinstance(given, tuple)
    assert isinstance(arrived, tuple)
    assert given[0] > arrived[2] > size  # bytes sent by the one, and received by the other with their headers


@pytest.mark.usefixtures("namespaces")
def test_frames_are_counted_one_by_one() -> None:
    size = 144_800
    with network(2) as joined, connected(joined) as (near, far):
        sent(near, far, size)
        given = on(joined.machines[0], counted)
    assert isinstance(given, tuple)
    assert given[1] >= size // 1448  # what is left of a frame of 1,500 bytes after the headers of IP and TCP
    assert given[0] >= size + 66 * (size // 1448)


@pytest.mark.usefixtures("namespaces")
def test_nothing_is_left_after_an_error() -> None:
    made = []

    def failing() -> None:
        with network(2, Link(delay=0.01)) as joined:
            made.extend([joined.hub, *joined.machines])
            assert all((NAMESPACES / name).exists() for name in made)
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert len(made) == 3
    assert not any((NAMESPACES / name).exists() for name in made)


@pytest.mark.usefixtures("namespaces")
def test_what_a_killed_process_left_is_cleared_away() -> None:
    left = f"{PREFIX}4194999-0-0"  # above the largest number of a process
    subprocess.run(["ip", "netns", "add", left], check=True)
    with network(1):
        assert not (NAMESPACES / left).exists()


@pytest.mark.parametrize(("user", "without", "said"), [(1000, "", "run this as root"), (0, "tc", "install iproute2")])
def test_what_is_missing_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch, user: int, without: str, said: str) -> None:
    find = shutil.which
    monkeypatch.setattr("os.geteuid", lambda: user)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == without else find(name) or f"/sbin/{name}")
    with pytest.raises(NoNetwork, match=said):
        check()
