"""`Informed`: directions of low rank that go by the inputs of a layer: its gradient lies in their span, mostly along a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from forwardgrad.directions import Directions
from forwardgrad.factored import Gradient
from forwardgrad.perturbations.base import Perturbation
from forwardgrad.perturbations.layers import Convolution, Embedding, Layer
from forwardgrad.perturbations.low_rank import LowRankUse


@dataclass(frozen=True)
class Informed(Perturbation):
    """The weight matrix of a layer moves at low rank along the directions of its inputs, where alone it can have a gradient.

    Formula: ĝ = d V′ with d = ⟨G, V⟩, V = A (Q T Z)ᵀ/√r and V′ = A (Q T⁻¹ Z)ᵀ/√r. X [N, n] holds the inputs of the layer as rows, one for
    each example and position, and σ₁ … σₛ are its singular values. The columns of Q [n, s] are its singular directions, A [m, r] and
    Z [s, r] have independent entries of mean 0 and variance 1, and T is diagonal. With tᵢ² in proportion to 1/σᵢ the strong directions
    of the input move less and count more.
    Why unbiased: E[⟨G, V⟩V′] = G Q T T⁻¹ Qᵀ = G QQᵀ at every T, and G = ΔᵀX has its rows in the span of the inputs, so G QQᵀ = G.
    Variance: of random signs at rank 1 E‖ĝ‖² = m (Σσᵢ)(Σᵢ ‖G qᵢ‖²/σᵢ). Where the errors Δ have no direction of their own that is m e ‖G‖²,
    with e = (Σσ)²/Σσ² the effective rank of the input, beside mn‖G‖² of `LowRank`. It is at most m ‖Δ‖² (Σσ)², whatever they are. With
    weighted=False T is the identity and the variance that of `LowRank` for m × s numbers: ((1 − 1/r)(ms + 2) + c/r)‖G‖², with c =
    (m + 2)(s + 2) for Gaussian entries, ms for Rademacher ones; s is N, or n where there are more rows than that.
    With `keep` the q leading directions alone are told apart, found by two iterations; all others move alike, by the mean σ² that is left:
    as unbiased, and with weighted=False they do not move, so that the mean is G QQᵀ. What is lost then is at most ‖Δ‖ ‖X(I − QQᵀ)‖.
    An activity that moves has as few numbers (m for each row), and the examples of a batch can be told apart there: where they can,
    `Activity` has less noise. Here they share the direction.
    Cost: as `LowRank`, and a decomposition of X a layer: about 4nN² + 20N³ operations (or with n and N exchanged where n is less), or
    14nNq with `keep`. The basis, s·n or q·n numbers, is kept until the gradient is made.
    Layers: Linear and addmm; convolutions of one and two dimensions without groups, over the patches of their input; Embedding, where the
    tokens that occur move alone. Convolutions with groups or three dimensions move as under `LowRank`; all else is dense.

    Args:
        rank: r ≥ 1.
        keep: q ≥ 1, how many directions of the inputs are told apart; None for all.
        weighted: whether strong directions of the inputs move less and count more.

    Raises ValueError for other values.

    Source: Lin et al., "AGZO: Activation-Guided Zeroth-Order Optimization for LLM Fine-Tuning" (2026), which is keep=q and
    weighted=False under differences of losses. The whole span and the weights, and so an estimate without bias, are worked out here.

    >>> Informed(rank=2).unbiased, Informed(keep=8).unbiased, Informed(keep=8, weighted=False).unbiased
    (True, True, False)
    """

    name: ClassVar[str] = "informed"

    rank: int = 1
    keep: int | None = None
    weighted: bool = True

    def __post_init__(self) -> None:
        for what, value in (("rank", self.rank), ("keep", 1 if self.keep is None else self.keep)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{what} must be a whole number of at least 1, not {value!r}")
        if not isinstance(self.weighted, bool):
            raise ValueError(f"weighted must be True or False, not {self.weighted!r}")

    @property
    def apart(self) -> bool:
        return False

    @property
    def weights(self) -> bool:
        return False  # what another step predicted need not lie in this batch's span

    @property
    def unbiased(self) -> bool:
        return self.keep is None or self.weighted

    def enter(self, layer: Layer, x: Tensor, out: Tensor, directions: Directions) -> InformedUse | None:
        return InformedUse(layer, x, out, directions, self) if layer.matrix else None


class Basis(NamedTuple):
    """Directions of a layer's inputs [n, s], how far each moves [s], and how far what is at right angles to all moves; None: not at all."""

    columns: Tensor
    scale: Tensor | None = None
    rest: Tensor | None = None


