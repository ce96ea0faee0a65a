"""Whether fresh runs bear out a claimed mean. Knows nothing of files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

FALSE_ALARM = 0.05  # of true claims, that are refused


@dataclass(frozen=True)
class Replication:
    """A claimed mean over `of` runs beside the mean of n fresh ones: `tolerance` is how far above it a true claim may lie."""

    claimed: float
    of: int
    found: float
    n: int
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the claim lies no further above the fresh mean than chance explains."""
        return self.claimed - self.found <= self.tolerance


def replication(claimed: float, of: int, fresh: Sequence[float], slack: float = 0.0) -> Replication:
    """Test a claim that the mean of m runs was `claimed` (the higher the better) against n fresh runs.

    Formula: the claim is refused where claimed − x̄ > t·s·√(1/n + 1/m) + slack, with x̄ and s the mean and the standard deviation of the
    fresh runs and t the 95 % quantile of Student's t with n − 1 degrees of freedom. s is that of the fresh runs alone, so that figures that
    were made up to scatter widely win nothing.
    False alarms: 5 % of true claims, if runs are normal and independent; fewer with `slack`, the grain in which figures are counted.
    Limits: at least two fresh runs, all finite; else ValueError.

    Source: the prediction interval for a mean of future observations (Hahn and Meeker 1991, 4.7), turned round.

    >>> replication(0.95, 3, [0.80, 0.81, 0.82]).holds, replication(0.82, 3, [0.80, 0.81, 0.82]).holds
    (False, True)
    """
    if len(fresh) < 2 or of < 1 or not all(map(math.isfinite, (claimed, *fresh))):
        raise ValueError(f"a claim is tested against two fresh runs or more, all finite, not {list(fresh)}")
    n = len(fresh)
    t, spread = float(stdtrit(n - 1, 1 - FALSE_ALARM)), float(np.std(fresh, ddof=1))
    return Replication(claimed, of, float(np.mean(fresh)), n, t * spread * math.sqrt(1 / n + 1 / of) + slack)
