"""The ranks that train one run together: started here for a run, or by torchrun for a command."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from forwardgrad.lab import interrupts
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.execution.children import follow_parent, how
from forwardgrad.lab.execution.place import Place, launched
from forwardgrad.lab.lockstep import RankLost, Team
from forwardgrad.lab.studies import Run, from_json, to_json
from forwardgrad.lab.training import allocation, follow
from forwardgrad.ranks import join_ranks

TIMEOUT = timedelta(minutes=30)  # that ranks wait for one that lives and does not answer, such as the first while it evaluates
MEETING_SECONDS = 300.0  # in which all ranks have to be there
ENDING_SECONDS = 10.0  # in which ranks end by themselves that have nothing more to do
FAILED, MISTAKE, LOST = 1, 2, 3  # how a follower ends: by an error, a mistake of the user's, the end of another rank
START = (
    "import json, sys; told = json.load(sys.stdin); sys.path[:] = told['path']; from forwardgrad.lab.execution import team; team.main(told)"
)

_joined: list[Team] = []


@contextmanager
def joined(place: Place) -> Iterator[tuple[Place, Team]]:
    """The ranks that torchrun started, and a place that has as many: inside, every run of this command is trained by all of them.

    Raises UserError where the place asks for another number.
    """
    if place.ranks not in (1, launched()):
        raise UserError(f"torchrun started {launched()} ranks, and --ranks asks for {place.ranks}: leave --ranks out")
    join_ranks(TIMEOUT.total_seconds())
    _joined.append(Team(place.directions))
    try:
        yield dataclasses.replace(place, ranks=_joined[-1].size), _joined[-1]
        _joined[-1].dismiss()
    finally:
        _joined.pop()
        dist.destroy_process_group()


@contextmanager
def team_of(run: Run, place: Place) -> Iterator[Team | None]:
    """The ranks of a run, this process being the first; None where it is the only one.

    Inside, a rank that ended is told by a RankLost, or by the error that ended it.
    """
    if place.ranks == 1 or _joined:
        yield _joined[-1] if _joined else None
        return
    if dist.is_initialized():
        raise UserError("--ranks starts processes of its own, and this process is one of a torch.distributed group: leave one of them out")
    with tempfile.TemporaryDirectory(prefix="forwardgrad-") as name:
        followers = _Followers(run, place, Path(name))
        try:
            followers.meet()
            try:
                try:
                    yield Team(place.directions)
                finally:
                    dist.destroy_process_group()  # which those hear that wait for this one
            except RankLost as error:
                raise followers.reason(error) from error
            followers.wait()
        finally:
            followers.end()


class _Followers:
    """The other ranks of a run, which begin here."""

    def __init__(self, run: Run, place: Place, folder: Path) -> None:
        self._folder, self._size = folder, place.ranks
        self._store = _store(folder / "meet", place.ranks)
        told = {"run": to_json(run), "ranks": place.ranks, "meet": str(folder / "meet"), "parent": os.getpid(), "path": sys.path}
        told |= {"threads": torch.get_num_threads(), "data_dir": place.data_dir and str(place.data_dir.resolve())}
        told |= {"directions": place.directions}
        self._processes = list[subprocess.Popen[str]]()
        for rank in range(1, place.ranks):
            self._start({**told, "rank": rank, "device": device_of(place.device, rank)})

    def _start(self, told: dict[str, Any]) -> None:
        with self._said(told["rank"]).open("w") as says:
            streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": says}
            # In a group of its own it hears no Ctrl-C, which is the business of the first rank.
            process = subprocess.Popen([sys.executable, "-c", START], text=True, process_group=0, **streams)
        self._processes.append(process)
        assert process.stdin is not None
        process.stdin.write(json.dumps(told))
        process.stdin.close()

    def _said(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.txt"

    def meet(self) -> None:
        """Wait until all are there, and join their group."""
        names, until = [_here(rank) for rank in range(1, self._size)], time.monotonic() + MEETING_SECONDS
        while not self._store.check(names):
            interrupts.check()
            if any(process.poll() is not None for process in self._processes):
                raise self._told_by_their_ends() or RankLost(f"one of {self._size} ranks ended before it began")
            if time.monotonic() > until:
                lost = sum(not self._store.check([name]) for name in names)
                raise RankLost(f"of {self._size} ranks not all were there after {MEETING_SECONDS:.0f} seconds", lost)
            time.sleep(0.02)
        dist.init_process_group("gloo", store=self._store, rank=0, world_size=self._size, timeout=TIMEOUT)

    def reason(self, lost: RankLost) -> Exception:
        """Why a rank was lost, as far as the followers tell by how they ended; or by not ending, where no other has."""
        self.wait()
        if (told := self._told_by_their_ends()) is not None:
            return told
        silent = [rank for rank, process in enumerate(self._processes, 1) if process.poll() is None]
        return self._lost(dict.fromkeys(silent, "does not answer")) if silent else lost

    def _told_by_their_ends(self) -> Exception | None:
        killed = dict[int, str]()
        for rank, process in enumerate(self._processes, 1):
            said = self._said(rank).read_text(errors="replace").strip()
            last = (said.splitlines() or [f"status {process.returncode}"])[-1]
            if process.returncode == MISTAKE:
                return UserError(last)
            if process.returncode == FAILED:
                error = RuntimeError(f"rank {rank} of {self._size} ended with {last}")
                error.add_note(said)
                return error
            if process.returncode not in (None, 0, LOST):
                killed[rank] = how(process.returncode)
        return self._lost(killed) if killed else None

    def _lost(self, ends: dict[int, str]) -> RankLost:
        return RankLost(", and ".join(f"rank {rank} of {self._size} {end}" for rank, end in ends.items()), len(ends))

    def wait(self) -> None:
        """Let those end that have nothing more to do."""
        until = time.monotonic() + ENDING_SECONDS
        while any(process.poll() is None for process in self._processes) and time.monotonic() < until:
            time.sleep(0.02)

    def end(self) -> None:
        """End them, whatever they do."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


