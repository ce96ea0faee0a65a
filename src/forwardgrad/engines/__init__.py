"""Ways to take a whole step: as it is written, compiled, or as a captured CUDA graph.

In: a loss, a model, an optimizer, an estimator and a batch. Out: the record of the step; the model has moved.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
