"""What is written down about a user's copies: a receipt in each of them, and one ledger."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from holdfast.errors import FormatError


@dataclass(frozen=True, slots=True)
class SyncRecord:
    """What was installed. It lies inside the copy, so that the two move together."""

    version: str
    """Of holdfast."""

    files: Mapping[str, str]
    """Digest of every file that was shipped."""

    def encode(self) -> bytes:
        """The bytes of the receipt's file."""
        body = {"holdfast": self.version, "files": dict(sorted(self.files.items()))}
        return json.dumps(body, indent=1).encode() + b"\n"


def decode_receipt(data: bytes) -> SyncRecord | None:
    """The receipt in these bytes; None where they are none, so that the copy counts as the
    user's."""
    try:
        body: Any = json.loads(data)
        version, files = body["holdfast"], dict(body["files"].items())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if type(version) is not str or {type(known) for known in files.values()} - {str}:
        return None
    return SyncRecord(version, files)


@dataclass(frozen=True, slots=True)
class Ledger:
    """Names, so that what a user deleted is not mistaken for what never was there."""

    offered: frozenset[str] = field(default=frozenset())
    """Installed once, and shipped when last looked."""

    removed: frozenset[str] = field(default=frozenset())
    """Removed by the user, or no longer shipped: where there is no copy, none is to be installed,
    whatever is shipped in between."""

    def encode(self) -> bytes:
        """The bytes of the ledger's file."""
        body = {"offered": sorted(self.offered), "removed": sorted(self.removed)}
        return json.dumps(body, indent=1).encode() + b"\n"


def decode_ledger(data: bytes, *, where: str) -> Ledger:
    """The ledger in these bytes.

    Raises:
        FormatError: they are none. An empty one would bring back what the user deleted.
    """
    try:
        body: Any = json.loads(data)
        names = [body["offered"], body["removed"]]
        if any(type(name) is not str for one in names for name in one):
            raise ValueError("a name that is no text")
        return Ledger(*map(frozenset, names))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise FormatError(
            f"`{where}` is no record of skills: {error}",
            hint="move it away to start afresh; skills that you deleted then come back",
        ) from error


def order_of(version: str) -> tuple[int, ...]:
    """What versions are compared by: the numbers that they begin with.

    >>> order_of("0.10.1.dev3") > order_of("0.9")
    True
    """
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
