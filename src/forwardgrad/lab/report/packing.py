"""A store packed without the training losses that no report reads. Loads without torch."""

from __future__ import annotations

from forwardgrad.lab.report.thinning import thinning_of
from forwardgrad.lab.store import Store, pack


def pack_thin(store: Store) -> int:
    """Put the finished runs of a store into one file that the same report is made of; returns how many the file holds."""
    return pack(store, thinning_of(store))
