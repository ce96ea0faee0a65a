"""The functions of torch.nn.functional that `support.py` checks, as `support_layers` has the layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from support_layers import Built, moves, signs, still, whole
from torch import nn

_ONE = (
    *("alpha_dropout", "celu", "dropout", "elu", "gelu", "glu", "gumbel_softmax", "hardshrink", "hardsigmoid", "hardswish", "hardtanh"),
    *("leaky_relu", "logsigmoid", "mish", "normalize", "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "softplus", "softshrink"),
    *("softsign", "tanh", "tanhshrink", "pdist"),
)
_POOLED = {1: (2, 3, 8), 2: (2, 3, 6, 6), 3: (1, 2, 4, 4, 4)}
_AFFINE = torch.tensor([[[1.0, 0.1, 0.0], [0.0, 0.9, 0.1]]], dtype=torch.float64)


def _function(name: str) -> Callable[..., object]:
    return getattr(F, name)  # type: ignore[no-any-return]


def sampled(mode: str, *shape: int, padding: str = "zeros") -> Callable[[], Built]:
    """The grid moves too; its points lie off the kinks."""
    dims = len(shape) - 2
    function = partial(F.grid_sample, mode=mode, padding_mode=padding, align_corners=False)
    return lambda: (function, (moves(*shape), moves(shape[0], *[2] * dims, dims, low=-0.9, high=0.9)))


def bag(mode: str) -> Callable[[], Built]:
    function = partial(F.embedding_bag, mode=mode, padding_idx=2)
    return lambda: (lambda indices, weight, offsets: function(indices, weight, offsets), (whole(7), moves(5, 3), torch.tensor([0, 3, 3])))


FUNCTIONS: dict[str, Callable[[], Built]] = {
    **{name: (lambda name=name: (_function(name), (moves(3, 4),))) for name in _ONE},
    **{
        name: (lambda name=name: (lambda x: _function(name)(x.clone()), (moves(3, 4),)))
        for name in ("celu_", "elu_", "hardtanh_", "leaky_relu_", "relu_", "rrelu_", "selu_")
    },
    **{name: (lambda name=name: (partial(_function(name), dim=1), (moves(3, 4),))) for name in ("softmax", "softmin", "log_softmax")},
    "threshold": lambda: (lambda x: F.threshold(x, 0.1, 0.2), (moves(3, 4),)),
    "threshold_": lambda: (lambda x: F.threshold_(x.clone(), 0.1, 0.2), (moves(3, 4),)),
    "prelu": lambda: (F.prelu, (moves(3, 4), moves(4))),
    "dropout1d": lambda: (F.dropout1d, (moves(3, 4, 2),)),
    "dropout2d": lambda: (F.dropout2d, (moves(3, 4, 2, 2),)),
    "dropout3d": lambda: (F.dropout3d, (moves(3, 4, 2, 2, 2),)),
    "feature_alpha_dropout": lambda: (partial(F.feature_alpha_dropout, training=True), (moves(3, 4, 2, 2),)),
    "linear": lambda: (F.linear, (moves(5, 4), moves(3, 4), moves(3))),
    "bilinear": lambda: (F.bilinear, (moves(5, 3), moves(5, 2), moves(4, 3, 2), moves(4))),
    **{
        f"conv{dims}d": (lambda dims=dims: (_function(f"conv{dims}d"), (moves(2, 2, *[4] * dims), moves(3, 2, *[2] * dims), moves(3))))
        for dims in (1, 2, 3)
    },
    **{
        f"conv_transpose{dims}d": (
            lambda dims=dims: (_function(f"conv_transpose{dims}d"), (moves(2, 2, *[3] * dims), moves(2, 3, *[2] * dims), moves(3)))
        )
        for dims in (1, 2, 3)
    },
    "conv_tbc": lambda: (F.conv_tbc, (moves(5, 2, 3), moves(2, 3, 4), moves(4))),
    **{
        f"{kind}_pool{dims}d": (
            lambda kind=kind, dims=dims, options=options: (partial(_function(f"{kind}_pool{dims}d"), **options), (moves(*_POOLED[dims]),))
        )
        for kind, options in (
            ("max", {"kernel_size": 2}),
            ("avg", {"kernel_size": 2}),
            ("lp", {"norm_type": 2, "kernel_size": 2}),
            ("adaptive_avg", {"output_size": 2}),
            ("adaptive_max", {"output_size": 2}),
            ("fractional_max", {"kernel_size": 2, "output_size": 2}),
        )
        for dims in (1, 2, 3)
        if hasattr(F, f"{kind}_pool{dims}d")
    },
    **{
        f"{kind}_pool{dims}d_with_indices": (
            lambda kind=kind, dims=dims, options=options: (
                partial(_function(f"{kind}_pool{dims}d_with_indices"), **options),
                (moves(*_POOLED[dims]),),
            )
        )
        for kind, options in (
            ("max", {"kernel_size": 2}),
            ("adaptive_max", {"output_size": 2}),
            ("fractional_max", {"kernel_size": 2, "output_size": 2}),
        )
        for dims in (1, 2, 3)
        if hasattr(F, f"{kind}_pool{dims}d_with_indices")
    },
    **{
        f"max_unpool{dims}d": (
            lambda dims=dims: (
                lambda x: _function(f"max_unpool{dims}d")(*_function(f"max_pool{dims}d")(x, 2, return_indices=True), 2),
                (moves(2, 2, *[4] * dims),),
            )
        )
        for dims in (1, 2, 3)
    },
    **{
        f"pad ({mode})": (lambda mode=mode: (partial(F.pad, pad=(1, 1), mode=mode), (moves(2, 3, 4),)))
        for mode in ("constant", "reflect", "replicate", "circular")
    },
    **{
        f"interpolate ({mode})": (
            lambda mode=mode, dims=dims: (partial(F.interpolate, scale_factor=2, mode=mode), (moves(2, 2, *[3] * dims),))
        )
        for mode, dims in (
            ("nearest", 2),
            ("nearest-exact", 2),
            ("area", 2),
            ("linear", 1),
            ("bilinear", 2),
            ("bicubic", 2),
            ("trilinear", 3),
        )
    },
    **{
        f"interpolate ({mode}, antialias)": (
            lambda mode=mode: (partial(F.interpolate, size=(2, 3), mode=mode, antialias=True), (moves(2, 2, 4, 4),))
        )
        for mode in ("bilinear", "bicubic")
    },
    "upsample": lambda: (partial(F.upsample, scale_factor=2), (moves(2, 2, 3, 3),)),
    "upsample_nearest": lambda: (partial(F.upsample_nearest, scale_factor=2), (moves(2, 2, 3, 3),)),
    "upsample_bilinear": lambda: (partial(F.upsample_bilinear, scale_factor=2), (moves(2, 2, 3, 3),)),
    "pixel_shuffle": lambda: (partial(F.pixel_shuffle, upscale_factor=2), (moves(2, 4, 3, 3),)),
    "pixel_unshuffle": lambda: (partial(F.pixel_unshuffle, downscale_factor=2), (moves(2, 2, 4, 4),)),
    "channel_shuffle": lambda: (lambda x: F.channel_shuffle(x, 2), (moves(2, 4, 3, 3),)),
    "fold": lambda: (partial(F.fold, output_size=(4, 4), kernel_size=2), (moves(2, 8, 9),)),
    "unfold": lambda: (partial(F.unfold, kernel_size=2), (moves(2, 2, 4, 4),)),
    "affine_grid": lambda: (partial(F.affine_grid, size=(1, 2, 3, 3), align_corners=False), (moves(1, 2, 3),)),
    "grid_sample (bilinear)": sampled("bilinear", 2, 2, 4, 4),
    "grid_sample (bilinear, border)": sampled("bilinear", 2, 2, 4, 4, padding="border"),
    "grid_sample (bilinear, reflection)": sampled("bilinear", 2, 2, 4, 4, padding="reflection"),
    "grid_sample (nearest)": sampled("nearest", 2, 2, 4, 4),
    "grid_sample (bicubic)": sampled("bicubic", 2, 2, 4, 4),
    "grid_sample (bilinear, 3d)": sampled("bilinear", 1, 2, 3, 3, 3),
    "batch_norm": lambda: (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), (moves(5, 3), moves(3), moves(3))),
    "instance_norm": lambda: (F.instance_norm, (moves(2, 3, 4),)),
    "layer_norm": lambda: (lambda x, w, b: F.layer_norm(x, (4,), w, b), (moves(3, 4), moves(4), moves(4))),
    "rms_norm": lambda: (lambda x, w: F.rms_norm(x, (4,), w), (moves(3, 4), moves(4))),
    "group_norm": lambda: (lambda x, w, b: F.group_norm(x, 2, w, b), (moves(3, 4, 2), moves(4), moves(4))),
    "local_response_norm": lambda: (partial(F.local_response_norm, size=2), (moves(2, 4, 3),)),
    "cosine_similarity": lambda: (F.cosine_similarity, (moves(5, 3), moves(5, 3))),
    "pairwise_distance": lambda: (F.pairwise_distance, (moves(5, 3), moves(5, 3))),
    "embedding": lambda: (F.embedding, (whole(4, 2), moves(5, 3))),
    "embedding (padding_idx)": lambda: (partial(F.embedding, padding_idx=1), (torch.tensor([[1, 0], [2, 1]]), moves(5, 3))),
    **{f"embedding_bag ({mode})": bag(mode) for mode in ("sum", "mean", "max")},
    "one_hot": lambda: (lambda x: F.one_hot(torch.tensor([0, 2, 1])).double() * x, (moves(3, 3),)),
    "scaled_dot_product_attention": lambda: (F.scaled_dot_product_attention, (moves(2, 3, 4), moves(2, 3, 4), moves(2, 3, 4))),
    "multi_head_attention_forward": lambda: (
        lambda q, w, b, u: F.multi_head_attention_forward(q, q, q, 4, 2, w, b, None, None, False, 0.0, u, None),
        (moves(3, 2, 4), moves(12, 4), moves(12), moves(4, 4)),
    ),
    **{
        name: (lambda name=name: (_function(name), (moves(4, 3), still(4, 3))))
        for name in ("l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss")
    },
    "binary_cross_entropy": lambda: (F.binary_cross_entropy, (moves(4, 3, low=0.1, high=0.9), still(4, 3, low=0.0))),
    "binary_cross_entropy_with_logits": lambda: (F.binary_cross_entropy_with_logits, (moves(4, 3), still(4, 3, low=0.0))),
    "kl_div": lambda: (partial(F.kl_div, reduction="sum"), (moves(4, 3), still(4, 3, low=0.1))),
    "poisson_nll_loss": lambda: (F.poisson_nll_loss, (moves(4, 3), still(4, 3, low=0.1))),
    "gaussian_nll_loss": lambda: (F.gaussian_nll_loss, (moves(4, 3), still(4, 3), moves(4, 3, low=0.5, high=2.0))),
    "cross_entropy": lambda: (F.cross_entropy, (moves(4, 3), whole(4, below=3))),
    "linear_cross_entropy": lambda: (F.linear_cross_entropy, (moves(5, 4), moves(3, 4), whole(5, below=3))),
    "linear_cross_entropy (options)": lambda: (
        partial(F.linear_cross_entropy, options=nn.LinearCrossEntropyOptions()),
        (moves(5, 4), moves(3, 4), whole(5, below=3)),
    ),
    "nll_loss": lambda: (F.nll_loss, (moves(4, 3), whole(4, below=3))),
    "multi_margin_loss": lambda: (F.multi_margin_loss, (moves(4, 3), whole(4, below=3))),
    "multilabel_margin_loss": lambda: (F.multilabel_margin_loss, (moves(2, 3), torch.tensor([[0, 2, -1], [1, -1, 0]]))),
    "multilabel_soft_margin_loss": lambda: (F.multilabel_soft_margin_loss, (moves(4, 3), still(4, 3, low=0.0).round())),
    "soft_margin_loss": lambda: (F.soft_margin_loss, (moves(4, 3), signs(4, 3))),
    "hinge_embedding_loss": lambda: (F.hinge_embedding_loss, (moves(4, 3), signs(4, 3))),
    "margin_ranking_loss": lambda: (F.margin_ranking_loss, (moves(4), moves(4), signs(4))),
    "cosine_embedding_loss": lambda: (F.cosine_embedding_loss, (moves(4, 3), moves(4, 3), signs(4))),
    "triplet_margin_loss": lambda: (F.triplet_margin_loss, (moves(4, 3), moves(4, 3), moves(4, 3))),
    "triplet_margin_with_distance_loss": lambda: (F.triplet_margin_with_distance_loss, (moves(4, 3), moves(4, 3), moves(4, 3))),
    "ctc_loss": lambda: (
        lambda x: F.ctc_loss(x.log_softmax(2), torch.tensor([[1, 2, 2], [3, 1, 1]]), torch.tensor([6, 5]), torch.tensor([3, 2])),
        (moves(6, 2, 4),),
    ),
    "cdist (p=2)": lambda: (torch.cdist, (moves(5, 3), moves(4, 3))),
    "cdist (p=1)": lambda: (partial(torch.cdist, p=1.0), (moves(2, 5, 3), moves(2, 4, 3))),
    "cdist (p=3)": lambda: (partial(torch.cdist, p=3.0), (moves(5, 3), moves(4, 3))),
    "cdist (p=inf)": lambda: (partial(torch.cdist, p=float("inf")), (moves(5, 3), moves(4, 3))),
    "pdist (p=1)": lambda: (partial(F.pdist, p=1.0), (moves(5, 3),)),
}
OTHER = {  # tools for types and checks; products of 8 and 16 bits, which have no float64
    *("grouped_mm", "scaled_grouped_mm", "scaled_mm"),
    *("assert_int_or_pair", "boolean_dispatch", "handle_torch_function", "has_torch_function", "has_torch_function_unary"),
    *("has_torch_function_variadic", "native_channel_shuffle"),  # the last has no derivative in torch at all
}
