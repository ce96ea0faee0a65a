"""A run that is interrupted once, and begun again from its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forwardgrad.lab.studies.run import Run
from forwardgrad.lab.training import loop


def killed_and_resumed(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Train the run into the folder; it is interrupted where it says how far it is, at this step or soon after."""
    tell, kills = loop.write_status, [step]

    def killed(training: Any, *rest: Any) -> None:
        tell(training, *rest)
        if kills and training.state.step >= kills[0]:
            kills.clear()
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "write_status", killed)
    with pytest.raises(KeyboardInterrupt):
        loop.train(run, folder, checkpoint_seconds=0.0)
    loop.train(run, folder, checkpoint_seconds=0.0)
    assert not kills
