"""The pointer of a checkpoint in an object store: `NAME/manifest.json`, written last.

An object store cannot rename folders. A checkpoint's files are in `NAME/ID/`, and this small object
says which ID is published. docs/format.md specifies it.
"""

from __future__ import annotations

import json
import re

VERSION = 2

POINTER_BYTES_MAX = 256
"""Most bytes of a pointer. A larger `manifest.json` is a manifest itself."""

_ID = re.compile(r"[0-9a-f]{8}", re.ASCII)


def is_id(name: str) -> bool:
    """Whether `name` can be the ID of an attempt.

    >>> is_id("1f2e3d4c"), is_id("weights")
    (True, False)
    """
    return _ID.fullmatch(name) is not None


def encode_pointer(attempt_id: str) -> bytes:
    """Encode the pointer to `NAME/attempt_id/`.

    >>> encode_pointer("1f2e3d4c")
    b'{"holdfast": 2, "folder": "1f2e3d4c"}'
    """
    return json.dumps({"holdfast": VERSION, "folder": attempt_id}).encode()


def id_in(data: bytes) -> str | None:
    """Decode a pointer. Return the ID; None if `data` is no pointer.

    >>> id_in(b'{"holdfast": 2, "folder": "1f2e3d4c"}'), id_in(b'{"holdfast": 2, "step": 1}')
    ('1f2e3d4c', None)
    """
    if len(data) > POINTER_BYTES_MAX:
        return None
    try:
        members = json.loads(data)
    except ValueError:
        return None
    folder = members.get("folder") if isinstance(members, dict) else None
    return folder if isinstance(folder, str) and is_id(folder) else None
