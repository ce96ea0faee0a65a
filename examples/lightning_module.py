"""A Lightning module whose training makes no backward pass: `python examples/lightning_module.py`, half a minute.

`torchrun --nproc-per-node 2 examples/lightning_module.py` trains it in two processes.
"""

import os

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import forwardgrad as fg
from forwardgrad.integrations import ForwardLightningModule, ForwardStrategy


class Classifier(ForwardLightningModule):
    """As a module of Lightning: what is new is the class and the estimator."""

    def __init__(self) -> None:
        super().__init__(estimator=fg.LocalLosses(feedback=True), seed=0)
        self.network = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.network(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("accuracy", (self.network(x).argmax(1) == y).float().mean(), prog_bar=True, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def examples(count: int, seed: int) -> DataLoader:
    """Points around two centres for each of ten classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    number = torch.randint(20, (count,), generator=generator)
    points = centres[number] + 0.7 * torch.randn(count, 32, generator=generator)
    return DataLoader(TensorDataset(points, number % 10), batch_size=64)


def main(epochs: int = 5, count: int = 6000, folder: str = "lightning-module") -> float:
    L.seed_everything(0)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = L.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        logger=False,
        devices=processes if processes > 1 else "auto",
        strategy=ForwardStrategy() if processes > 1 else "auto",
    )
    trainer.fit(Classifier(), examples(count, seed=1), examples(1000, seed=2))
    return float(trainer.callback_metrics["accuracy"])


if __name__ == "__main__":
    print(f"{main():.1%} of the validation examples are right")
