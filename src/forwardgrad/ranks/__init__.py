"""Several processes that train one model: what they tell one another in a step, and how they see that their parameters are still equal.

In: what each process of a torch.distributed group finds out. Out: the same numbers in each of them. Where directions follow from a seed
that all share, these are a few numbers a step, and no gradient is sent.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
