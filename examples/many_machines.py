"""Ranks train one model by a few bytes a step: `torchrun --nproc-per-node 2 examples/many_machines.py`."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import forwardgrad as fg

CLASSES, BATCH = 4, 64


def examples(count: int, seed: int) -> TensorDataset:
    """Points around one centre for each class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return TensorDataset(centres[labels] + torch.randn(count, 16, generator=generator), labels)


def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def main() -> None:
    torch.set_num_threads(1)
    fg.join_ranks()
    ranks = fg.Distributed()
    torch.manual_seed(0)  # the same model on every rank
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(1)  # and the same directions
    method = fg.ForwardGradient(8, perturb=fg.LowRank())
    step = fg.TrainingStep(loss, model, optimizer, method, generator=generator, group=ranks)
    train, test = examples(8192, seed=1), examples(1000, seed=2)
    sampler = DistributedSampler(train, num_replicas=ranks.shards, rank=ranks.shard)
    loader = DataLoader(train, batch_size=BATCH // ranks.shards, sampler=sampler)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        before = ranks.sent
        for x, y in loader:
            step(x, y)
        if ranks.rank == 0:
            right = (model(test.tensors[0]).argmax(1) == test.tensors[1]).float().mean()
            sent = (ranks.sent - before) / len(loader)
            print(f"epoch {epoch + 1}: {right:.1%} of the test examples are right, {sent:.1f} bytes a rank and step", flush=True)
    ranks.compare(model)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
