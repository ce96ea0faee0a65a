"""A rank is killed, all are started again, and no step is lost: `torchrun --nproc-per-node 2 --max-restarts 1 examples/lost_rank.py`."""

import os
import signal
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import forwardgrad as fg

STEPS, BATCH, KILLED = 300, 64, 200
FIRST_LIFE = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
FOLDER = Path(tempfile.gettempdir()) / f"steps of {os.environ['TORCHELASTIC_RUN_ID']}"  # each machine may have its own


def part_of_batch(step: int, ranks: fg.Distributed) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of a batch that is a rank's. It follows from the number of the step, so a rank that goes on takes the right one."""
    generator = torch.Generator().manual_seed(step)
    centres = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 4, (BATCH,), generator=generator)
    x = centres[labels] + torch.randn(BATCH, 16, generator=generator)
    return x.chunk(ranks.shards)[ranks.shard], labels.chunk(ranks.shards)[ranks.shard]


def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def main() -> None:
    torch.set_num_threads(1)
    fg.join_ranks()
    ranks = fg.Distributed()
    torch.manual_seed(0)  # the same model on every rank, in every life
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)
    generator = torch.Generator().manual_seed(1)
    FOLDER.mkdir(exist_ok=True)
    log = FOLDER / f"rank-{ranks.rank}.log"
    done = fg.replay(log, model, optimizer, generator=generator, group=ranks)  # 0 the first time
    print(f"rank {ranks.rank} goes on after step {done}", flush=True)
    steps = fg.StepLog(log, since=done if log.exists() else None)
    method = fg.ForwardGradient(8, perturb=fg.LowRank())
    step = fg.TrainingStep(loss, model, optimizer, method, generator=generator, group=ranks, log=steps)
    for number in range(done, STEPS):
        if FIRST_LIFE and ranks.rank == 1 and number == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        record = step(*part_of_batch(number, ranks))
    ranks.compare(model)
    steps.close()
    if ranks.rank == 0:
        print(f"loss {record.loss:.3f} after step {STEPS}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
