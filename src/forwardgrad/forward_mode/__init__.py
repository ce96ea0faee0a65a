"""Directional derivatives: K tangents travel beside the values of one forward pass.

In: an objective and tangents of its parameters, or a watch that puts tangents in at the layers. Out: losses and their derivatives.
One file decides which of two ways is taken (`arbitration`): plain tensors (`explicit`) or torch's own dual numbers (`dual_numbers`).
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
