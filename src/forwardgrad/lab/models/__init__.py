"""The networks by name: those of the paper, larger ones with batch norm and shortcuts, and transformers, one of them pretrained.

In: a name, the shape of an input and the number of classes. Out: a module with its weights at their start.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
