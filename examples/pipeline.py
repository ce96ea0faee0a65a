"""Two processes train a model in a pipeline that sends nothing back: `torchrun --nproc-per-node 2 examples/pipeline.py`."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import forwardgrad as fg

CLASSES = 10


def examples(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around two centres for each class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(2 * CLASSES, 32, generator=torch.Generator().manual_seed(0))
    number = torch.randint(0, 2 * CLASSES, (count,), generator=generator)
    return centres[number] + 0.7 * torch.randn(count, 32, generator=generator), number % CLASSES


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # every rank makes the same model, and keeps its own stage of it
    layers = [layer for inputs in (32, 256, 256, 256) for layer in (nn.Linear(inputs, 256), nn.ReLU())]
    stage = fg.split_stages(nn.Sequential(*layers, nn.Linear(256, CLASSES)), ranks)[rank]
    optimizer = torch.optim.Adam(stage.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(rank)
    step = fg.PipelineStep(F.cross_entropy, stage, optimizer, fg.LocalLosses(feedback=True), classes=CLASSES, generator=generator)
    (x, y), (test, labels) = examples(6000, seed=1), examples(1000, seed=2)
    for epoch in range(5):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(64)
        for batch in order:
            step(x[batch], y[batch]) if rank == 0 else step()
        output = step.forward(test) if rank == 0 else step.forward()
        if output is not None:
            print(f"epoch {epoch + 1}: {(output.argmax(1) == labels).float().mean():.1%} of the test examples are right", flush=True)
    step.wait()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