def main(told: dict[str, Any]) -> None:
    """What a follower does, with the words that it was started with. It says on standard error why it ended."""
    follow_parent(told["parent"])
    torch.set_num_threads(told["threads"])
    allocation.keep()
    store = _store(Path(told["meet"]), told["ranks"])
    store.set(_here(told["rank"]), "")
    dist.init_process_group("gloo", store=store, rank=told["rank"], world_size=told["ranks"], timeout=TIMEOUT)
    data_dir = told["data_dir"] and Path(told["data_dir"])
    try:
        follow(from_json(told["run"], "the run"), Team(told["directions"]), device=told["device"], data_dir=data_dir)
    except RankLost as error:
        _end(LOST, str(error))
    except UserError as error:
        _end(MISTAKE, str(error))
    except BaseException:
        _end(FAILED, traceback.format_exc())
    dist.destroy_process_group()


def _end(status: int, words: str) -> None:
    """End at once: leaving a group in good order takes the others, which wait elsewhere."""
    print(words, file=sys.stderr, flush=True)
    os._exit(status)


def follow_first(run: Run, place: Place, team: Team) -> None:
    """Take part in a run as one of the ranks that torchrun started."""
    allocation.keep()
    if place.path is not None:
        sys.path.insert(0, str(place.path.resolve()))
    follow(run, team, device=device_of(place.device, int(os.environ.get("LOCAL_RANK", "0"))), data_dir=place.data_dir)


def device_of(device: str, rank: int) -> str:
    """The device of a rank: GPUs go round, where none is named."""
    there = torch.cuda.device_count() if device == "cuda" and torch.cuda.is_available() else 0
    return f"cuda:{rank % there}" if there > 1 else device


def _store(path: Path, ranks: int) -> Any:
    """Where the ranks meet: a file."""
    return dist.FileStore(str(path), ranks)  # type: ignore[attr-defined]


def _here(rank: int) -> str:
    return f"here {rank}"
