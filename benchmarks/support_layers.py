"""The layers and functions of torch.nn that `support.py` checks: each as a small model whose inputs are trained beside its weights.

A value that `moves(...)` marks is trained; other tensors stand still. Everything is in float64. A name with words in brackets is checked
with these options.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, rnn

Built = tuple[Callable[..., Any], tuple[Any, ...]]


class Fed(nn.Module):
    """A layer or a function with what it is given: the inputs that move are parameters."""

    def __init__(self, function: Callable[..., Any], given: tuple[Any, ...]) -> None:
        super().__init__()
        self.function = function
        self.given = [None if isinstance(value, nn.Parameter) else value for value in given]
        self.inputs = nn.ParameterDict({str(place): value for place, value in enumerate(given) if isinstance(value, nn.Parameter)})

    def forward(self) -> Any:
        given = [self.inputs.get(str(place), value) for place, value in enumerate(self.given)]
        return self.function(*given)


def still(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64) * (high - low) + low


def moves(*shape: int, low: float = -1.0, high: float = 1.0) -> nn.Parameter:
    return nn.Parameter(still(*shape, low=low, high=high))


def whole(*shape: int, below: int = 5) -> Tensor:
    return torch.randint(0, below, shape)


def signs(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape).double() * 2 - 1


def some(*layers: tuple[str, Callable[[], nn.Module], tuple[int, ...]]) -> dict[str, Callable[[], Built]]:
    return {name: lambda make=make, shape=shape: (make(), (moves(*shape),)) for name, make, shape in layers}


def mixed() -> Tensor:
    torch.manual_seed(1)
    return whole(9, below=6)


class Packed(nn.Module):
    """A recurrent layer over sequences of several lengths."""

    def __init__(self, layer: nn.RNNBase, ordered: bool = True) -> None:
        super().__init__()
        self.layer, self.lengths = layer, torch.tensor([5, 3, 2] if ordered else [2, 5, 3])

    def forward(self, x: Tensor) -> Any:
        first = self.layer.batch_first
        packed = rnn.pack_padded_sequence(x, self.lengths, first, enforce_sorted=False)
        out, hidden = self.layer(packed)
        return rnn.pad_packed_sequence(out, first, padding_value=0.5)[0], hidden


class Transformed(nn.Module):
    """A module that wants a source and a target."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Transformer(4, 2, 1, 1, 8, dropout=0.0)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.layer(source, target)


def unpool(dims: int) -> Callable[[], Built]:
    pool, back = (getattr(nn, f"{kind}{dims}d")(2) for kind in ("MaxPool", "MaxUnpool"))
    pool.return_indices = True
    return lambda: (lambda x: back(*pool(x)), (moves(2, 2, *[4] * dims),))


def spectral(old: bool) -> nn.Module:
    layer = nn.Linear(4, 3)
    return nn.utils.spectral_norm(layer) if old else parametrizations.spectral_norm(layer)


def weight_normed(old: bool, dim: int | None = 0) -> nn.Module:
    layer = nn.Conv1d(4, 3, 2)
    return nn.utils.weight_norm(layer, dim=dim) if old else parametrizations.weight_norm(layer, dim=dim)


