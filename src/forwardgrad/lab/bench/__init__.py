"""What a step costs and what an estimate is worth, measured on one machine in one run.

In: arms and networks. Out: records of numbers with intervals, which are also stored. Nothing is printed here.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
