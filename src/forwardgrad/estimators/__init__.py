"""Estimators of a gradient, one method a file.

In: an objective, a generator and what the estimator remembers. Out: an `Estimate`, and a gradient for every trained parameter.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
