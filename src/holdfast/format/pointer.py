"""The pointer of a checkpoint in an object store: `NAME/manifest.json`, written last.

An object store cannot rename folders, so a checkpoint's files are in `NAME/ID/`. The pointer is a
small object that says which ID is published. Before the first publication, a reservation is in its
place: an object with the ID of the attempt that has reserved the name. docs/format.md specifies
both.
"""

from __future__ import annotations

import json
import os
import re

VERSION = 2

POINTER_BYTES_MAX = 256
"""Maximum size of a pointer. If `manifest.json` is larger, it is not a pointer but a manifest."""

_ID = re.compile(r"[0-9a-f]{8}", re.ASCII)


def is_id(name: str) -> bool:
    """Return whether `name` can be the ID of an attempt.

    >>> is_id("1f2e3d4c"), is_id("weights")
    (True, False)
    """
    return _ID.fullmatch(name) is not None


def encode_pointer(attempt_id: str) -> bytes:
    """Encode a pointer, which says that the attempt with this ID is published.

    No two calls return the same bytes, so the store can tell two versions of a pointer apart.

    >>> encode_pointer("1f2e3d4c")[:37]
    b'{"holdfast": 2, "folder": "1f2e3d4c",'
    """
    return _encode("folder", attempt_id)


def encode_reservation(attempt_id: str) -> bytes:
    """Encode a reservation, which says that the attempt with this ID has reserved the name.

    >>> encode_reservation("1f2e3d4c")[:39]
    b'{"holdfast": 2, "reserved": "1f2e3d4c",'
    """
    return _encode("reserved", attempt_id)


def id_in(data: bytes) -> str | None:
    """Return the ID in a pointer; None if `data` is not a pointer.

    >>> id_in(b'{"holdfast": 2, "folder": "1f2e3d4c"}'), id_in(b'{"holdfast": 2, "step": 1}')
    ('1f2e3d4c', None)
    """
    return _id_in(data, "folder")


def reserved_in(data: bytes) -> str | None:
    """Return the attempt's ID in a reservation; None if `data` is not a reservation.

    >>> reserved_in(b'{"holdfast": 2, "reserved": "1f2e3d4c"}')
    '1f2e3d4c'
    """
    return _id_in(data, "reserved")


def _encode(member: str, attempt_id: str) -> bytes:
    # Object stores tell two versions of an object apart by a hash of the bytes. The random member
    # makes all versions differ, so that a condition on an earlier version never holds again.
    members = {"holdfast": VERSION, member: attempt_id, "put": os.urandom(8).hex()}
    return json.dumps(members).encode()


def _id_in(data: bytes, member: str) -> str | None:
    if len(data) > POINTER_BYTES_MAX:
        return None
    try:
        members = json.loads(data)
    except ValueError:
        return None
    found = members.get(member) if isinstance(members, dict) else None
    return found if isinstance(found, str) and is_id(found) else None
