"""How good an estimate is: bias, variance, angle, memory, and which way its derivatives went.

In: a loss, a model and an estimator. Out: numbers with intervals, which print as a table.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
