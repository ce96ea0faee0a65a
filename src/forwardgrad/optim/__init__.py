"""What torch.optim lacks: Nesterov's true look-ahead, momentum and Adam from seeds and numbers, and a cap on how far a step goes.

In: parameters with gradients from whatever estimator, or the recipes of estimates. Out: the parameters, moved.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
