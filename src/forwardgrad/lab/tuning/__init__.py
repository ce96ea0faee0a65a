"""Carries a study out: tunes every arm on validation data, trains its winner on fresh seeds. Counts beforehand what that costs.

In: a study and a function that trains runs. Out: a record of which run was what.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
