"""Detect links that lead out of their folder."""

from __future__ import annotations

import os

_SNAPSHOTS, _BLOBS = "snapshots", "blobs"
"""Folders in the Hugging Face cache. The files in `snapshots/<revision>` are links into `blobs`."""


def leads_out(folder: str, file: str) -> bool:
    """Return whether `file`, a path below `folder`, resolves to a place outside of `folder`.

    In the Hugging Face cache, links from a snapshot to blobs of the same repository are allowed.
    """
    path = os.path.join(folder, file)
    if "/" not in file and not os.path.islink(path):
        return False
    inside, target = os.path.realpath(folder), os.path.realpath(path)
    if _is_below(target, inside):
        return False
    above, _, _ = inside.rpartition("/")
    repository, _, name = above.rpartition("/")
    return name != _SNAPSHOTS or not _is_below(target, f"{repository}/{_BLOBS}")


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")
