"""Who holds a lock in a folder of this machine."""

from __future__ import annotations

from holdfast.storage.local import LocalStore


def holder_of(store: LocalStore, key: str) -> str | None:
    """Note of whoever on this machine holds `key`; None where nobody does."""
    return store.holder(key)
