"""Studies that come with the project: the paper, what goes beyond it, noise, the race against the clock, equal forward passes,
fine-tuning, and campaigns.

In: the options of `forwardgrad reproduce`. Out: studies. Loads without torch.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
