"""All rules, by the function that they are the rule of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from forwardgrad.forward_mode.rules import attention, dropout, elementwise, layers, views
from forwardgrad.forward_mode.rules.base import Rule

ALL_RULES: dict[Callable[..., Any], Rule] = {**layers.RULES, **elementwise.RULES, **views.RULES, **dropout.RULES, **attention.RULES}
