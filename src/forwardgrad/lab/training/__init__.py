"""Trains one run, from its description to its result.

In: a `Run` and a store. Out: a result in the store, with the same bits whether or not the run was interrupted.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
