"""What the stored results say: findings, the claims of papers and goals, each decided by a rule that the page prints.

In: stored results. Out: sentences and verdicts; nothing is decided beforehand. Loads without torch.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
