"""Whether directions are independent, told from nothing but estimates: an estimator does not show the directions that it draws.

What an estimate ĝ shows of a direction v is its line: of one tangent ĝ = (∇f·v) v, so two parameters that share v have parallel
estimates, ĝ₁ ∥ ĝ₂, whatever ∇f is. Three tests look at the noise e = ĝ − mean of up to SHOWN estimates, on up to 2·WIDTH weights of each
parameter (the first WIDTH, by which tensors of different shapes that were filled from one seed are compared, and as many spread over all).

- Between parameters: the mean over estimates of the cosine of e₁ and e₂. Independent directions do not make it zero, since both are
  multiplied by the same ∇f·v: it is at most 1/3 (two single weights of equal gradient) and about 1/(2n) for n weights. One shared
  direction makes it 1. Weight and bias of one layer share noise by right where activities move; a pair of one module counts only where
  the estimates are parallel and the exact gradients are not.
- Between steps: estimates that follow one another must be no closer (cos²) than others. And if the last half of them brings no line that
  the first half did not span, all that the estimator can say lies in that span, so the gradient has to: where it does not, a few
  directions come again and again. This second test has no false alarms but by rounding, and no blind spot for one fixed direction.
- Between tangents of one step: the mean of 2dₖdₗ/(dₖ² + dₗ²) of their derivatives: 0, or 1 where the two are the same.

A mean of M estimates is a fault where it is above its limit by z·s/√M with s the spread of the cosines, no less than that of cosines
between different estimates, in which nothing can be shared; z is that of a bound for bounded variables, at LEVEL over all comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from forwardgrad.diagnostics.checks.findings import Finding, listed
from forwardgrad.diagnostics.checks.subject import Gradients, Subject

SHOWN, WIDTH = 128, 128
LEVEL = 1e-4  # false alarms of each test, all parameters together
_SHARED = 1 / 3  # the largest cosine of noise that independent directions have
_ALIKE, _APART = 0.98, 0.9  # cosines of noise and of exact gradients, for pairs of one module
_CLOSER = 0.25  # cos² of neighbours above that of others
_OUTSIDE = 0.1  # the part of a gradient that no estimate can reach, relative to its norm
_REDRAWN = "draw new numbers for every parameter, tangent and step from the one generator that is given"


class DirectionTests:
    """What is kept of the first estimates to tell how their directions depend on one another."""

    def __init__(self, subject: Subject, exact: Gradients | None) -> None:
        self._subject, self._names = subject, list(subject.objective.parameters)
        self._picks = {p.numel(): _pick(p.numel()) for p in subject.objective.parameters.values()}
        self._exact = None if exact is None else self._sketch(exact)
        self._rows: list[list[Tensor]] = []
        self._derivatives: list[Tensor] = []
        self._given = dict.fromkeys(self._names, 0)

    def add(self, derivatives: Tensor, estimate: Gradients) -> None:
        self._derivatives.append(derivatives.detach().double().cpu())
        for name in self._names:
            self._given[name] += (g := estimate[name]) is not None and bool(g.any())
        if len(self._rows) < SHOWN:
            self._rows.append(self._sketch(estimate))

    def _sketch(self, estimate: Gradients) -> list[Tensor]:
        rows = []
        for name, p in self._subject.objective.parameters.items():
            g, pick = estimate[name], self._picks[p.numel()]
            rows.append(
                torch.zeros(len(pick), dtype=torch.float64) if g is None else g.detach().reshape(-1)[pick.to(g.device)].double().cpu()
            )
        return rows

    def findings(self) -> Iterator[Finding]:
        raw = [torch.stack(rows) for rows in zip(*self._rows, strict=True)]
        noise = [r - r.mean(dim=0) for r in raw]
        tolerance = self._subject.tolerance
        noise = [torch.where(e.norm() > tolerance * r.norm(), e, 0.0) for e, r in zip(noise, raw, strict=True)]
        yield from self._missing()
        if not any(e.any() for e in noise):
            yield self._still()
            return
        yield self._between_parameters(noise)
        yield self._between_steps(raw)
        yield from self._between_tangents()

    def _name(self, index: int) -> str:
        return self._subject.name(self._names[index])

    def _missing(self) -> Iterator[Finding]:
        """Parameters that never get an estimate though the loss depends on them, where others always do."""
        if self._exact is None:
            return
        always = max(self._given.values()) == len(self._derivatives)
        trained = [i for i, g in enumerate(self._exact) if g.any()]
        lost = [self._name(i) for i in trained if not self._given[self._names[i]]]
        if lost and always:
            unbiased, one = self._subject.estimator.unbiased, len(lost) == 1
            found = f"{listed(lost)} never get{'s' * one} an estimate, and the loss depends on {'it' if one else 'them'}"
            yield Finding("missing", "fault" if unbiased else "note", found, "see to it that every trained parameter is moved" * unbiased)

    def _still(self) -> Finding:
        """Estimates without noise: the exact gradient, an estimator that draws nothing, or one whose draws never change."""
        name, subject = "between steps", self._subject
        away = self._exact is not None and _apart(self._rows[0], self._exact) > subject.tolerance
        if not away:
            return Finding(name, "ok", "every estimate is the same, the exact gradient: there is nothing to be independent")
        if subject.estimator.unbiased:
            return Finding(
                name, "fault", "every step gives the same estimate, and it is not the gradient: its directions never change", _REDRAWN
            )
        return Finding(
            name, "note", "every step gives the same estimate: right if the estimator draws nothing, wrong if it draws directions"
        )

    def _between_parameters(self, noise: list[Tensor]) -> Finding:
        """Parameters of one size are compared by all that is kept of them, others by their first weights, as many as both have."""
        name, everyone = "between parameters", range(len(noise))
        pairs = len(noise) * (len(noise) - 1) // 2
        shared: list[tuple[float, int, int]] = []
        for size in {self._size(i) for i in everyone}:
            members = [i for i in everyone if self._size(i) == size]
            shared += self._parallel(noise, members, None, pairs)
        for size in {min(WIDTH, self._size(i)) for i in everyone}:
            members = [i for i in everyone if self._size(i) >= size]
            shared += self._parallel(noise, members, size, pairs)
        if shared:
            found = [f"{listed([self._name(i) for i in sorted(group)])} (cosine {t:.2f})" for t, group in _groups(shared)]
            return Finding(name, "fault", f"one direction is shared by {'; by '.join(found[:5])}", _REDRAWN)
        return Finding(name, "ok", f"{len(noise):,} parameters share no direction" if pairs else "there is one parameter")

    def _parallel(self, noise: list[Tensor], members: list[int], cut: int | None, pairs: int) -> Iterator[tuple[float, int, int]]:
        """The pairs of these parameters whose noise, cut to so many weights where sizes differ, is parallel."""
        units = torch.stack([torch.nn.functional.normalize(noise[i][:, :cut], dim=1) for i in members])  # [parameters, estimates, weights]
        count = units.shape[1]
        squares = torch.einsum("prv,prw->pvw", units, units).flatten(1)
        for p, i in enumerate(members[:-1]):
            rest = slice(p + 1, None)
            cosines = (units[rest] * units[p]).sum(dim=2)
            mean, spread = cosines.mean(dim=1).abs(), cosines.std(dim=1)
            across = (squares[rest] @ squares[p] - cosines.square().sum(dim=1)).clamp(min=0) / (count * (count - 1))
            far = mean > _SHARED + _bound(pairs) * torch.maximum(spread, across.sqrt()) / math.sqrt(count)
            for q in far.nonzero().flatten().tolist():
                j, cosine = members[p + 1 + q], float(mean[q])
                sizes = self._size(i), self._size(j)
                fits = cut is None or (sizes[0] != sizes[1] and min(WIDTH, *sizes) == cut)
                if fits and not self._by_right(i, j, cosine):
                    yield cosine, i, j

    def _size(self, index: int) -> int:
        return self._subject.objective.parameters[self._names[index]].numel()

    def _by_right(self, i: int, j: int, cosine: float) -> bool:
        """Whether two parameters of one module may share this much: weight and bias see the same moves of an activity."""
        one, other = self._names[i], self._names[j]
        if one.rpartition(".")[0] != other.rpartition(".")[0]:
            return False
        if cosine < _ALIKE or self._exact is None:
            return True
        size = min(len(self._exact[i]), len(self._exact[j]))
        return abs(float(torch.cosine_similarity(self._exact[i][:size], self._exact[j][:size], dim=0))) > _APART

    def _between_steps(self, raw: list[Tensor]) -> Finding:
        name, closer, again = "between steps", [], []
        for i, estimates in enumerate(raw):
            if self._size(i) == 1:
                continue  # a single weight has one line
            if _neighbours(estimates, len(raw)):
                closer.append(self._name(i))
            elif (
                self._exact is not None
                and self._subject.estimator.unbiased
                and _confined(estimates, self._exact[i], self._subject.tolerance)
            ):
                again.append(self._name(i))
        if again:
            return Finding(name, "fault", f"the directions of {listed(again)} come again and never span the gradient", _REDRAWN)
        if closer:
            return Finding(name, "fault", f"estimates of {listed(closer)} that follow one another are closer than others", _REDRAWN)
        return Finding(name, "ok", f"{len(self._rows)} steps have directions of their own")

    def _between_tangents(self) -> Iterator[Finding]:
        d = torch.stack(self._derivatives)
        if d.shape[1] < 2:
            return
        d = d - d.mean(dim=0)
        count, tangents = d.shape
        pairs = tangents * (tangents - 1) // 2
        means, spreads = torch.zeros(2, tangents, tangents, dtype=torch.float64)
        for k in range(tangents - 1):
            rest = slice(k + 1, None)
            same, other = (_alike(d[:, k : k + 1], second[:, rest]) for second in (d, d.roll(1, 0)))
            means[k, rest] = same.mean(dim=0)
            spreads[k, rest] = torch.maximum(same.std(dim=0), other.square().mean(dim=0).sqrt())
        far = means.abs() > _SHARED + _bound(pairs) * spreads / math.sqrt(count)
        if bool(far.any()):
            found = [f"{k + 1} and {j + 1}" for k, j in far.nonzero().tolist()]
            yield Finding("between tangents", "fault", f"tangents {listed(found)} of a step have the same derivative", _REDRAWN)
        else:
            yield Finding("between tangents", "ok", f"{tangents} tangents have derivatives of their own")


def _pick(count: int) -> Tensor:
    """Which weights of a parameter are kept: the first, and as many spread over all; the same for all parameters of a size."""
    if count <= 2 * WIDTH:
        return torch.arange(count)
    return torch.cat([torch.arange(WIDTH), torch.linspace(WIDTH, count - 1, WIDTH, dtype=torch.float64).long()])


def _groups(pairs: Sequence[tuple[float, int, int]]) -> list[tuple[float, set[int]]]:
    """Parameters that hang together by pairs, each group with its smallest cosine."""
    groups: list[tuple[float, set[int]]] = []
    for cosine, i, j in pairs:
        touched = [group for group in groups if group[1] & {i, j}]
        groups = [group for group in groups if group not in touched]
        groups.append((min([cosine, *(t for t, _ in touched)]), {i, j}.union(*(members for _, members in touched))))
    return sorted(groups, key=lambda group: min(group[1]))


def _bound(comparisons: int) -> float:
    """Standard deviations that a mean of bounded variables stays within, in all comparisons but for LEVEL."""
    return math.sqrt(2 * math.log(2 * max(1, comparisons) / LEVEL))


def _alike(one: Tensor, other: Tensor) -> Tensor:
    size = one.square() + other.square()
    return torch.where(size > 0, 2 * one * other / size, 0.0)


def _apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    whole = torch.cat(list(other))
    return float((torch.cat(list(one)) - whole).norm() / whole.norm())


def _neighbours(estimates: Tensor, parameters: int) -> bool:
    """Whether estimates that follow one another are closer than others are."""
    units = torch.nn.functional.normalize(estimates, dim=1)
    squares = (units @ units.T).square()
    count = len(squares)
    near = squares.diagonal(1)
    far = squares[torch.ones_like(squares, dtype=torch.bool).triu(2)]
    excess = float(near.mean() - far.mean())
    return excess > _CLOSER and excess * math.sqrt(count - 1) > _bound(parameters) * max(0.1, float(far.std()))


def _confined(estimates: Tensor, exact: Tensor, tolerance: float) -> bool:
    """Whether the later estimates lie in the span of the earlier ones, and the exact gradient does not."""
    size = estimates.norm(dim=1, keepdim=True)
    first, last = (part[part.any(dim=1)] for part in torch.where(size > 1e-3 * size.max(), estimates / size, 0.0).tensor_split(2))
    if min(len(first), len(last)) < 4 or not exact.any():
        return False
    _, singular, lines = torch.linalg.svd(first, full_matrices=False)
    lines = lines[singular > tolerance * singular[0]]
    inside = all(float((row - lines.T @ (lines @ row)).norm()) <= 10 * tolerance for row in last)
    return inside and float((exact - lines.T @ (lines @ exact)).norm()) > max(_OUTSIDE, 10 * tolerance) * float(exact.norm())
