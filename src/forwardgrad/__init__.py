"""Train PyTorch models without a backward pass: gradient estimators that fill ``p.grad`` from forward-mode derivatives.

Names are resolved on first use, so that importing the package (as the command line does) does not import torch.
"""

from forwardgrad._lazy import attach

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = attach(__name__, __file__)
__all__ += ["__version__"]
