"""A user's own score of what the model says, maximised in place of a loss."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.finetuning.rows import Row
from forwardgrad.lab.studies import find_here


class Score:
    """A function of predictions and rows that returns one number, or one number a row: the more, the better."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.function = find_here(where, "score")

    def __call__(self, predictions: Sequence[str], rows: Sequence[Row]) -> float:
        """The score of a batch, the mean where it is one number a row. UserError for anything that is no finite number."""
        try:
            found: Any = self.function(list(predictions), [dict(row) for row in rows])
            try:
                numbers = [float(found)]
            except (TypeError, ValueError):  # it is a list, an array or a tensor
                numbers = [float(value) for value in found]
                if len(numbers) != len(rows):
                    raise UserError(
                        f"the score {self.where!r} returns {len(numbers)} numbers for {len(rows)} rows: return one, or one a row"
                    ) from None
        except UserError:
            raise
        except Exception as error:  # the user's code can raise anything
            raise UserError(f"the score {self.where!r} stops with {type(error).__name__}: {' '.join(str(error).split())}") from error
        mean = sum(numbers) / len(numbers)
        if not math.isfinite(mean):
            raise UserError(f"the score {self.where!r} returns {mean}: return a finite number")
        return mean


def code_of_score(where: str) -> str | None:
    """Twelve hexadecimal digits of the file that holds the function; nothing is imported. None where it is named by its module."""
    path = Path(where.rpartition(":")[0]).expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.suffix == ".py" and path.is_file() else None
