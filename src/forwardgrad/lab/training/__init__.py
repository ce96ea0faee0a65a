"""One run from its description to its result: parts made, the loop, evaluations, checkpoints.

In: a `Run` and a store. Out: a result in the store, the same bits whether or not it was interrupted.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
