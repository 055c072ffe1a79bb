"""`.metadata` of stock torch is read; a damaged one is refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

from holdfast.errors import FormatError
from holdfast.format.dcp import decode_metadata, is_ours
from holdfast.format.manifest import Chunk, Manifest, Span, TensorEntry, ValueEntry
from holdfast.format.region import Region
from manifest_bytes import encode_metadata

OURS = Manifest(
    {
        "w": TensorEntry(
            "bfloat16",
            (4, 2),
            (
                Chunk(Region((0, 0), (2, 2)), "__0_0.distcp", Span(0, 700)),
                Chunk(Region((2, 0), (4, 2)), "__1_0.distcp", Span(0, 700)),
            ),
            ("model", "w"),
        )
    },
    {"lr": ValueEntry("__0_0.distcp", Span(700, 100), None, ("optimizer", 0, "lr"))},
    versions={"dcp": "1.0.0"},
)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return `.metadata` as stock torch writes it."""
    folder: Path = tmp_path_factory.mktemp("stock")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock_save({"w": torch.ones(2, 3), "n": {"step": 3}}, checkpoint_id=folder)
    return (folder / ".metadata").read_bytes()


def test_metadata_of_holdfast_is_recognized(stock: bytes) -> None:
    """G10. Method: a round trip; the file of stock torch is not taken for one of Holdfast."""
    data = encode_metadata(OURS)
    assert decode_metadata(data, where="m") == OURS
    assert is_ours(data)
    decoded = decode_metadata(stock, where="m")
    assert decoded.tensors["w"].shape == (2, 3)
    assert decoded.values["n.step"].path == ("n", "step")
    assert not is_ours(stock)


@settings(max_examples=400)
@given(st.data())
def test_a_corrupted_index_is_read_or_refused(stock: bytes, data: st.DataObject) -> None:
    """G8. Method: `.metadata` of stock torch or of Holdfast, truncated or with bytes replaced. If
    it is read, all files are inside the folder, and all regions inside their tensor."""
    broken = bytearray(data.draw(st.sampled_from([stock, encode_metadata(OURS)])))
    for _ in range(data.draw(st.integers(0, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(broken[: data.draw(st.just(len(broken)) | st.integers(0, len(broken)))])
    try:
        manifest = decode_metadata(cut, where="m")
    except FormatError:
        return
    for entry in manifest.tensors.values():
        for chunk in entry.chunks:
            assert chunk.region.fits(entry.shape)
            assert "/" not in chunk.file


def test_empty_shards_at_the_same_place_count_once() -> None:
    """G10: with more ranks than rows several shards are empty, and all start at the end of the
    tensor. Method: an index with three such chunks."""
    empty = Chunk(Region((2,), (2,)), "f", Span(10, 5))
    chunks = (Chunk(Region((0,), (2,)), "f", Span(0, 10)), empty, empty, empty)
    data = encode_metadata(Manifest({"w": TensorEntry("int8", (2,), chunks, ("w",))}, {}))
    assert decode_metadata(data, where="m").tensors["w"].chunks == chunks[:2]
