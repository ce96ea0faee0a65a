"""What `fg.check` looks at, one subject a file.

In: a loss, a model and an estimator. Out: findings, each with a sentence that says what to do.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
