"""Train PyTorch models without a backward pass: gradient estimators that fill ``p.grad`` from forward-mode derivatives.

Names are resolved on first use, so that importing the package (as the command line does) does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forwardgrad.checks.check import check as check
    from forwardgrad.checks.findings import Check as Check
    from forwardgrad.checks.findings import Finding as Finding
    from forwardgrad.derivative import plainly as plainly
    from forwardgrad.diagnostics import Quality as Quality
    from forwardgrad.diagnostics import quality as quality
    from forwardgrad.ensemble import Ensemble as Ensemble
    from forwardgrad.estimators import ESTIMATORS as ESTIMATORS
    from forwardgrad.estimators.backprop import Backprop as Backprop
    from forwardgrad.estimators.base import Estimate as Estimate
    from forwardgrad.estimators.base import Estimator as Estimator
    from forwardgrad.estimators.feedback import LearnedFeedback as LearnedFeedback
    from forwardgrad.estimators.fixed_feedback import FixedFeedback as FixedFeedback
    from forwardgrad.estimators.fixed_feedback import Readout as Readout
    from forwardgrad.estimators.forward import ForwardGradient as ForwardGradient
    from forwardgrad.estimators.guess import Guess as Guess
    from forwardgrad.estimators.local import LocalLosses as LocalLosses
    from forwardgrad.estimators.zeroth_order import ZerothOrder as ZerothOrder
    from forwardgrad.explanation import Explanation as Explanation
    from forwardgrad.explanation import explain as explain
    from forwardgrad.gradient import estimate_grad_ as estimate_grad_
    from forwardgrad.gradient import estimate_grads_ as estimate_grads_
    from forwardgrad.nesterov import Nesterov as Nesterov
    from forwardgrad.perturbations import PERTURBATIONS as PERTURBATIONS
    from forwardgrad.perturbations import Activity as Activity
    from forwardgrad.perturbations import Cheapest as Cheapest
    from forwardgrad.perturbations import Dense as Dense
    from forwardgrad.perturbations import LowRank as LowRank
    from forwardgrad.perturbations import PerExample as PerExample
    from forwardgrad.perturbations import Perturbation as Perturbation
    from forwardgrad.processes import independent_ranks as independent_ranks
    from forwardgrad.step import cap_step as cap_step
    from forwardgrad.tangents import LAWS as LAWS
    from forwardgrad.tangents import Gaussian as Gaussian
    from forwardgrad.tangents import Law as Law
    from forwardgrad.tangents import Orthogonal as Orthogonal
    from forwardgrad.tangents import Rademacher as Rademacher
    from forwardgrad.tangents import Sphere as Sphere
    from forwardgrad.training_step import TrainingStep as TrainingStep

__version__ = "0.1.0"

_HOME = {
    "ESTIMATORS": "estimators",
    "LAWS": "tangents",
    "PERTURBATIONS": "perturbations",
    "Activity": "perturbations",
    "Backprop": "estimators.backprop",
    "Cheapest": "perturbations",
    "Check": "checks.findings",
    "Dense": "perturbations",
    "Ensemble": "ensemble",
    "Estimate": "estimators.base",
    "Estimator": "estimators.base",
    "Explanation": "explanation",
    "Finding": "checks.findings",
    "FixedFeedback": "estimators.fixed_feedback",
    "ForwardGradient": "estimators.forward",
    "Gaussian": "tangents",
    "Guess": "estimators.guess",
    "Law": "tangents",
    "LearnedFeedback": "estimators.feedback",
    "LocalLosses": "estimators.local",
    "LowRank": "perturbations",
    "Nesterov": "nesterov",
    "Orthogonal": "tangents",
    "PerExample": "perturbations",
    "Perturbation": "perturbations",
    "Quality": "diagnostics",
    "Rademacher": "tangents",
    "Readout": "estimators.fixed_feedback",
    "Sphere": "tangents",
    "TrainingStep": "training_step",
    "cap_step": "step",
    "ZerothOrder": "estimators.zeroth_order",
    "check": "checks.check",
    "estimate_grad_": "gradient",
    "independent_ranks": "processes",
    "plainly": "derivative",
    "estimate_grads_": "gradient",
    "quality": "diagnostics",
    "explain": "explanation",
}
__all__ = ["__version__", *_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'forwardgrad' has no attribute {name!r}")
    value = getattr(import_module(f"forwardgrad.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
