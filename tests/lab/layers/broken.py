"""An estimator that stops wherever it is asked."""

from __future__ import annotations

from typing import Any, ClassVar

import forwardgrad as fg


class Broken(fg.Estimator):
    """Raises what an estimator raises that cannot do with a model."""

    name: ClassVar[str] = "broken"

    @property
    def unbiased(self) -> bool:
        return False

    def estimate(self, *_: Any) -> Any:
        raise ValueError("it does not work here\nand more")
