"""Records: the best that training without a backward pass has reached on fixed tasks, claims to a better one, and their verification.

In: finished runs, or the file of a claim. Out: a claim, a verdict on one, and the table of records. Lists load without torch.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
