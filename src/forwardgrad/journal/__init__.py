"""The journal of a training run: the numbers that each step was taken by, as a file that is appended to, read back and checked.

In: plain values, numbers as small tensors, bytes. Out: the same, step by step. What a step is, and how one is taken again, is said
elsewhere (`estimators`, `engines`, `replaying`). Nothing of the file is ever run: it is JSON and numbers.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
