"""Pointers of Git LFS, which a Git clone may have in place of large files."""

from __future__ import annotations

from holdfast.errors import FormatError
from holdfast.format.archive import Fetch

LFS = b"version https://git-lfs"
"""First bytes of a Git LFS pointer."""

LFS_HINT = "`git lfs pull` in its repository downloads the weights"


def check_no_pointer(fetch: Fetch, *, where: str) -> None:
    """Raise a FormatError if a file has a Git LFS pointer in place of weights."""
    if fetch(0, len(LFS)) == LFS:
        raise FormatError(f"`{where}` is a pointer of Git LFS, not the weights", hint=LFS_HINT)