class InformedUse(LowRankUse):
    """One use of a layer. `kept` holds what of its inputs is known, or of an embedding which tokens occur [vocabulary]."""

    kind: ClassVar[str] = "weights in the span of the inputs"

    def __init__(self, layer: Layer, x: Tensor, out: Tensor, directions: Directions, how: Informed) -> None:
        moves = "weight" in layer.names and len(directions) > 0
        basis = _basis(layer, x, out, how) if moves and not isinstance(layer, Embedding) else None
        few = basis is not None and basis.rest is None
        super().__init__(layer, x, out, directions, how.rank, basis.columns.shape[1] if few and basis is not None else None)
        if basis is not None:
            self.kept.update({name: part.to(layer.like.dtype) for name, part in basis._asdict().items() if part is not None})
        if moves and isinstance(layer, Embedding):
            seen = torch.zeros(layer.fan_out, dtype=layer.like.dtype, device=x.device).index_fill(0, x.reshape(-1), 1)
            if layer.padding is not None:
                seen[layer.padding] = 0
            self.kept["seen"] = seen

    def factors(self) -> tuple[Tensor, Tensor]:
        return self._factors(self.kept.get("scale"), self.kept.get("rest"))

    def _factors(self, scale: Tensor | None, rest: Tensor | None) -> tuple[Tensor, Tensor]:
        left, right = super().factors()
        if "seen" in self.kept:
            left = left * self.kept["seen"].unsqueeze(1)
        if (columns := self.kept.get("columns")) is None:
            return left, right
        if rest is not None and scale is not None:
            return left, right * rest + columns @ ((scale - rest).unsqueeze(1) * (columns.mT @ right))
        return left, columns @ (right if scale is None else scale.unsqueeze(1) * right)

    def gradient(self, weights: Tensor) -> Mapping[str, Gradient]:
        scale, rest = self.kept.get("scale"), self.kept.get("rest")
        left, right = self._factors(None if scale is None else _inverse(scale), None if rest is None else _inverse(rest))
        return self._summed(left, right, weights.sum(1))

    def gram(self) -> Tensor:
        raise NotImplementedError("what moves and what the derivative is given to are not the same")


def _inverse(scale: Tensor) -> Tensor:
    """1/t, and 0 where nothing moves."""
    return torch.where(scale > 0, 1 / scale, 0)


