"""Several ranks on a slow network: bytes on the wire and time of a step, of the library's estimators and of DistributedDataParallel.

python -m benchmarks.wire --out wire.json                      # as root: NN and CNN, 1, 2 and 4 ranks; half an hour on two cores
python -m benchmarks.wire --ranks 1,2 --links loopback,10 --models nn --rounds 3

Each rank is a process of one thread in a network namespace of its own, with a link to a common bridge that `tc` holds to a rate; on
loopback all are in one namespace. Bytes are those that the namespace's device has sent, so with all headers down to Ethernet's.
`payload` is what a rank gives to collectives. Cases take turns within a link, each round in a random order. Shown are medians over the
rounds with 95 % bootstrap intervals; a case that has had its time on a link is left out of later rounds, and the number of steps says so.
A link lets 3,200 bytes through at once before its rate holds (at 100 Mbit/s 12,500), so few bytes now and then go without waiting.
Then the formula of `wire_model.py` is compared with what was measured, and asked about more ranks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from benchmarks.wire_model import Line, Sent, by_doubling, seconds
from benchmarks.wire_ranks import DIVIDED, METHODS, Case, Place, Run, work
from tests.support.networks import DEVICE, Network, NoNetwork, network

from forwardgrad.lab import environment
from forwardgrad.lab.store import write_json

LOOPBACK, NUMBERS = "loopback", 10
MORE = (8, 64, 512)
HEAD = f"{'link':11} {'ranks':>5} {'model':5} {'batch':>5} {'method':12}"
MOST_STEPS, ENOUGH = 200, 5  # steps of a run; rounds from which on an interval is shown
CORES = len(os.sched_getaffinity(0))
Found = dict[tuple[str, int, Case], list[tuple[Run, int]]]  # by link, ranks and case: each round's run, and its steps


class Group:
    """Processes of one group, each of which does what it is asked to and answers."""

    def __init__(self, place: list[Place], cases: list[Case], folder: str) -> None:
        context, meet = multiprocessing.get_context("spawn"), f"file://{folder}/meet"
        pairs = [context.Pipe() for _ in place]
        self._ends = [mine for mine, _ in pairs]
        self._processes = [
            context.Process(target=work, args=(rank, where, meet, cases, other))
            for rank, (where, (_, other)) in enumerate(zip(place, pairs, strict=True))
        ]
        for process, (_, other) in zip(self._processes, pairs, strict=True):
            process.start()
            other.close()  # so that a process that ends is noticed
        self._answers()

    def ask(self, *request: Any) -> list[Any]:
        for end in self._ends:
            end.send(request)
        return self._answers()

    def _answers(self) -> list[Any]:
        try:
            return [end.recv() for end in self._ends]
        except EOFError:
            raise SystemExit("a rank has ended before its time; what it wrote stands above") from None

    def end(self) -> None:
        for end in self._ends:
            with suppress(OSError):  # it has ended already
                end.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()


@contextmanager
def group(ranks: int, cases: list[Case], joined: Network | None) -> Iterator[Group]:
    """Ranks on a network, or in one namespace."""
    with tempfile.TemporaryDirectory() as folder:
        if joined is not None:
            addresses = tuple(joined.address(rank) for rank in range(ranks))
            made = Group([Place(joined.machines[rank], DEVICE, addresses) for rank in range(ranks)], cases, folder)
            try:
                yield made
            finally:
                made.end()
            return
        with network(1) as alone:
            made = Group([Place(alone.machines[0], "lo", ("127.0.0.1",) * ranks)] * ranks, cases, folder)
            try:
                yield made
            finally:
                made.end()


def measured(made: Group, cases: list[Case], options: argparse.Namespace, guess: dict[Case, float]) -> dict[Case, list[tuple[Run, int]]]:
    """The rounds of every case on one link. `guess`: about how long a step takes."""
    found: dict[Case, list[tuple[Run, int]]] = {case: [] for case in cases}
    order, spent = random.Random(0), dict.fromkeys(cases, 0.0)
    for _ in range(options.rounds):
        for case in order.sample(cases, len(cases)):
            if spent[case] > options.limit:
                continue
            steps = min(MOST_STEPS, max(1, int(options.seconds / guess[case])))
            runs: list[Run] = made.ask("run", case, steps)
            mean = [statistics.mean(values) for values in zip(*runs, strict=True)]
            run = Run(max(one.seconds for one in runs), *mean[1:])
            found[case].append((run, steps))
            guess[case] = run.seconds
            spent[case] += run.seconds * steps
    return found


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """The 95 % bootstrap interval of their median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return medians[draws // 40], medians[-draws // 40]


class Measurement:
    """All that is measured, by link and number of ranks."""

    def __init__(self, options: argparse.Namespace, where: dict[str, Any]) -> None:
        self.options, self.where = options, where
        self.found: Found = {}
        self.loads: dict[tuple[str, int], float] = {}
        self.lines: dict[str, Line] = {}
        self.sent: dict[tuple[int, Case], list[Sent]] = {}

    def cases(self, ranks: int, *, scaling: bool) -> list[Case]:
        """Those of `ranks` ranks: a fixed batch a rank and, where scaling is measured, its share of a fixed batch too."""
        batch = self.options.batch_size
        if ranks == 1:
            sizes = {batch, *(batch // count for count in self.options.ranks)}
        else:
            sizes = {batch, batch // ranks} if scaling else {batch}
        made = [Case(model, method, size) for model in self.options.models for method in self.options.methods for size in sorted(sizes)]
        return [case for case in made if case.batch == batch or case.method not in DIVIDED]

    def measure(self) -> None:
        for ranks in self.options.ranks:
            wanted = self.cases(ranks, scaling=True)
            with group(ranks, wanted, None) as made:
                self._link(made, LOOPBACK, ranks, wanted)
        for ranks in self.options.ranks:
            links = [rate for rate in self.options.rates if ranks == 2 or rate == self.options.scaling]
            if ranks == 1 or not links:
                continue
            with network(ranks) as joined, group(ranks, self.cases(ranks, scaling=True), joined) as made:
                for rate in links:
                    joined.shape(rate)
                    self._link(made, f"{rate:g} Mbit/s", ranks, self.cases(ranks, scaling=rate == self.options.scaling), rate)

    def _link(self, made: Group, link: str, ranks: int, cases: list[Case], rate: float | None = None) -> None:
        guess = {}
        for case in cases:
            if (ranks, case) not in self.sent:
                self.sent[ranks, case] = made.ask("payload", case)[0]
            before = self.found.get((LOOPBACK, ranks, case))
            bits = 0 if rate is None or ranks == 1 else 8 * sum(one.size for one in self.sent[ranks, case])
            guess[case] = (before[-1][0].seconds if before else made.ask("run", case, 2)[0].seconds) + bits / (1e6 * (rate or 1))
        if ranks == 2:
            moved = 400_000_000 if rate is None else int(rate * 400_000)  # three seconds
            self.lines[link] = Line(max(made.ask("gather", NUMBERS, 200)), max(made.ask("transfer", moved)))
        for case, runs in measured(made, cases, self.options, guess).items():
            self.found[link, ranks, case] = runs
        self.loads[link, ranks] = os.getloadavg()[0]
        shared = f" on {CORES} core{'s' if CORES > 1 else ''}" if ranks > CORES else ""
        print(f"\n{link}, {ranks} rank{'s' if ranks > 1 else ''}{shared}; load {self.loads[link, ranks]:.2f}")
        tell_rows(self.row(link, ranks, case) for case in cases)
        self.write()

    def write(self) -> None:
        """All that there is so far: a measurement that is ended early has what it has measured."""
        if self.options.out:
            rows = [self.row(*key) for key in self.found]
            lines = {link: {"gather_seconds": line.gather, "bytes_a_second": line.rate} for link, line in self.lines.items()}
            told = {name: list(getattr(self, name)()) for name in ("scalings", "predictions", "extrapolations")}
            write_json(self.options.out, {"environment": self.where, "lines": lines, "rows": rows, **told})

    def median(self, link: str, ranks: int, case: Case) -> float:
        return statistics.median(run.seconds for run, _ in self.found[link, ranks, case])

    def row(self, link: str, ranks: int, case: Case) -> dict[str, Any]:
        runs = self.found[link, ranks, case]
        times = [run.seconds for run, _ in runs]
        low, high = interval(times)
        share = ranks if link == LOOPBACK else 1  # all ranks send through one device there
        still = self.median(LOOPBACK, ranks, case) if (LOOPBACK, ranks, case) in self.found else None
        return {
            "link": link,
            "ranks": ranks,
            **case._asdict(),
            "load": self.loads[link, ranks],
            "rounds": len(runs),
            "steps": sum(steps for _, steps in runs),
            "seconds": statistics.median(times),
            "seconds_low": low,
            "seconds_high": high,
            "over_loopback": None if still is None else statistics.median(times) / still,
            "sent_bytes": statistics.median(run.sent for run, _ in runs) / share,
            "sent_frames": statistics.median(run.frames_sent for run, _ in runs) / share,
            "received_bytes": statistics.median(run.received for run, _ in runs) / share,
            "payload_bytes": sum(one.size for one in self.sent[ranks, case]) if ranks > 1 else 0,
            "calls": len(self.sent[ranks, case]) if ranks > 1 else 0,
        }

    def predictions(self) -> Iterator[dict[str, Any]]:
        """The formula beside each measurement of more than one rank."""
        for (link, ranks, case), _ in self.found.items():
            if ranks > 1 and case.method not in DIVIDED and link in self.lines and (LOOPBACK, 1, case) in self.found:
                told = seconds(self.median(LOOPBACK, 1, case), ranks, self.sent[ranks, case], self.lines[link], CORES)
                seen = self.median(link, ranks, case)
                yield {"link": link, "ranks": ranks, **case._asdict(), "predicted": told, "measured": seen, "error": told / seen - 1}

    def scalings(self) -> Iterator[dict[str, Any]]:
        """How many times as fast as one rank more ranks go: in examples with a batch a rank, in steps with its share of one batch."""
        batch = self.options.batch_size
        for link, ranks, case in self.found:
            if ranks == 1 or not self._scales(link):
                continue
            alone = self.median(LOOPBACK, 1, case._replace(batch=batch))
            fixed = case.method in DIVIDED or case.batch != batch
            times = alone / self.median(link, ranks, case) * (1 if fixed else ranks)
            yield {"link": link, "ranks": ranks, **case._asdict(), "batch_of_all": fixed, "times": times}

    def _scales(self, link: str) -> bool:
        return link in (LOOPBACK, f"{self.options.scaling:g} Mbit/s")

    def extrapolations(self) -> Iterator[dict[str, Any]]:
        for link, line in self.lines.items():
            for case in self.cases(2, scaling=False):
                if case.method in DIVIDED or (2, case) not in self.sent or (LOOPBACK, 1, case) not in self.found:
                    continue
                compute, sent = self.median(LOOPBACK, 1, case), self.sent[2, case]
                ring = {str(ranks): seconds(compute, ranks, sent, line) for ranks in MORE}
                doubled = (
                    None if any(one.reduced for one in sent) else {str(ranks): by_doubling(compute, ranks, sent, line) for ranks in MORE}
                )
                yield {"link": link, **case._asdict(), "ring": ring, "doubling": doubled}


def tell_rows(rows: Iterable[dict[str, Any]]) -> None:
    print(f"{HEAD} {'steps/s (95 % interval)':28} {'ms/step':>9} {'/loopback':>9} {'sent B/step':>12} {'payload B':>10} {'steps':>6}")
    for row in rows:
        around = f"{1 / row['seconds_high']:.3g} to {1 / row['seconds_low']:.3g}" if row["rounds"] >= ENOUGH else f"n = {row['rounds']}"
        rate = f"{1 / row['seconds']:.3g} ({around})"
        over = "" if row["over_loopback"] is None else f"{row['over_loopback']:.2f}"
        print(f"{_place(row)} {rate:28} {1e3 * row['seconds']:9.2f} {over:>9}", end=" ")
        print(f"{row['sent_bytes']:12,.0f} {row['payload_bytes']:10,} {row['steps']:6}")


def tell(all_of: Measurement) -> None:
    print()
    for link, line in all_of.lines.items():
        rate, gather = line.rate * 8e-6, 1e3 * line.gather
        print(f"{link}: plain TCP carries {rate:,.3g} Mbit/s; an all_gather of {NUMBERS} numbers between two ranks takes {gather:.3f} ms")
    print("\nTimes as fast as one rank alone: examples with a batch for each rank, or steps where all ranks share one batch")
    for told in all_of.scalings():
        print(f"{_place(told)} {told['times']:6.2f} {'steps' if told['batch_of_all'] else 'examples'}")
    print("\nThe formula beside the measurement, milliseconds a step")
    print(f"{HEAD} {'formula':>10} {'measured':>10}  error")
    for told in all_of.predictions():
        print(f"{_place(told)} {1e3 * told['predicted']:10.2f} {1e3 * told['measured']:10.2f} {100 * told['error']:+5.0f} %")
    print("\nThe formula for more ranks, each with a core of its own, milliseconds a step; in brackets if gathers went by doubling")
    print(f"{'link':11} {'model':5} {'batch':>5} {'method':12} " + " ".join(f"{f'{ranks} ranks':>10}" for ranks in MORE))
    for told in all_of.extrapolations():
        ring = " ".join(f"{1e3 * value:10.1f}" for value in told["ring"].values())
        doubling = "" if told["doubling"] is None else "  (" + ", ".join(f"{1e3 * value:.1f}" for value in told["doubling"].values()) + ")"
        print(f"{told['link']:11} {told['model']:5} {told['batch']:5} {told['method']:12} {ring}{doubling}")


def _place(row: dict[str, Any]) -> str:
    return f"{row['link']:11} {row['ranks']:5} {row['model']:5} {row['batch']:5} {row['method']:12}"


def listed(kind: type) -> Any:
    return lambda text: [kind(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=listed(int), default=[1, 2, 4], help="1 is always among them: the formula needs it")
    parser.add_argument("--rates", type=listed(float), default=[100.0, 10.0, 1.0], help="Mbit/s of the links; loopback is always measured")
    parser.add_argument("--scaling", type=float, default=10.0, help="the rate at which other numbers of ranks than 2 are measured")
    parser.add_argument("--models", type=listed(str), default=["nn", "cnn"])
    parser.add_argument("--methods", type=listed(str), default=list(METHODS), help="with commas between")
    parser.add_argument("--batch-size", type=int, default=64, help="of each rank, or of all together")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a case in a round; at least one step is taken")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of a case on a link after which it is left out of later rounds")
    parser.add_argument("--out", type=Path, help="a JSON file for all numbers")
    options = parser.parse_args()
    options.ranks = sorted({1, *options.ranks})
    if unknown := sorted(set(options.methods) - set(METHODS)):
        parser.error(f"unknown method {unknown[0]!r}: choose of {', '.join(METHODS)}")
    if options.ranks[0] < 1 or any(options.batch_size % ranks for ranks in options.ranks):
        parser.error(f"--batch-size {options.batch_size} must be a multiple of every number of ranks, which are {options.ranks}")
    torch.set_num_threads(1)
    where = environment.describe(torch.device("cpu"))
    where["command"] = "python -m benchmarks.wire"
    where["options"] = {name: value for name, value in vars(options).items() if name != "out"}
    cores = f"{CORES} core{'s' if CORES > 1 else ''}"
    print(f"{where['device']}, {cores}, torch {where['torch']}, commit {where['commit']}; a process of one thread a rank")
    try:
        all_of = Measurement(options, where)
        all_of.measure()
    except NoNetwork as error:
        parser.error(str(error))
    tell(all_of)
    if options.out:
        print(f"\nwritten: {options.out}")


if __name__ == "__main__":
    main()
