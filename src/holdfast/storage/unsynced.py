"""A local folder whose writers make their files durable later."""

from __future__ import annotations

from holdfast.storage.local import LocalStore


class UnsyncedStore(LocalStore):
    """Like `LocalStore`, but `sync` does nothing, and a rename is not durable on return."""

    def sync(self, folder: str) -> None:
        pass

    def _sync_above(self, *keys: str) -> None:
        pass
