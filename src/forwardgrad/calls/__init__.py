"""The watch over a model's calls: it puts perturbations in at the layers, and finds out where the examples of a batch lie.

In: an objective and a perturbation. Out: a `Pass`: what moved, and by how much the loss followed, example by example.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
