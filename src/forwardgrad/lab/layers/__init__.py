"""What each layer of a trained network holds, and how an estimate of its gradient lies beside backpropagation's.

In: stored runs with their final weights. Out: a record of numbers with intervals, which is also stored. Nothing is printed here.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
