"""The promises of an estimator as checks, for authors outside the project and for the project's own tests.

In: an estimator, and small models with their losses. Out: an AssertionError that names the broken promise and what to do, or a list of
results. `forwardgrad.check` asks another question: whether an estimator can be trusted on one model, the user's own.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