_POOLED = {1: (2, 3, 8), 2: (2, 3, 6, 6), 3: (1, 2, 4, 4, 4)}
LAYERS: dict[str, Callable[[], Built]] = {
    **some(
        ("Identity", nn.Identity, (3, 4)),
        ("Linear", lambda: nn.Linear(4, 3), (5, 4)),
        ("LazyLinear", lambda: nn.LazyLinear(3), (5, 4)),
        ("Flatten", nn.Flatten, (3, 2, 2)),
        ("Unflatten", lambda: nn.Unflatten(1, (2, 2)), (3, 4)),
        ("Fold", lambda: nn.Fold((4, 4), 2), (2, 8, 9)),
        ("Unfold", lambda: nn.Unfold(2), (2, 2, 4, 4)),
        ("ChannelShuffle", lambda: nn.ChannelShuffle(2), (2, 4, 3, 3)),
        ("PixelShuffle", lambda: nn.PixelShuffle(2), (2, 4, 3, 3)),
        ("PixelUnshuffle", lambda: nn.PixelUnshuffle(2), (2, 2, 4, 4)),
        ("Upsample", lambda: nn.Upsample(scale_factor=2), (2, 2, 3, 3)),
        ("Upsample (bilinear)", lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (2, 2, 3, 3)),
        ("Upsample (bicubic)", lambda: nn.Upsample(scale_factor=2, mode="bicubic"), (2, 2, 3, 3)),
        ("Upsample (trilinear)", lambda: nn.Upsample(scale_factor=2, mode="trilinear"), (1, 2, 2, 2, 2)),
        ("Upsample (linear)", lambda: nn.Upsample(scale_factor=2, mode="linear"), (2, 2, 3)),
        ("UpsamplingNearest2d", lambda: nn.UpsamplingNearest2d(scale_factor=2), (2, 2, 3, 3)),
        ("UpsamplingBilinear2d", lambda: nn.UpsamplingBilinear2d(scale_factor=2), (2, 2, 3, 3)),
        ("LayerNorm", lambda: nn.LayerNorm(4), (3, 4)),
        ("RMSNorm", lambda: nn.RMSNorm(4), (3, 4)),
        ("GroupNorm", lambda: nn.GroupNorm(2, 4), (3, 4, 3)),
        ("LocalResponseNorm", lambda: nn.LocalResponseNorm(2), (2, 4, 3)),
        ("CrossMapLRN2d", lambda: nn.CrossMapLRN2d(3), (2, 4, 3, 3)),
        ("SyncBatchNorm", lambda: nn.SyncBatchNorm(3).eval(), (4, 3, 2)),
    ),
    **{
        f"{lazy}{kind}{dims}d{' (eval)' if mode == 'eval' else ''}": (
            lambda lazy=lazy, kind=kind, dims=dims, mode=mode: (
                getattr(nn, f"{lazy}{kind}{dims}d")(*([] if lazy else [3]), affine=True).train(mode == "train"),
                (moves(4, 3, *[2] * dims),),
            )
        )
        for lazy, kind, dims, mode in (
            *(("", "BatchNorm", dims, mode) for dims in (1, 2, 3) for mode in ("train", "eval")),
            *(("Lazy", "BatchNorm", dims, "train") for dims in (1, 2, 3)),
            *((lazy, "InstanceNorm", dims, "train") for lazy in ("", "Lazy") for dims in (1, 2, 3)),
        )
    },
    **{
        f"{lazy}Conv{turned}{dims}d": (
            lambda lazy=lazy, turned=turned, dims=dims: (
                getattr(nn, f"{lazy}Conv{turned}{dims}d")(*([] if lazy else [2]), 3, 2, stride=2, padding=1),
                (moves(2, 2, *[4] * dims),),
            )
        )
        for lazy in ("", "Lazy")
        for turned in ("", "Transpose")
        for dims in (1, 2, 3)
    },
    **{
        f"{kind}{dims}d": (
            lambda kind=kind, dims=dims, options=options: (getattr(nn, f"{kind}{dims}d")(*options), (moves(*_POOLED[dims]),))
        )
        for kind, options in (
            ("MaxPool", (2,)),
            ("AvgPool", (2,)),
            ("LPPool", (2, 2)),
            ("AdaptiveAvgPool", (2,)),
            ("AdaptiveMaxPool", (2,)),
            ("FractionalMaxPool", (2, 2)),
        )
        for dims in (1, 2, 3)
        if hasattr(nn, f"{kind}{dims}d")
    },
    **{f"MaxUnpool{dims}d": unpool(dims) for dims in (1, 2, 3)},
    **{
        f"{kind}Pad{dims}d": (
            lambda kind=kind, dims=dims: (
                getattr(nn, f"{kind}Pad{dims}d")(1, *([0.5] if kind == "Constant" else [])),
                (moves(*_POOLED[dims]),),
            )
        )
        for kind in ("Constant", "Zero", "Reflection", "Replication", "Circular")
        for dims in (1, 2, 3)
    },
    **{
        name: (lambda name=name: (getattr(nn, name)(), (moves(3, 4),)))
        for name in (
            *("CELU", "ELU", "GELU", "GLU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU", "LogSigmoid", "Mish"),
            *("PReLU", "RReLU", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink"),
            *("AlphaDropout", "Dropout"),
        )
    },
    **{name: (lambda name=name: (getattr(nn, name)(1), (moves(3, 4),))) for name in ("Softmax", "Softmin", "LogSoftmax")},
    "Softmax2d": lambda: (nn.Softmax2d(), (moves(2, 3, 2, 2),)),
    "Threshold": lambda: (nn.Threshold(0.1, 0.2), (moves(3, 4),)),
    "Dropout1d": lambda: (nn.Dropout1d(), (moves(3, 4, 2),)),
    "Dropout2d": lambda: (nn.Dropout2d(), (moves(3, 4, 2, 2),)),
    "Dropout3d": lambda: (nn.Dropout3d(), (moves(3, 4, 2, 2, 2),)),
    "FeatureAlphaDropout": lambda: (nn.FeatureAlphaDropout(), (moves(3, 4, 2, 2),)),
    "Bilinear": lambda: (nn.Bilinear(3, 2, 4), (moves(5, 3), moves(5, 2))),
    "CosineSimilarity": lambda: (nn.CosineSimilarity(), (moves(5, 3), moves(5, 3))),
    "PairwiseDistance": lambda: (nn.PairwiseDistance(), (moves(5, 3), moves(5, 3))),
    "Embedding": lambda: (nn.Embedding(6, 3), (whole(4, 2),)),
    "Embedding (padding_idx)": lambda: (nn.Embedding(6, 3, padding_idx=1), (whole(4, 2),)),
    "Embedding (scale_grad_by_freq)": lambda: (nn.Embedding(6, 3, scale_grad_by_freq=True), (whole(4, 2),)),
    "Embedding (max_norm)": lambda: (nn.Embedding(6, 3, max_norm=1.0), (whole(4, 2),)),
    **{f"EmbeddingBag ({mode})": (lambda mode=mode: (nn.EmbeddingBag(6, 3, mode=mode), (whole(4, 2),))) for mode in ("sum", "mean", "max")},
    **{
        f"EmbeddingBag ({mode}, offsets, padding_idx)": (
            lambda mode=mode: (nn.EmbeddingBag(6, 3, mode=mode, padding_idx=1), (mixed(), torch.tensor([0, 2, 2, 6])))
        )
        for mode in ("sum", "mean", "max")
    },
    "EmbeddingBag (include_last_offset)": lambda: (
        nn.EmbeddingBag(6, 3, mode="sum", include_last_offset=True),
        (mixed(), torch.tensor([0, 2, 2, 9])),
    ),
    "EmbeddingBag (per_sample_weights)": lambda: (
        nn.EmbeddingBag(6, 3, mode="sum"),
        (mixed(), torch.tensor([0, 2, 5]), moves(9)),
    ),
    "EmbeddingBag (scale_grad_by_freq)": lambda: (
        nn.EmbeddingBag(6, 3, mode="sum", scale_grad_by_freq=True),
        (mixed(), torch.tensor([0, 2, 5])),
    ),
    **some(
        ("RNN", lambda: nn.RNN(4, 3, 2, bidirectional=True), (5, 2, 4)),
        ("RNN (relu)", lambda: nn.RNN(4, 3, nonlinearity="relu"), (5, 2, 4)),
        ("LSTM", lambda: nn.LSTM(4, 3, 2, bidirectional=True), (5, 2, 4)),
        ("LSTM (proj_size)", lambda: nn.LSTM(4, 3, proj_size=2), (5, 2, 4)),
        ("GRU", lambda: nn.GRU(4, 3, 2, bidirectional=True), (5, 2, 4)),
        ("RNN (packed)", lambda: Packed(nn.RNN(4, 3)), (5, 3, 4)),
        ("RNN (packed, relu)", lambda: Packed(nn.RNN(4, 3, nonlinearity="relu")), (5, 3, 4)),
        ("LSTM (packed)", lambda: Packed(nn.LSTM(4, 3, 2, bidirectional=True), ordered=False), (5, 3, 4)),
        ("LSTM (packed, proj_size, batch_first)", lambda: Packed(nn.LSTM(4, 3, proj_size=2, batch_first=True)), (3, 5, 4)),
        ("GRU (packed)", lambda: Packed(nn.GRU(4, 3, 2, bidirectional=True), ordered=False), (5, 3, 4)),
        ("RNNCell", lambda: nn.RNNCell(4, 3), (5, 4)),
        ("LSTMCell", lambda: nn.LSTMCell(4, 3), (5, 4)),
        ("GRUCell", lambda: nn.GRUCell(4, 3), (5, 4)),
        ("TransformerEncoderLayer", lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), (3, 2, 4)),
        ("TransformerEncoder", lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1), 1), (3, 2, 4)),
        ("TransformerEncoder (eval)", lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 1).eval(), (3, 2, 4)),
    ),
    "TransformerDecoderLayer": lambda: (nn.TransformerDecoderLayer(4, 2, 8, dropout=0.0), (moves(3, 2, 4), moves(3, 2, 4))),
    "TransformerDecoder": lambda: (nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8), 1), (moves(3, 2, 4), moves(3, 2, 4))),
    "Transformer": lambda: (Transformed(), (moves(3, 2, 4), moves(3, 2, 4))),
    "MultiheadAttention": lambda: (nn.MultiheadAttention(4, 2), (moves(3, 2, 4), moves(3, 2, 4), moves(3, 2, 4))),
    "weight_norm (parametrization)": lambda: (weight_normed(False), (moves(2, 4, 3),)),
    "weight_norm (parametrization, dim=1)": lambda: (weight_normed(False, 1), (moves(2, 4, 3),)),
    "weight_norm (hook)": lambda: (weight_normed(True), (moves(2, 4, 3),)),
    "weight_norm (hook, dim=None)": lambda: (weight_normed(True, None), (moves(2, 4, 3),)),
    "spectral_norm (parametrization)": lambda: (spectral(False), (moves(5, 4),)),
    "spectral_norm (parametrization, eval)": lambda: (spectral(False).eval(), (moves(5, 4),)),
    "spectral_norm (hook)": lambda: (spectral(True), (moves(5, 4),)),
    "orthogonal (parametrization)": lambda: (parametrizations.orthogonal(nn.Linear(4, 3)), (moves(5, 4),)),
    "orthogonal (parametrization, cayley)": lambda: (parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"), (moves(5, 4),)),
    "orthogonal (parametrization, householder)": lambda: (
        parametrizations.orthogonal(nn.Linear(4, 3), orthogonal_map="householder"),
        (moves(5, 4),),
    ),
    **{
        name: (lambda name=name: (getattr(nn, name)(), (moves(4, 3), still(4, 3))))
        for name in ("L1Loss", "MSELoss", "SmoothL1Loss", "HuberLoss")
    },
    "BCELoss": lambda: (nn.BCELoss(), (moves(4, 3, low=0.1, high=0.9), still(4, 3, low=0.0))),
    "BCEWithLogitsLoss": lambda: (nn.BCEWithLogitsLoss(), (moves(4, 3), still(4, 3, low=0.0))),
    "KLDivLoss": lambda: (nn.KLDivLoss(reduction="batchmean"), (moves(4, 3), still(4, 3, low=0.1))),
    "PoissonNLLLoss": lambda: (nn.PoissonNLLLoss(), (moves(4, 3), still(4, 3, low=0.1))),
    "GaussianNLLLoss": lambda: (nn.GaussianNLLLoss(), (moves(4, 3), still(4, 3), moves(4, 3, low=0.5, high=2.0))),
    "CrossEntropyLoss": lambda: (nn.CrossEntropyLoss(), (moves(4, 3), whole(4, below=3))),
    "LinearCrossEntropyLoss": lambda: (nn.LinearCrossEntropyLoss(4, 3), (moves(5, 4), whole(5, below=3))),
    "NLLLoss": lambda: (nn.NLLLoss(), (moves(4, 3), whole(4, below=3))),
    "NLLLoss2d": lambda: (nn.NLLLoss2d(), (moves(4, 3, 2, 2), whole(4, 2, 2, below=3))),
    "MultiMarginLoss": lambda: (nn.MultiMarginLoss(), (moves(4, 3), whole(4, below=3))),
    "MultiLabelMarginLoss": lambda: (nn.MultiLabelMarginLoss(), (moves(2, 3), torch.tensor([[0, 2, -1], [1, -1, 0]]))),
    "MultiLabelSoftMarginLoss": lambda: (nn.MultiLabelSoftMarginLoss(), (moves(4, 3), still(4, 3, low=0.0).round())),
    "SoftMarginLoss": lambda: (nn.SoftMarginLoss(), (moves(4, 3), signs(4, 3))),
    "HingeEmbeddingLoss": lambda: (nn.HingeEmbeddingLoss(), (moves(4, 3), signs(4, 3))),
    "MarginRankingLoss": lambda: (nn.MarginRankingLoss(0.1), (moves(4), moves(4), signs(4))),
    "CosineEmbeddingLoss": lambda: (nn.CosineEmbeddingLoss(), (moves(4, 3), moves(4, 3), signs(4))),
    "TripletMarginLoss": lambda: (nn.TripletMarginLoss(), (moves(4, 3), moves(4, 3), moves(4, 3))),
    "TripletMarginWithDistanceLoss": lambda: (nn.TripletMarginWithDistanceLoss(), (moves(4, 3), moves(4, 3), moves(4, 3))),
    "AdaptiveLogSoftmaxWithLoss": lambda: (nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4]), (moves(5, 4), whole(5, below=6))),
    "CTCLoss": lambda: (
        lambda x, *rest: nn.CTCLoss()(x.log_softmax(2), *rest),  # its backward pass is that of the two together
        (moves(6, 2, 4), torch.tensor([[1, 2, 2], [3, 1, 1]]), torch.tensor([6, 5]), torch.tensor([3, 2])),
    ),
}

NOTES = {
    "CrossMapLRN2d": "Torch's own backward pass is not the derivative here: `torch.autograd.gradcheck` fails.",
    "EmbeddingBag (scale_grad_by_freq)": (
        "The library divides by each word's own frequency, as documented; torch's backward pass on a CPU divides by that of other words."
    ),
}
CONTAINERS = {"Container", "Module", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "Sequential"} | {
    *("DataParallel", "RNNBase", "RNNCellBase"),  # what others are made of or put in
}


def loss_of(model: nn.Module) -> Tensor:
    """A sum of everything real that a model gives, each number with a weight of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for leaf in torch.utils._pytree.tree_leaves(model()):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            total = total + (leaf * torch.arange(1, leaf.numel() + 1, dtype=leaf.dtype).cos().reshape(leaf.shape)).sum()
    return total


def build(make: Callable[[], Built]) -> nn.Module:
    """The model of an entry, the same at every call."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = Fed(*make())
        with torch.no_grad():
            model()  # lazy layers take their shapes, spectral norms their vectors
    finally:
        torch.set_default_dtype(before)
    return model
