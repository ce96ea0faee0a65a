"""How tangents go through the calls that networks are made of: one rule for each kind of call, K tangents at once.

In: the arguments of a call, some with tangents. Out: its value, with tangents. Without a rule a call goes through torch's dual numbers.
What these cannot do is composed of other calls (`composed`).
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
