"""Estimates in the training loops that people have: Hugging Face's Trainer, Lightning, accelerate.

In: an estimator, and the framework's own trainer, module or accelerator. Out: the same loop, in which `estimate_grad_` stands where the
framework makes its backward pass, and whose checkpoints hold what the estimator needs to go on. Each framework has a module of its own,
which alone imports it, so that none of them is needed for another.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
