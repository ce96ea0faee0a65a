"""The links of `tests/support/networks.py` that delay and lose: a process that takes frames from one device and gives them to another.

python relay.py MACHINES MBIT DELAY LOSS SEED, in the namespace of the bridge. Each machine has two devices here, `near` and `port`. A frame
waits until those before it have gone at the rate (0: no rate), then for the delay. A frame that would wait too long for the others is
dropped, and of those towards the bridge a share is lost. The share is drawn from the seed, frame by frame. Ends when it is killed.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time
from contextlib import suppress
from typing import NamedTuple

SET_INTERFACE, TAP, NO_HEADER = 0x400454CA, 0x0002, 0x1000  # TUNSETIFF, IFF_TAP, IFF_NO_PI
FRAME = 2048  # bytes, more than a frame has
QUEUE, LEAST_QUEUE = 0.1, 64_000  # seconds, or so many bytes where that is longer


class Frame(NamedTuple):
    """When it leaves, the number of it among all frames (which keeps equal times in order), where to, and what."""

    due: float
    number: int
    sink: int
    content: bytes


class Way:
    """One direction of a link."""

    def __init__(self, sink: int, rate: float, delay: float, loss: float, seed: str) -> None:
        self.sink, self.delay, self.loss = sink, delay, loss
        self.seconds_a_byte = 8e-6 / rate if rate else 0.0
        self.longest = max(QUEUE, LEAST_QUEUE * self.seconds_a_byte)
        self.free = 0.0  # when the last frame has gone
        self.generator = random.Random(seed)

    def due(self, size: int, now: float) -> float | None:
        """When a frame that comes now is at the other end; None: never."""
        lost = self.generator.random() < self.loss
        begins = max(now, self.free)
        if begins - now > self.longest:
            return None
        self.free = begins + size * self.seconds_a_byte
        return None if lost else self.free + self.delay


def device(name: str) -> int:
    """A virtual Ethernet device whose frames are read from, and written to, the file that is returned."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, SET_INTERFACE, struct.pack("16sH22x", name.encode(), TAP | NO_HEADER))
    return file


def serve(ways: dict[int, Way]) -> None:
    waiting: list[Frame] = []
    number = 0
    while True:
        wait = max(0.0, waiting[0].due - time.monotonic()) if waiting else None
        for source in select.select(list(ways), [], [], wait)[0]:
            try:
                content = os.read(source, FRAME)
            except OSError:  # the device is down
                continue
            due = ways[source].due(len(content), time.monotonic())
            if due is not None:
                heapq.heappush(waiting, Frame(due, number, ways[source].sink, content))
                number += 1
        while waiting and waiting[0].due <= time.monotonic():
            frame = heapq.heappop(waiting)
            with suppress(OSError):  # the device is down, or the receiver has no room: a frame is lost
                os.write(frame.sink, frame.content)


def main() -> None:
    machines, rate, delay, loss, seed = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
    ways = {}
    for machine in range(machines):
        near, port = device(f"near{machine}"), device(f"port{machine}")
        ways[near] = Way(port, rate, delay, loss, f"{seed} {machine} up")
        ways[port] = Way(near, rate, 0.0, 0.0, f"{seed} {machine} down")
    print("ready", flush=True)
    serve(ways)


if __name__ == "__main__":
    main()
