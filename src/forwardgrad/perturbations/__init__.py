"""What moves along a direction: whole weights, weights of low rank, weights for every example, activities, or the cheapest of these.

In: a layer, its input and a direction. Out: the tangent of the layer's output, and the layer's gradient once the derivative is known.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
