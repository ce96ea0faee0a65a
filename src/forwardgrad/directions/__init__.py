"""Random directions: the laws they are drawn from, where each of them comes from in a step, and the plan of a step's random numbers.

In: shapes and a `torch.Generator`. Out: tensors of mean 0 and covariance I, the same for the same seed whatever else is drawn.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
