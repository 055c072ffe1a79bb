"""The seal of a folder: the sizes and checksums of files that another program has written.

The file `holdfast.seal` has one JSON object. Its last member is the checksum of all bytes before
it, as in `manifest.json`. docs/format.md specifies the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from holdfast.errors import DamagedError, FormatError
from holdfast.format import checksum

SEAL = "holdfast.seal"
"""Name of the file with the seal."""

VERSION = 1

BLOCK_BYTES = 4 << 20
"""Bytes of a file under one checksum. Larger than the blocks of tensors, since a sealed file is
always checked as a whole."""


@dataclass(frozen=True, slots=True)
class SealedFile:
    """Size and checksums of one file."""

    nbytes: int
    checksums: tuple[int, ...]
    """Checksum of each block of `BLOCK_BYTES`."""


@dataclass(frozen=True, slots=True)
class Seal:
    """The files in a sealed folder, with their sizes and checksums."""

    files: Mapping[str, SealedFile]
    """Every file below the folder except the seal, by its relative path with `/` between names."""

    created: str = ""
    """Time at which the folder was sealed: ISO 8601, UTC."""

    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the software that sealed the folder, by name."""

    @property
    def nbytes(self) -> int:
        """Total size of all files, without the seal."""
        return sum(file.nbytes for file in self.files.values())


def encode(seal: Seal) -> bytes:
    """Return the bytes of the file `holdfast.seal`."""
    members = {
        "holdfast_seal": VERSION,
        "created": seal.created,
        "versions": dict(seal.versions),
        "checksums": {"algorithm": checksum.ALGORITHM, "block_bytes": BLOCK_BYTES},
        "files": {
            name: [file.nbytes, checksum.to_hex(file.checksums)]
            for name, file in sorted(seal.files.items())
        },
    }
    body = json.dumps(members, separators=(",", ":")).encode()
    return body[:-1] + _tail(body)


def decode(data: bytes, *, where: str) -> Seal:
    """Decode the bytes of a seal. Errors call the file `where`.

    Raises:
        DamagedError: the bytes do not match their checksum.
        FormatError: the bytes are intact, but not a seal of a known version.
    """
    length = len(_tail(b""))
    body = data[:-length] + b"}"
    if data[-length:] != _tail(body):
        raise DamagedError(
            f"`{where}` does not match its own checksum",
            hint="the folder cannot be checked: use another one",
        )
    try:
        members = json.loads(body)
        if members["holdfast_seal"] != VERSION:
            raise FormatError(
                f"`{where}` is a seal of version {members['holdfast_seal']}, this version of "
                f"Holdfast reads version {VERSION}",
                hint="upgrade Holdfast",
            )
        files = {
            name: SealedFile(nbytes, checksum.from_hex(digits))
            for name, (nbytes, digits) in members["files"].items()
        }
        for name, file in files.items():
            _check(name, file)
        return Seal(files, members["created"], members["versions"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"`{where}` is not a seal: {type(error).__name__} {error}") from error


def _check(name: str, file: SealedFile) -> None:
    parts = name.split("/")
    if "" in parts or "." in parts or ".." in parts or "\0" in name:
        raise ValueError(f"a file is called {name!r}")
    if type(file.nbytes) is not int or file.nbytes < 0:
        raise ValueError(f"`{name}` has {file.nbytes} bytes")
    if len(file.checksums) != checksum.num_blocks(file.nbytes, BLOCK_BYTES):
        raise ValueError(f"`{name}` has {len(file.checksums)} checksums for {file.nbytes} bytes")


def _tail(body: bytes) -> bytes:
    """Encode the end of a seal, its member `checksum`. `body`: JSON of the seal without it."""
    return b',"checksum":"' + checksum.to_hex([checksum.checksum(body)]).encode() + b'"}'
