"""What there is: perturbations, and layers with rules of their own, by the function that is one.

What is perturbed: whole weights or a part, weights of low rank or of every example, activities, or a choice or split by layer.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from forwardgrad.perturbations.activity import Activity
from forwardgrad.perturbations.base import Perturbation
from forwardgrad.perturbations.cheapest import Cheapest
from forwardgrad.perturbations.dense import Dense
from forwardgrad.perturbations.informed import Informed
from forwardgrad.perturbations.layers import Convolution, Embedding, Layer, Linear, Product
from forwardgrad.perturbations.low_rank import LowRank
from forwardgrad.perturbations.norms import BatchNorm, GroupNorm, LayerNorm, RMSNorm
from forwardgrad.perturbations.per_example import PerExample
from forwardgrad.perturbations.sparse import Sparse
from forwardgrad.perturbations.split import SplitWeights

PERTURBATIONS: tuple[type[Perturbation], ...] = (Dense, LowRank, PerExample, Activity, Cheapest, SplitWeights, Informed, Sparse)

LAYERS: dict[Callable[..., Any], type[Layer]] = {
    F.linear: Linear,
    torch.addmm: Product,
    Tensor.addmm: Product,
    torch.conv1d: Convolution,
    torch.conv2d: Convolution,
    torch.conv3d: Convolution,
    F.embedding: Embedding,
    F.layer_norm: LayerNorm,
    F.rms_norm: RMSNorm,
    F.group_norm: GroupNorm,
    F.batch_norm: BatchNorm,
}
