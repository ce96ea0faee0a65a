"""Runs as folders: what was asked, where it ran, how it went and what came of it, each file written whole or not at all.

In: results and records of runs. Out: the same, checked: as studies, as one table, or as how far they are. Loads without torch.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
