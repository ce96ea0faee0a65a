"""What attention with K tangents costs by tiles, beside torch's plain formula in forward mode, which holds T × T numbers: time and memory.

python benchmarks/attention.py                         # T = 256, 1024, 4096 with K = 1 and 4, one thread
python benchmarks/attention.py --causal --dropout 0.1
python benchmarks/attention.py --device cuda --dtype bfloat16

All of query, key and value move, and lie in memory as behind `view(B, T, heads, width).transpose(1, 2)`. Three ways take turns, and the
median counts: the rule of `forwardgrad.forward_mode`; torch's formula (`SDPBackend.MATH`) under `torch.func.jvp`, for several tangents
under `vmap`; and torch's own kernel for the values alone, which is what attention costs without tangents. Memory is what is held at most
above what goes in, by `forwardgrad.diagnostics.peak_bytes`, in passes that are not timed.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from forwardgrad.diagnostics import peak_bytes
from forwardgrad.forward_mode import Explicit

Work = Callable[[], object]
CLOCK = time.perf_counter


class Case(NamedTuple):
    """Query, key and value with their tangents, and how attention is called."""

    tensors: list[Tensor]
    tangents: list[Tensor]
    dropout: float
    causal: bool

    def attention(self, *tensors: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*tensors, dropout_p=self.dropout, is_causal=self.causal)

    def tiles(self) -> object:
        moving = {id(t): v for t, v in zip(self.tensors, self.tangents, strict=True)}
        with Explicit(len(self.tangents[0]), moving) as evaluation:
            return evaluation.derivative(self.attention(*self.tensors))

    def formula(self) -> object:
        along = lambda *v: jvp(self.attention, tuple(self.tensors), v)  # noqa: E731
        with sdpa_kernel(SDPBackend.MATH):
            if len(self.tangents[0]) == 1:
                return along(*(v[0] for v in self.tangents))
            return vmap(along, out_dims=(None, 0), randomness="same")(*self.tangents)

    def values(self) -> object:
        return self.attention(*self.tensors)


def case_of(options: argparse.Namespace, length: int, count: int) -> Case:
    shape = options.batch_size, length, options.heads, options.width
    like = {"dtype": getattr(torch, options.dtype), "device": options.device}
    tensors = [torch.randn(shape, **like).transpose(1, 2) for _ in range(3)]
    tangents = [torch.randn(count, *shape, **like).transpose(2, 3) for _ in range(3)]
    return Case(tensors, tangents, options.dropout, options.causal)


def seconds(work: Work, device: torch.device) -> float:
    began = CLOCK()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return CLOCK() - began


def measured(case: Case, rounds: int, device: torch.device) -> dict[str, tuple[float, int]]:
    """Seconds and bytes of each way."""
    ways: dict[str, Work] = {"tiles": case.tiles, "formula": case.formula, "values": case.values}
    peaks = {name: peak_bytes(work, [device]) for name, work in ways.items()}  # and warm
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            times[name].append(seconds(work, device))
    return {name: (statistics.median(times[name]), peaks[name]) for name in ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--tangents", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64, help="numbers a head")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--dtype", default="float32", choices=["float64", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processor-time", action="store_true", help="count this thread's time on its processor; with one thread only")
    options = parser.parse_args()
    if min(options.rounds, options.threads, options.batch_size, options.heads, options.width, *options.lengths, *options.tangents) < 1:
        parser.error("lengths, tangents and all other counts are at least 1")
    if options.processor_time and (options.threads > 1 or options.device != "cpu"):
        parser.error("--processor-time counts one thread on a processor: leave --threads and --device away")
    if options.processor_time:
        global CLOCK
        CLOCK = time.thread_time
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{where}, {options.threads} of {os.cpu_count()} threads, torch {torch.__version__}, {options.dtype}")
    print(f"batch {options.batch_size}, {options.heads} heads of {options.width}, dropout {options.dropout}, causal {options.causal}")
    clock = "time of the thread on its processor" if options.processor_time else "by the clock on the wall"
    print(f"median of {options.rounds} rounds, {clock}")
    print(f"{'T':>6} {'K':>3} {'tiles':>10} {'formula':>10} {'values':>10} {'ratio':>7} {'tiles':>12} {'formula':>12} {'values':>12}")
    for length in options.lengths:
        for count in options.tangents:
            with torch.no_grad():
                found = measured(case_of(options, length, count), options.rounds, device)
            times = " ".join(f"{1e3 * found[name][0]:7.1f} ms" for name in found)
            peaks = " ".join(f"{found[name][1] / 2**20:8.2f} MiB" for name in found)
            print(f"{length:6} {count:3} {times} {found['formula'][0] / found['tiles'][0]:7.2f} {peaks}", flush=True)


if __name__ == "__main__":
    main()
