"""Where runs are executed, and how they share processors and GPUs. Loads without torch."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import check_choice

ExecutorName = Literal["process", "ray"]
LostRank = Literal["end", "go-on"]


def launched() -> int:
    """How many ranks torchrun, or whoever sets its variables, started for this command; 1 where none were."""
    given = os.environ.get("WORLD_SIZE", "")
    return int(given) if given.isdecimal() and int(given) and "RANK" in os.environ and "MASTER_ADDR" in os.environ else 1


@dataclass(frozen=True)
class Place:
    """Where runs are executed: the device, the data folder, and how runs share processors and GPUs.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        data_dir: the folder of the data sets; None for the usual one.
        jobs: how many runs at a time share this machine's cores. With the executor "process", one job is this process itself, and more are
            a pool of processes.
        batched: whether runs that differ in seed and in the optimizer's numbers alone are trained as one program; None for on a GPU only.
        executor: "process" for this machine, "ray" for a Ray cluster.
        address: the Ray cluster to join; None starts one on this machine.
        gpus: a run's part of a GPU on Ray; None for a whole one on cuda.
        threads: of every run. None is cores // jobs, and in this process what torch takes by itself. The same number of threads gives the
            same bits on the same hardware, whatever the executor.
        path: a folder whose modules every worker can import.
        retry_failed: whether failed results are deleted, each once, and their runs begun again.
        tensorboard: whether every run also writes events for TensorBoard, in the store's folder of that name.
        keep_weights: whether final runs leave their weights in their folders.
        ranks: processes that train one run together, each a part of every batch.
        directions: how many of these divide the directions of a part of the batch among them; a divisor of their number.
        lost_rank: "end" where a run ends with a rank that is lost, "go-on" where those that are left go on from its last checkpoint.
        log: whether runs leave the numbers of their steps in their folders, from which they can be taken again.
        checkpoint_seconds: between two checkpoints of a run.
    """

    device: str = "cpu"
    data_dir: Path | None = None
    jobs: int = 1
    batched: bool | None = None
    executor: ExecutorName = "process"
    address: str | None = None
    gpus: float | None = None
    threads: int | None = None
    path: Path | None = None
    retry_failed: bool = False
    tensorboard: bool = False
    keep_weights: bool = False
    ranks: int = 1
    directions: int = 1
    lost_rank: LostRank = "end"
    log: bool = False
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        check_choice(self.executor, ExecutorName, "executor")
        if self.jobs < 1:
            raise UserError(f"the number of jobs must be at least 1, not {self.jobs}")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"the number of threads must be at least 1, not {self.threads}")
        self._check_ranks()
        if self.executor == "ray":
            self._check_ray()
        elif self.address is not None or self.gpus is not None:
            raise UserError("--address and --gpus belong to --executor ray: add that, or leave them out")

    def _check_ranks(self) -> None:
        check_choice(self.lost_rank, LostRank, "lost_rank")
        for what, number in (("ranks", self.ranks), ("ranks that divide directions", self.directions)):
            if number < 1:
                raise UserError(f"the number of {what} must be at least 1, not {number}")
        if self.ranks > 1 and self.batched:
            raise UserError("--batched makes one program of many runs, and --ranks divides one run among processes: leave one of them out")
        many = launched() if self.ranks == 1 else self.ranks
        if many % self.directions:
            raise UserError(f"--directions {self.directions} must divide the number of ranks, which is {many}: give a multiple of it")
        if self.lost_rank == "go-on" and launched() > 1:
            raise UserError("torchrun starts ranks again by itself, with its --max-restarts: leave --lost-rank out")
        if self.lost_rank == "go-on" and self.ranks == 1:
            raise UserError("--lost-rank go-on is for runs of several ranks: add --ranks, or leave it out")

    def with_ranks(self, ranks: int | None) -> Place:
        """This place where a run that lost ranks goes on with so many; None: it lost none. As many as still can divide directions."""
        if ranks is None:
            return self
        left: LostRank = self.lost_rank if ranks > 1 else "end"
        return dataclasses.replace(self, ranks=ranks, directions=math.gcd(ranks, self.directions), lost_rank=left)

    def _check_ray(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"Ray gives each run its GPU: with --executor ray the device is cpu or cuda, not {self.device!r}")
        if self.gpus is not None and self.device == "cpu":
            raise UserError("--gpus is for runs on a GPU: add --device cuda, or leave it out")
        if self.gpus is not None and not (math.isfinite(self.gpus) and 0 < self.gpus <= 1):
            raise UserError(f"a run takes a whole GPU or a part of one: --gpus must be above 0 and at most 1, not {self.gpus}")

    @property
    def alone(self) -> bool:
        """Whether a run has the machine to itself, as far as this place decides."""
        return self.executor == "process" and self.jobs == 1

    @property
    def share(self) -> int:
        """The cores of a run, or of each of its ranks, that has others beside it."""
        return self.threads or max(1, (os.cpu_count() or 1) // (self.jobs * self.ranks))

    def at_a_time(self, runs: int) -> int:
        """How many of so many runs make progress at full speed: no more than there are jobs, nor than have cores here to themselves."""
        fit = self.jobs if self.executor == "ray" else max(1, (os.cpu_count() or 1) // (self.share * self.ranks))
        return max(1, min(self.jobs, runs, fit))

    @property
    def crowded(self) -> str:
        """What to say where runs get in one another's way, empty where each has its cores."""
        cores = os.cpu_count() or 1
        if self.jobs == self.at_a_time(self.jobs) and (self.executor == "ray" or self.jobs * self.ranks * self.share <= cores):
            return ""
        each = f" of {self.share} threads each" if self.share > 1 else ""
        if self.ranks > 1:
            many = f"{self.jobs} jobs of {self.ranks} ranks" if self.jobs > 1 else f"{self.ranks} ranks"
            return f"{many}{each} are more than this machine's {os.cpu_count()} cores: they slow one another down"
        return f"{self.jobs} runs at a time{each} are more than this machine's {os.cpu_count()} cores: they slow one another down"

    @property
    def gpu_share(self) -> float:
        """The part of a GPU that Ray gives a run."""
        return 0.0 if self.device == "cpu" else 1.0 if self.gpus is None else self.gpus