def _basis(layer: Layer, x: Tensor, out: Tensor, how: Informed) -> Basis | None:
    """What a layer is given, in at least float32; None where directions are those of low rank."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = out.numel() // layer.fan_out
    if not how.weighted and how.keep is None and rows >= layer.fan_in:
        return None
    if isinstance(layer, Convolution):
        if not 0 < len(layer.weight_shape) - 2 < 3 or layer.groups > 1:
            return None
        given = _patches(layer, x.to(wide))
    else:
        given = x.reshape(-1, layer.fan_in).to(wide)
    with torch.autocast(x.device.type, enabled=False):
        if how.keep is None or how.keep >= min(given.shape):
            return _weighed(given) if how.weighted else Basis(_span(given))
        columns = _leading(given, how.keep)
        return _leading_weighed(given, columns) if how.weighted else Basis(columns)


def _patches(layer: Convolution, x: Tensor) -> Tensor:
    """The rows [N, n] that a convolution multiplies its filters with."""
    spatial = len(layer.weight_shape) - 2
    batched: Tensor = x.reshape(-1, *x.shape[-spatial - 1 :])
    flat = spatial == 1  # as an image of one line

    def both(values: Any, still: int) -> tuple[int, ...]:
        return (still, *values) if flat else tuple(values)

    kernel = both(layer.weight_shape[2:], 1)
    options = {"dilation": both(layer.dilation, 1), "padding": both(layer.padding, 0), "stride": both(layer.stride, 1)}
    unfolded: Tensor = F.unfold(batched.unsqueeze(2) if flat else batched, kernel, **options)  # [batch, n, positions]
    rows: Tensor = unfolded.transpose(1, 2).reshape(-1, layer.fan_in)
    return rows


def _span(given: Tensor) -> Tensor:
    """A basis of the rows: orthonormal whatever their rank, so that it holds them all where some are linear in others."""
    basis: Tensor = torch.linalg.qr(given.mT).Q
    return basis


def _leading(given: Tensor, keep: int) -> Tensor:
    """A basis of about the `keep` leading directions of the rows: sums of them with mixed signs, and two iterations towards the largest.

    No random numbers: the same inputs have the same basis.
    """
    count = len(given)
    index = torch.arange(count, device=given.device)
    signs = 1.0 - 2 * (index * 2654435761 >> 13 & 1).to(given.dtype)
    mixed = torch.zeros(keep, given.shape[1], dtype=given.dtype, device=given.device)
    basis: Tensor = torch.linalg.qr(mixed.index_add(0, index % keep, given * signs.unsqueeze(1)).mT).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(given.mT @ (given @ basis)).Q
    return basis


_ITERATIONS = 2
_LEAST = 1e-3  # of the mean square of the inputs: what the rest is taken to hold where rounding hides it


def _weighed(given: Tensor) -> Basis:
    """The singular directions of the rows, each with the root of its weight Σσ/(sσ); those that hold nothing do not move."""
    tall = len(given) > given.shape[1]
    found = torch.linalg.qr(given if tall else given.mT)
    left, sizes, right = torch.linalg.svd(found.R)  # of a matrix no larger than rows or columns
    columns = right.mT if tall else found.Q @ left
    counts = sizes > max(given.shape) * torch.finfo(given.dtype).eps * sizes[0]
    mean = sizes.sum() / counts.sum().clamp_min(1)
    return Basis(_signed(columns), torch.where(counts, (mean / torch.where(counts, sizes, 1.0)).sqrt(), 0))


def _leading_weighed(given: Tensor, columns: Tensor) -> Basis:
    """The leading directions, told apart, and one weight for all the others."""
    among = given @ columns
    squares, turn = torch.linalg.eigh(among.mT @ among)
    total = given.square().sum()
    floor = _LEAST**2 * total / given.shape[1] + torch.finfo(given.dtype).tiny  # a batch of zeros has no direction
    left = (total - squares.sum()) / (given.shape[1] - columns.shape[1])
    sizes, rest = squares.maximum(floor).sqrt(), left.maximum(floor).sqrt()
    mean = (sizes.sum() + rest * (given.shape[1] - columns.shape[1])) / given.shape[1]
    return Basis(_signed(columns @ turn), (mean / sizes).sqrt(), (mean / rest).sqrt())


def _signed(columns: Tensor) -> Tensor:
    """Singular directions with a sign of their own: which of the two a decomposition finds changes with the last bit of its input."""
    index = torch.arange(len(columns), device=columns.device, dtype=columns.dtype)
    along = columns.mT @ torch.cos(index * index + 1)  # a fixed vector at right angles to nothing in particular
    return columns * torch.where(along < 0, -1, 1).to(columns.dtype)
