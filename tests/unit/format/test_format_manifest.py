"""`manifest.json`: a round trip, and every way to corrupt it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.catalog.findings import kind_of
from holdfast.errors import DamagedError, FormatError
from holdfast.format.dtypes import BY_NAME
from holdfast.format.manifest import (
    Chunk,
    Kind,
    LastTensors,
    Manifest,
    Path,
    Span,
    Table,
    TensorEntry,
    ValueEntry,
    decode,
)
from holdfast.format.region import Region
from holdfast.format.timings import Stage
from manifest_bytes import encode, sealed

FILES = {"__0_0.distcp": 1 << 41, "__1_0.distcp": 1 << 41}
TABLES = {file: Table(1 << 40, 7) for file in FILES}
KEYS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


@st.composite
def paths(draw: st.DrawFn, name: str) -> Path:
    return draw(
        st.one_of(
            st.just((name,)),
            st.lists(st.one_of(KEYS, st.integers(0, 9)), min_size=1, max_size=3).map(tuple),
        )
    )


@st.composite
def tensor_entries(draw: st.DrawFn, name: str) -> TensorEntry:
    dtype = draw(st.sampled_from(sorted(BY_NAME)))
    shape = tuple(draw(st.lists(st.integers(0, 2000), max_size=3)))
    chunks = []
    for _ in range(draw(st.integers(0, 3))):
        bounds = [sorted((draw(st.integers(0, s)), draw(st.integers(0, s)))) for s in shape]
        region = Region(tuple(b[0] for b in bounds), tuple(b[1] for b in bounds))
        nbytes = region.num_elements * BY_NAME[dtype].itemsize
        offset, before, after = (draw(st.integers(0, 4096)) for _ in range(3))
        block = draw(st.integers(0, 1 << 30))
        item = Span(offset, before + nbytes + after)
        chunks.append(Chunk(region, draw(st.sampled_from([*FILES])), item, offset + before, block))
    return TensorEntry(dtype, shape, tuple(chunks), draw(paths(name)))


@st.composite
def value_entries(draw: st.DrawFn, name: str) -> ValueEntry:
    item = Span(draw(st.integers(0, 99)), draw(st.integers(0, 99)))
    digest = draw(st.integers(0, 2**64 - 1))
    return ValueEntry(draw(st.sampled_from([*FILES])), item, digest, draw(paths(name)))


seconds = st.floats(0, 1e9)
stages = st.builds(Stage, seconds, seconds, seconds, st.integers(0, 4000))


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    names = draw(st.lists(KEYS, unique=True, max_size=5))
    half = len(names) // 2
    return Manifest(
        tensors={name: draw(tensor_entries(name)) for name in names[:half]},
        values={name: draw(value_entries(name)) for name in names[half:]},
        files=FILES,
        tables=TABLES,
        shared=draw(st.none() | st.dictionaries(st.sampled_from([*FILES]), st.integers(0, 2**40))),
        step=draw(st.none() | st.integers(0, 10**12)),
        kind=draw(st.sampled_from([None, "full", "model"])),
        components=draw(st.none() | st.lists(KEYS, max_size=3).map(tuple)),
        created=draw(st.sampled_from(["", "2026-01-02T03:04:05+00:00"])),
        layout=draw(st.dictionaries(KEYS, st.integers() | KEYS | st.booleans(), max_size=3)),
        versions=draw(st.dictionaries(KEYS, KEYS, max_size=3)),
        model=draw(
            st.dictionaries(KEYS, st.integers() | KEYS | st.none() | st.booleans(), max_size=3)
        ),
        timings=draw(st.dictionaries(KEYS, stages, max_size=2)),
        metadata=draw(st.none() | st.tuples(st.integers(0, 2**40), st.integers(0, 2**64 - 1))),
    )


SMALL = Manifest(
    tensors={
        "w": TensorEntry(
            "float32",
            (4, 2),
            (Chunk(Region((0, 0), (4, 2)), "__0_0.distcp", Span(0, 700), 640, 0),),
            ("model", "w"),
        )
    },
    values={"lr": ValueEntry("__0_0.distcp", Span(700, 100), 9, ("lr",))},
    files={"__0_0.distcp": 808},
    tables={"__0_0.distcp": Table(800, 12)},
    step=3,
    kind="full",
    components=("lr",),
    layout={"world_size": 1},
    metrics={"loss": 0.5},
    model={"model_type": "llama"},
    timings={"write": Stage(1.0, 1.5, 2.0, 3)},
    metadata=(10, 11),
)


def body_of(manifest: Manifest) -> dict[str, Any]:
    """Return the JSON object of a manifest, without its checksum."""
    body: dict[str, Any] = json.loads(encode(manifest))
    del body["checksum"]
    return body


@given(manifests())
def test_decoding_without_entries_gives_the_same_facts(manifest: Manifest) -> None:
    """Method: the fast and the full decoder, for any manifest."""
    head = decode(encode(manifest), where="here", entries=False)
    full = decode(encode(manifest), where="here")
    assert head == replace(full, tensors={}, values={}, kind=kind_of(full))


@pytest.mark.parametrize("kind", ["full", None])
def test_decoding_without_entries_does_not_depend_on_names_or_order(kind: Kind) -> None:
    """Method: a model config with a long member `tensors`; then a manifest whose `tensors` come
    first."""
    model = {"a": 1, "tensors": {"tensors": {"dtype": 2}}, "z": 3}
    manifest = replace(SMALL, kind=kind, model=model)
    expected = replace(manifest, tensors={}, values={}, kind=kind_of(manifest))
    body = body_of(manifest)
    first = {"tensors": body.pop("tensors"), **body}
    for data in (encode(manifest), sealed(first)):
        assert decode(data, where="here", entries=False) == expected


@given(st.lists(manifests(), min_size=1, max_size=2), st.data())
def test_decoding_several_manifests_gives_what_decoding_each_gives(
    distinct: list[Manifest], data: st.DataObject
) -> None:
    """Method: any sequence of a few manifests, so that some follow an equal one; some of them with
    other values and sizes of files."""
    last = LastTensors()
    for manifest in data.draw(st.lists(st.sampled_from(distinct), min_size=2, max_size=4)):
        encoded = encode(replace(manifest, step=data.draw(st.integers(0, 99))))
        assert decode(encoded, where="m", last=last) == decode(encoded, where="m")


def test_equal_tensors_in_other_files_are_checked_again() -> None:
    """G8. Method: after a good manifest, one with the same tensors in a shorter file; then one
    with a member behind its tensors; then one whose value has the name of a tensor."""
    short, behind, double = (body_of(SMALL) for _ in range(3))
    short["files"][0][1:3] = [708, 700]
    behind["kind"] = behind.pop("kind")
    double["values"][0]["entries"] = {"w": None}
    last = LastTensors()
    assert decode(encode(SMALL), where="m", last=last) == SMALL
    assert decode(sealed(behind, (",", ":")), where="m", last=last) == SMALL
    for body in (short, double):
        with pytest.raises(FormatError):
            decode(sealed(body, (",", ":")), where="m", last=last)


@given(manifests())
def test_a_manifest_survives_a_round_trip(manifest: Manifest) -> None:
    """Method: every field; encoding the result gives the same bytes."""
    data = encode(manifest)
    assert decode(data, where="m") == manifest
    assert encode(decode(data, where="m")) == data
    json.loads(data)


def test_every_flipped_bit_of_a_manifest_is_detected() -> None:
    """G3. Method: each bit of a manifest, one after the other."""
    data = bytearray(encode(SMALL))
    for position in range(len(data)):
        for bit in range(8):
            data[position] ^= 1 << bit
            with pytest.raises((DamagedError, FormatError)):
                decode(bytes(data), where="m")
            data[position] ^= 1 << bit
    assert decode(bytes(data), where="m") == SMALL


def test_a_truncated_or_extended_manifest_is_detected() -> None:
    """G3. Method: every prefix; one more byte at either end; only zeros."""
    data = encode(SMALL)
    broken = [data[:stop] for stop in range(len(data))]
    for wrong in [*broken, data + b" ", data + b"\n", b" " + data, data + data, bytes(len(data))]:
        with pytest.raises(DamagedError):
            decode(wrong, where="m")


@pytest.mark.parametrize("version", [0, 1, 4, 2.5, "1", None, [1], True, 2.0])
def test_an_unknown_version_is_refused(version: object) -> None:
    """G8. Method: another version with a correct checksum."""
    with pytest.raises(FormatError, match="version"):
        decode(sealed({**body_of(SMALL), "holdfast": version}), where="m")


@pytest.mark.parametrize(("version", "hint"), [(1, "no release wrote"), (4, "pip install")])
def test_an_unknown_version_has_a_hint_that_fits_its_age(version: int, hint: str) -> None:
    """G8: an upgrade helps if the checkpoint is newer than Holdfast, not if it is older."""
    with pytest.raises(FormatError) as raised:
        decode(sealed({**body_of(SMALL), "holdfast": version}), where="m")
    assert hint in (raised.value.hint or "")


@pytest.mark.parametrize(
    "name", ["../step-1/__0_0.distcp", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b"]
)
def test_a_data_file_outside_of_the_folder_is_refused_by_name(name: str) -> None:
    """G8. Method: paths that leave the folder, with a correct checksum."""
    body = body_of(SMALL)
    body["files"][0][0] = name
    with pytest.raises(FormatError, match="outside of its folder") as refused:
        decode(sealed(body), where="m")
    assert repr(name) in refused.value.what


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("files", 0, 1), 807),  # no whole table
        (("files", 0, 1), 800),  # no checksum left for the one block
        (("files", 0, 1), -1),
        (("files", 0, 2), 792),  # the value's item then ends inside the table
        (("files", 0, 2), 816),
        (("files", 0, 2), None),
        (("files", 0, 3), ""),
        (("tensors", "w", "shape"), [3, 2]),
        (("tensors", "w", "shape"), [4, 2, 1]),
        (("tensors", "w", "shape"), [True, 2]),
        (("tensors", "w", "dtype"), "float128"),
        (("tensors", "w", "chunks", 0, 3), 669),
        (("tensors", "w", "chunks", 0, 3), None),
        (("tensors", "w", "chunks", 0, 5), -1),
        (("tensors", "w", "chunks", 0, 7), 5),
        (("tensors", "w", "chunks", 0), [0, 0, 700, 640, 0, 0, 0, 4]),
        (("tensors", "w", "chunks", 0), [0, 0, 700]),
        (("tensors", "w", "chunks", 0, 0), 1),
        (("tensors", "w", "chunks", 0, 4), 1),
        (("tensors", "w", "chunks", 0, 4), None),
        (("tensors", "w", "path"), []),
        (("tensors", "w", "path"), "model"),
        (("tensors", "w", "path"), [None]),
        (("values", 0, "checksum"), ""),
        (("values", 0, "entries"), ["lr"]),
        (("values", 0, "entries", "lr"), [1.5]),
        (("values", 0, "entries", "w"), None),  # a tensor already
        (("values", 0, "item"), [0, 700]),
        (("kind",), "half"),
        (("components",), "optimizer"),
        (("components",), {"optimizer": 1}),
        (("components",), [1]),
        (("components",), [["optimizer"]]),
        (("step",), "3"),
        (("step",), -3),
        (("step",), True),
        (("files",), [["__0_0.distcp", 808, 800, "0" * 16]] * 2),
        (("checksums", "algorithm"), "crc32"),
        (("checksums", "block_bytes"), 4096),
        (("checksums", "block_bytes"), 1 << 19),
        (("checksums", "block_bytes"), float(1 << 18)),
        (("checksums", "more"), 1),
        (("checksums",), {}),
        (("checksums",), {"algorithm": "xxh3-64"}),
        (("metadata",), [1]),
        (("metadata",), [1, "x"]),
        (("metrics", "loss"), 10**400),
        (("model",), ["llama"]),
        (("model", "rope_theta"), float("inf")),
        (("layout", "world_size"), float("nan")),
        (("timings",), ["write"]),
        (("timings", "write"), 1.5),
        (("timings", "write"), {"least": 1.0}),
        (("timings", "write", "most"), 10**400),
        (("timings", "write", "most"), -1.0),
        (("timings", "write", "most"), "2"),
        (("timings", "write", "most"), True),
        (("timings", "write", "most"), float("nan")),
        (("timings", "write", "slowest"), -1),
        (("timings", "write", "slowest"), 1.0),
        (("shared",), ["__0_0.distcp"]),
        (("shared",), {"__1_0.distcp": 1}),
        (("shared",), {"__0_0.distcp": -1}),
        (("shared",), {"__0_0.distcp": "1"}),
        (("layout",), 7),
        (("versions",), [1]),
        (("tensors",), []),
        (("values",), 1),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(path: tuple[Any, ...], value: Any) -> None:
    """G8. Method: one field replaced, with a correct checksum."""
    body = body_of(SMALL)
    place = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(FormatError):
        decode(sealed(body), where="m")


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats(allow_nan=False) | KEYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_any_json_with_a_correct_checksum_is_read_or_refused(
    data: st.DataObject,
) -> None:
    """G8. Method: any value in any place of a manifest, or instead of one."""
    body: Any = {"root": body_of(SMALL)}
    place, key = body, "root"
    while data.draw(st.booleans()) and isinstance(place[key], (dict, list)) and place[key]:
        place = place[key]
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(list(keys)))
    place[key] = data.draw(ANY_JSON)
    if not isinstance(body["root"], dict) or not body["root"]:
        body["root"] = {"other": body["root"]}
    try:
        decoded = decode(sealed(body["root"]), where="m")
    except FormatError:
        return
    assert decode(encode(decoded), where="m") == decoded


@pytest.mark.parametrize("text", [b"[1]", b'"text"', b"7", b"null", b"{}", b'{"a":', b"\xff}"])
def test_json_that_is_no_object_is_refused(text: bytes) -> None:
    """G8. Method: other JSON, and no JSON, with a correct checksum."""
    body = text[:-1] + b"}"
    with pytest.raises(FormatError):
        decode(sealed(body), where="m")
