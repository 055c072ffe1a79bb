"""Checksums of blocks, and their hexadecimal form."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.format.checksum import (
    BLOCK_BYTES,
    block_checksums,
    checksum,
    from_hex,
    num_blocks,
    to_hex,
)


def test_the_checksum_is_xxh3_64() -> None:
    """G3. Method: the test vectors of the xxHash project (seed 0; empty, and its sanity buffer)."""
    assert checksum(b"") == 0x2D06800538D394C2
    buffer, generator = bytearray(), 2654435761
    for _ in range(4):
        buffer.append(generator >> 56)
        generator = generator * 11400714785074694797 % 2**64
    assert checksum(buffer[:1]) == 0xC44BDFF4074EECDB


@pytest.mark.parametrize("nbytes", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1])
def test_each_block_has_one_checksum_and_the_last_may_be_short(nbytes: int) -> None:
    """G3. Method: sizes around one block, compared with slices hashed one by one."""
    data = bytes(range(256)) * (nbytes // 256) + bytes(nbytes % 256)
    checksums_found = block_checksums(memoryview(data))
    assert len(checksums_found) == num_blocks(nbytes)
    assert checksums_found == [
        checksum(data[start : start + BLOCK_BYTES]) for start in range(0, nbytes, BLOCK_BYTES)
    ]


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_checksums_survive_a_round_trip_as_text(checksums: list[int]) -> None:
    """Method: random checksums; each is sixteen lower-case digits."""
    text = to_hex(checksums)
    assert from_hex(text) == tuple(checksums)
    assert len(text) == 16 * len(checksums)
    assert text == text.lower()


@pytest.mark.parametrize(
    "text", ["0", "0" * 15, "0" * 17, "x" * 16, "-" + "0" * 15, "0x" + "0" * 14, " " * 8 + "0" * 8,
             "1_" * 8, "A" * 16, "\u0661" * 16]
)  # fmt: skip
def test_text_that_is_no_checksum_is_refused(text: str) -> None:
    """Method: wrong lengths, and everything besides digits that `int(text, 16)` accepts."""
    with pytest.raises(ValueError, match=r"digits"):
        from_hex(text)
