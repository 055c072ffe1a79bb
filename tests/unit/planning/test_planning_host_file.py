"""Places of the parts that ranks write into the file of their host."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from holdfast.format import checksum
from holdfast.format.names import data_file
from holdfast.planning.host_file import ALIGN_BYTES, PartSize, place_parts, place_tensors

SIZES = st.builds(
    PartSize,
    tensors=st.integers(0, 3 * ALIGN_BYTES),
    num_blocks=st.integers(0, 20_000),
    values=st.integers(0, 3 * ALIGN_BYTES),
)


@given(st.lists(st.tuples(st.sampled_from("abc"), SIZES), min_size=1, max_size=8))
def test_no_two_ranks_write_to_one_page(ranks: list[tuple[str, PartSize]]) -> None:
    """G1, G20. Method: all parts of each file, in order of their offsets: tensors, then values,
    then checksums; each begins on a page, after the part before has ended."""
    hosts, sizes = [host for host, _ in ranks], [size for _, size in ranks]
    parts = place_parts(hosts, sizes)
    for host in set(hosts):
        members = [rank for rank, other in enumerate(hosts) if other == host]
        leader = parts[members[0]]
        assert [parts[rank].leads for rank in members] == [True] + [False] * (len(members) - 1)
        assert {parts[rank].file for rank in members} == {data_file(members[0])}
        assert {parts[rank].nbytes for rank in members} == {leader.nbytes}
        if not any(sizes[rank].nbytes for rank in members):
            assert not leader.nbytes
            continue
        spans = [
            *((parts[rank].tensors_at, sizes[rank].tensors) for rank in members),
            *((parts[rank].values_at, sizes[rank].values) for rank in members),
            *(
                (parts[rank].checksums_at, sizes[rank].num_blocks * checksum.NBYTES)
                for rank in members
            ),
        ]
        assert all(offset % ALIGN_BYTES == 0 for offset, _ in spans)
        assert all(first + nbytes <= second for (first, nbytes), (second, _) in pairwise(spans))
        assert sum(spans[-1]) == leader.nbytes
        assert leader.table_offset == parts[members[0]].checksums_at


@given(st.lists(st.tuples(st.sampled_from("ab"), SIZES, st.integers(0, 10**6)), max_size=6))
def test_values_do_not_move_tensors(ranks: list[tuple[str, PartSize, int]]) -> None:
    """G2, G20. Method: values of other sizes; the index relies on the places of tensors."""
    hosts = [host for host, _, _ in ranks]
    sizes = [size for _, size, _ in ranks]
    others = [PartSize(size.tensors, size.num_blocks, values) for _, size, values in ranks]
    assert place_tensors(hosts, sizes) == place_tensors(hosts, others)
    for place, part in zip(place_tensors(hosts, sizes), place_parts(hosts, others), strict=True):
        assert (place.offset, place.first_block) == (part.tensors_at, part.first_block)
