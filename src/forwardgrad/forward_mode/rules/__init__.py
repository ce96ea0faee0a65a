"""How tangents go through the calls that networks are made of: one rule a kind of call, K tangents at once.

In: a call's arguments, with or without tangents. Out: its value and the tangents of that. A rule makes a call cheaper, never possible.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
