"""Machines on a slow network, on one machine: network namespaces joined by a bridge, each behind a link of its own.

A link without delay and loss is a pair of virtual Ethernet devices, whose rate `tc` holds by a token bucket. A link with them goes through
`tests/support/relay.py`, since not every kernel has a queue that delays and loses. The rate counts whole frames, both ways at once.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

NAMESPACES = Path("/run/netns")
PREFIX = "forwardgrad-"
DEVICE = "eth0"
RELAY = Path(__file__).with_name("relay.py")
BURST, QUEUE = 3200, 0.1  # bytes that a token bucket lets through at once; seconds that a frame waits at most
LEAST_QUEUE = 64_000  # bytes; TCP needs a few frames on the way to see that one of them is lost
NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_numbers = itertools.count()


class NoNetwork(Exception):
    """Why there are no namespaces to be had here, in one sentence."""


@dataclasses.dataclass(frozen=True)
class Link:
    """What lies between a machine and the bridge: Mbit/s each way (None: as fast as it goes), seconds of delay, share of frames lost.

    Frames are delayed and lost on their way to the bridge, so once between two machines.
    """

    rate: float | None = None
    delay: float = 0.0
    loss: float = 0.0

    @property
    def relayed(self) -> bool:
        return bool(self.delay or self.loss)


@dataclasses.dataclass(frozen=True)
class Network:
    """Machines by their number: the namespace and the address of each."""

    hub: str
    machines: tuple[str, ...]
    relayed: bool

    def address(self, machine: int) -> str:
        return f"10.77.0.{machine + 1}"

    def shape(self, rate: float | None) -> None:
        """Hold every link to so many Mbit/s each way from now on."""
        if self.relayed:
            raise ValueError("a link with delay or loss has the rate that it was made with: make another network")
        for number, machine in enumerate(self.machines):
            for namespace, device in ((machine, DEVICE), (self.hub, f"port{number}")):
                where = ("dev", device, "root")
                if rate is None:
                    subprocess.run(["tc", "-n", namespace, "qdisc", "delete", *where], capture_output=True)  # fails where there is none
                else:
                    # A larger bucket for a fast link: its timer fires too seldom for a frame at a time.
                    burst, limit = max(BURST, rate * 125), max(LEAST_QUEUE, QUEUE * rate * 125_000)
                    size = ("burst", f"{burst:.0f}", "limit", f"{limit:.0f}")
                    _run("tc", "-n", namespace, "qdisc", "replace", *where, "tbf", "rate", f"{rate * 1000:.0f}kbit", *size)

    def cut(self, machine: int) -> None:
        """Take the machine off the bridge without a word to anyone, as a cable pulled at the far end of a switch."""
        _run("ip", "-n", self.hub, "link", "set", f"port{machine}", "down")


def enter(namespace: str) -> None:
    """Put this thread, and the threads that it starts from now on, on the network of a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (NAMESPACES / namespace).open() as file:
        if libc.setns(file.fileno(), NEW_NETWORK):
            code = ctypes.get_errno()
            raise OSError(code, f"cannot enter the network namespace {namespace}: {os.strerror(code)}")


def counted(device: str = DEVICE) -> tuple[int, int, int, int]:
    """Bytes and frames that this thread's network has sent through the device, and bytes and frames received."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == device:
            fields = [int(field) for field in rest.split()]
            return fields[8], fields[9], fields[0], fields[1]
    raise ValueError(f"no network device {device!r} here")


@contextmanager
def network(machines: int, link: Link | None = None, seed: int = 0) -> Iterator[Network]:
    """So many namespaces on one bridge. They are gone at the end, after an error too; those of a killed process when this is next called.

    Raises NoNetwork where namespaces cannot be made.
    """
    link = link or Link()
    check(relay=link.relayed)
    _sweep()
    name = f"{PREFIX}{os.getpid()}-{next(_numbers)}"
    made = Network(f"{name}-hub", tuple(f"{name}-{number}" for number in range(machines)), link.relayed)
    relay: subprocess.Popen[str] | None = None
    try:
        for namespace in (made.hub, *made.machines):
            _run("ip", "netns", "add", namespace)
            # No frames but those that are asked for: they are counted.
            _run("ip", "netns", "exec", namespace, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6 || true")
        _run("ip", "-n", made.hub, "link", "add", "bridge0", "type", "bridge")
        if link.relayed:
            relay = _relay(made, link, seed)
        for number, machine in enumerate(made.machines):
            if not link.relayed:
                _run("ip", "-n", made.hub, "link", "add", f"port{number}", "type", "veth", "peer", "name", DEVICE, "netns", machine)
                # One frame at a time, as on a wire: what the kernel hands over in one piece it would count as one frame.
                _run("ip", "-n", machine, "link", "set", DEVICE, "gso_max_segs", "1")
            _run("ip", "-n", made.hub, "link", "set", f"port{number}", "master", "bridge0", "up")
            _run("ip", "-n", machine, "address", "add", f"{made.address(number)}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _run("ip", "-n", machine, "link", "set", device, "up")
        _run("ip", "-n", made.hub, "link", "set", "bridge0", "up")
        if not link.relayed:
            made.shape(link.rate)
        yield made
    finally:
        if relay is not None:
            relay.kill()
            relay.communicate()
        _delete((*made.machines, made.hub))


def check(*, relay: bool = False) -> None:
    """Raise NoNetwork, with one sentence on what is missing, where namespaces cannot be made."""
    if sys.platform != "linux":
        raise NoNetwork("slow networks are made of network namespaces, which Linux alone has: run this on Linux")
    if os.geteuid():
        raise NoNetwork("slow networks are made of network namespaces, which root alone may add: run this as root")
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            raise NoNetwork(f"slow networks are made by the command {program}, which is not here: install iproute2")
    if relay and not Path("/dev/net/tun").exists():
        raise NoNetwork("links with delay or loss need the device /dev/net/tun, which is not here: load the kernel's module tun")
    name = f"{PREFIX}{os.getpid()}-try"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    _delete([name])
    if done.returncode:
        raise NoNetwork(f"network namespaces cannot be added here, `ip netns add` says: {done.stderr.strip()}")


def _relay(made: Network, link: Link, seed: int) -> subprocess.Popen[str]:
    """A process with both ends of every link: `near`, which becomes the machine's device, and `port` at the bridge."""
    numbers = (len(made.machines), link.rate or 0, link.delay, link.loss, seed)
    command = ["ip", "netns", "exec", made.hub, sys.executable, str(RELAY), *map(str, numbers)]
    relay = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert relay.stdout is not None
    if relay.stdout.readline() != "ready\n":
        relay.kill()
        raise NoNetwork("links with delay or loss cannot be made: the relay did not start; what it wrote stands above")
    for number, machine in enumerate(made.machines):
        _run("ip", "-n", made.hub, "link", "set", f"near{number}", "netns", machine, "name", DEVICE)
    return relay


def _sweep() -> None:
    """Delete what processes have left that were killed."""
    for path in NAMESPACES.glob(f"{PREFIX}*") if NAMESPACES.exists() else ():
        owner = path.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _delete([path.name])


def _delete(namespaces: Sequence[str]) -> None:
    """A namespace takes its devices with it, and a pair of devices goes with either end."""
    for namespace in namespaces:
        if (NAMESPACES / namespace).exists():
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoNetwork(f"no network of namespaces can be made: `{' '.join(command)}` says: {done.stderr.strip()}")
