"""The data sets: downloaded, checked, read without pickle, divided into training, validation and test.

In: a name and a folder. Out: tensors.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
