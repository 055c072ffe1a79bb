"""Publish checkpoints on stores that can rename folders."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace as changed

from holdfast.errors import ExistsError, HoldfastError
from holdfast.format.names import HiddenFolder, hidden_folder_of
from holdfast.storage.store import FolderStore


def publish_by_rename(store: FolderStore, folder: str, name: str, *, replace: bool) -> None:
    """Publish a hidden folder as `Store.publish` does.

    If a checkpoint is to be replaced, it is first renamed to `.replaced-...`. If the process dies
    between the two renames, a cleanup gives the replaced checkpoint its name back.
    """
    if not replace:
        store.rename(folder, name)
        return
    attempt = hidden_folder_of(folder)
    assert attempt is not None, f"{folder} is no hidden folder"
    replaced = HiddenFolder("replaced", name, attempt.id)
    removing = changed(replaced, role="removing")
    try:
        store.rename(name, str(replaced))
        store.rename(folder, name)
    except ExistsError:
        # Another save has published first. Delete the old checkpoint, which both were to replace.
        with suppress(HoldfastError):
            store.rename(str(replaced), str(removing))
            store.remove(str(removing))
        raise
    except HoldfastError:
        # Give the old checkpoint its name back. If this fails too, readers use the `.replaced`
        # folder, and a cleanup renames it.
        with suppress(HoldfastError):
            store.rename(str(replaced), name)
        raise
    # Rename the old checkpoint while this process holds it. Otherwise a cleanup could rename it
    # back during the next save.
    with suppress(HoldfastError):
        store.rename(str(replaced), str(removing))


def unpublish_by_rename(store: FolderStore, name: str, removing: str) -> str:
    """Take the name away from a checkpoint by renaming it to `removing`. Return `removing`."""
    if name != removing:
        store.rename(name, removing)
    return removing
