"""Where runs are trained: this process, a pool of processes, or a Ray cluster.

In: runs and a place. Out: their results. A run that fails has a result too, with the reason.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
