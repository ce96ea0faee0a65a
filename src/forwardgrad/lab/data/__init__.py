"""The data sets: downloads, checks and reads them, and divides them into training, validation and test.

In: a name and a folder. Out: tensors.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
