"""`ForwardStrategy`: Lightning's processes for a module whose gradients need no backward pass."""

from __future__ import annotations

from forwardgrad.integrations.source import missing
from forwardgrad.processes import several
from forwardgrad.ranks import Distributed

try:
    from lightning.pytorch.strategies import DDPStrategy

    from forwardgrad.integrations.lightning_module import ForwardLightningModule
except ImportError as error:
    raise missing("ForwardStrategy", "lightning", error) from error


class ForwardStrategy(DDPStrategy):
    """Lightning's `ddp` without DistributedDataParallel: the same processes, samplers and checkpoints.

    Each process makes its estimate from its part of the data, and all of them train the module together (see `Distributed`, and for what
    they send). They begin with the parameters of the first. Use it as `Trainer(devices=2, strategy=ForwardStrategy())`.

    Args:
        *args, **kwargs: those of Lightning's `DDPStrategy`. What they say about DistributedDataParallel has no effect.

    Raises TypeError for a module that is no `ForwardLightningModule`: nobody would average its gradients.
    """

    def configure_ddp(self) -> None:
        if not isinstance(module := self.lightning_module, ForwardLightningModule):
            raise TypeError(
                f"ForwardStrategy averages no gradients of a backward pass, so it trains no {type(module).__name__}: make that a "
                'ForwardLightningModule, or take strategy="ddp"'
            )
        if several():
            Distributed().broadcast(module)  # as DistributedDataParallel does

    def on_train_end(self) -> None:
        super().on_train_end()
        module = self.lightning_module
        assert isinstance(module, ForwardLightningModule)
        module.gradients.compare(module)
