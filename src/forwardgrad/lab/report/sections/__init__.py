"""The parts of a report, one file each.

In: stored results. Out: sections made of blocks. Loads without torch.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
