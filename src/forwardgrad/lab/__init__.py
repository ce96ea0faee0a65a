"""The laboratory: fair comparisons of ways to train, from a description to a page.

Its face: what a file with a study of your own imports. All of it loads without torch.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
