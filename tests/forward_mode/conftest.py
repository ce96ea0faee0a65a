"""What tests of attention share."""

from __future__ import annotations

import pytest

from forwardgrad.forward_mode.rules import tiles


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 3 rows and 4 keys, of which small tensors have many."""
    monkeypatch.setattr(tiles, "_MOST", {"cpu": 12})
    monkeypatch.setattr(tiles, "_ROWS", 3)
