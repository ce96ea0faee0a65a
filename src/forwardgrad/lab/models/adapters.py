"""Which part of a network is trained: a correction of low rank beside frozen layers (LoRA), or its classifier alone."""

from __future__ import annotations

from torch import Tensor, nn

from forwardgrad.lab.models.tokens import Attention, Bert

RANK, ALPHA = 8, 16


class Lora(nn.Module):
    """A frozen linear layer and beside it a trained correction of low rank: y = Wx + b + (α/r) U D x.

    U is zero at first, so the layer begins as what it was. Source: Hu et al., "LoRA" (2021), section 4.1.
    """

    def __init__(self, layer: nn.Linear, rank: int = RANK, alpha: float = ALPHA) -> None:
        super().__init__()
        self.layer, self.scale = layer.requires_grad_(False), alpha / rank
        self.down, self.up = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.scale * self.up(self.down(x))  # type: ignore[no-any-return]


def adapted(model: Bert) -> Bert:
    """The network with its body frozen and corrections beside the queries and values of attention; these and the classifier are trained."""
    model = read_out(model)
    for module in model.modules():
        if isinstance(module, Attention):
            module.query, module.value = Lora(module.query), Lora(module.value)  # type: ignore[assignment]
    return model


def read_out(model: Bert) -> Bert:
    """The network with its body frozen; the classifier alone is trained."""
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model
