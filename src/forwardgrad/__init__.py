"""Train PyTorch models without a backward pass: gradient estimators that fill ``p.grad`` from forward-mode derivatives.

Names are resolved on first use, so that importing the package (as the command line does) does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forwardgrad.estimators import ESTIMATORS as ESTIMATORS
    from forwardgrad.estimators.backprop import Backprop as Backprop
    from forwardgrad.estimators.base import Estimate as Estimate
    from forwardgrad.estimators.base import Estimator as Estimator
    from forwardgrad.estimators.forward import ForwardGradient as ForwardGradient
    from forwardgrad.estimators.guess import Guess as Guess
    from forwardgrad.estimators.zeroth_order import ZerothOrder as ZerothOrder
    from forwardgrad.gradient import estimate_grad_ as estimate_grad_
    from forwardgrad.nesterov import Nesterov as Nesterov
    from forwardgrad.tangents import LAWS as LAWS
    from forwardgrad.tangents import Gaussian as Gaussian
    from forwardgrad.tangents import Law as Law
    from forwardgrad.tangents import Orthogonal as Orthogonal
    from forwardgrad.tangents import Rademacher as Rademacher
    from forwardgrad.tangents import Sphere as Sphere

__version__ = "0.1.0"

_HOME = {
    "ESTIMATORS": "estimators",
    "LAWS": "tangents",
    "Backprop": "estimators.backprop",
    "Estimate": "estimators.base",
    "Estimator": "estimators.base",
    "ForwardGradient": "estimators.forward",
    "Gaussian": "tangents",
    "Guess": "estimators.guess",
    "Law": "tangents",
    "Nesterov": "nesterov",
    "Orthogonal": "tangents",
    "Rademacher": "tangents",
    "Sphere": "tangents",
    "ZerothOrder": "estimators.zeroth_order",
    "estimate_grad_": "gradient",
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
