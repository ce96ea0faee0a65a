"""A study carried out: every arm tuned on validation data, its winner trained on fresh seeds, and what that will cost.

In: a study and a function that trains runs. Out: a record of which run was what.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
