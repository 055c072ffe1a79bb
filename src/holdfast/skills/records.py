"""Records of a user's copies: a receipt in each copy, and one ledger."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from holdfast.errors import FormatError
from holdfast.skills.content import Digests


@dataclass(frozen=True, slots=True)
class SyncRecord:
    """Receipt: what was installed. It lies inside the copy, so that the two move together."""

    version: str
    """Version of holdfast that installed the copy."""

    files: Digests
    """Digest of every shipped file."""

    def encode(self) -> bytes:
        """Returns the content of the receipt's file."""
        body = {"holdfast": self.version, "files": dict(sorted(self.files.items()))}
        return json.dumps(body, indent=1).encode() + b"\n"


def decode_receipt(data: bytes) -> SyncRecord | None:
    """Decode a receipt; None where it is damaged, so that the copy counts as the user's own."""
    try:
        body: Any = json.loads(data)
        version, files = body["holdfast"], dict(body["files"].items())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if type(version) is not str or {type(digest) for digest in files.values()} - {str}:
        return None
    return SyncRecord(version, files)


@dataclass(frozen=True, slots=True)
class Ledger:
    """Names of skills, by which a deleted copy is told from one that was never installed."""

    offered: frozenset[str] = field(default=frozenset())
    """Skills that were installed once, and were shipped at the last sync."""

    removed: frozenset[str] = field(default=frozenset())
    """Skills that the user removed, or that are no longer shipped: without a copy they are never
    installed again."""

    def encode(self) -> bytes:
        """Returns the content of the ledger's file."""
        body = {"offered": sorted(self.offered), "removed": sorted(self.removed)}
        return json.dumps(body, indent=1).encode() + b"\n"


def decode_ledger(data: bytes, *, where: str) -> Ledger:
    """Decode a ledger.

    Raises:
        FormatError: it is damaged. An empty ledger instead would bring back deleted skills.
    """
    try:
        body: Any = json.loads(data)
        names = [body["offered"], body["removed"]]
        if any(type(name) is not str for listed in names for name in listed):
            raise ValueError("a name that is no text")
        return Ledger(*map(frozenset, names))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise FormatError(
            f"`{where}` is no record of skills: {error}",
            hint="move it away to start afresh; skills that you deleted then come back",
        ) from error


def order_of(version: str) -> tuple[int, ...]:
    """Returns the numbers that a version begins with, by which versions are compared.

    >>> order_of("0.10.1.dev3") > order_of("0.9")
    True
    """
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
