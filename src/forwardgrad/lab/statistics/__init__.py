"""Estimates, intervals, tests and budgets, from numbers alone: knows no files.

In: numbers. Out: numbers with intervals. Loads without torch.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
