"""Files that are made to harm whoever reads them."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from holdfast.format.dumper import pickled_int
from holdfast.format.manifest import Chunk, Manifest, Span, TensorEntry
from holdfast.format.region import Region
from manifest_bytes import encode_metadata, sealed

MODULE = b"torch.distributed.checkpoint.metadata"
SIZE = b"ctorch\nSize\n"


def metadata(**changes: Any) -> bytes:
    """Pickle the `.metadata` of one tensor, with some fields replaced."""
    region = Region(changes.pop("start", (0,)), changes.pop("stop", (4,)))
    span = changes.pop("span", Span(0, 700))
    chunks = changes.pop("chunks", (Chunk(region, changes.pop("file", "__0_0.distcp"), span),))
    shape = changes.pop("shape", (4,))
    assert not changes, changes
    return encode_metadata(Manifest({"w": TensorEntry("float32", shape, chunks, ("w",))}, {}))


def shared_chunks() -> bytes:
    """Pickle one list of chunks that three thousand entries share."""
    layout, nothing = f"c{MODULE.decode()}\nMetadata\n".encode(), b")\x81"
    chunk = f"c{MODULE.decode()}\nChunkStorageMetadata\n".encode() + nothing
    chunk += b"}(X\x07\0\0\0offsets(K\0tX\x05\0\0\0sizes(K\0tub"
    listed = b"](" + chunk + b"q\1" + b"h\1" * 3000 + b"eq\2"
    entry = f"c{MODULE.decode()}\nTensorStorageMetadata\n".encode() + nothing + b"}("
    entry += b"X\x0a\0\0\0properties" + f"c{MODULE.decode()}\nTensorProperties\n".encode()
    entry += nothing + b"(ctorch\nfloat32\ntbX\4\0\0\0size(K\0tX\6\0\0\0chunks" + listed + b"ubq\3"
    index = f"c{MODULE.decode()}\nMetadataIndex\n".encode() + nothing
    names = [b"X\5\0\0\0%05d" % number for number in range(3000)]
    named = b"}(" + names[0] + entry + b"".join(name + b"h\3" for name in names[1:]) + b"u"
    info = b"ctorch.distributed.checkpoint.filesystem\n_StorageInfo\n" + nothing
    info += b"}(X\x0d\0\0\0relative_pathX\1\0\0\0fX\6\0\0\0offsetK\0X\6\0\0\0lengthK\0ubq\4"
    stored = b"}(" + b"".join(
        index + b"}(X\3\0\0\0fqn" + name + b"X\6\0\0\0offset(K\0tub" + (info if not i else b"h\4")
        for i, name in enumerate(names)
    )
    state = b"}(X\x0c\0\0\0storage_data" + stored + b"uX\x13\0\0\0state_dict_metadata" + named
    return b"\x80\2" + layout + nothing + state + b"ub."


def laughs(levels: int = 60) -> bytes:
    """Pickle lists of lists that each contain the one before twice: short in a file, endless in
    text."""
    made = b"]q\0"
    for _ in range(levels):
        made = b"](" + made + b"h\0eq\0"
    return made


def archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as written:
        for name, content in entries.items():
            written.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def tensor_pickle(shape: bytes, strides: bytes, numel: int = 4) -> bytes:
    return (
        b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\n"
        b"X\1\0\0\0000X\3\0\0\0cpuK" + bytes([numel]) + b"tQK\0" + shape + strides + b"\x89)tR."
    )


def with_pickle(pickled: bytes) -> bytes:
    return archive({"data.pkl": pickled, "data/0": bytes(16), "version": b"3\n"})


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) >= 1, "nothing to patch"
    return data.replace(old, new)


GOOD = with_pickle(tensor_pickle(b"(K\4t", b"(K\1t"))
BIG = (10**18).to_bytes(8, "little")


def with_central(field: int, value: bytes, record: int = 1) -> bytes:
    """Replace a field of one record's entry in the directory."""
    data, at = bytearray(GOOD), -1
    for _ in range(record + 1):
        at = data.index(b"PK\1\2", at + 1)
    data[at + field : at + field + len(value)] = value
    return bytes(data)


def overlapping_records() -> bytes:
    """Make a directory with two records at one position, as a zip bomb has thousands."""
    data = bytearray(archive({"data.pkl": b"\x80\2N.", "data/0": b"1", "data/1": b"1"}))
    first = data.index(b"PK\1\2", data.index(b"PK\1\2") + 1)
    second = data.index(b"PK\1\2", first + 1)
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    data[second + 46 : second + 60] = data[first + 46 : first + 60]
    return bytes(data)


def manifest_of(nbytes: int = 700, data: int = 600, stop: int = 4) -> dict[str, object]:
    """Make a manifest of one tensor, with some numbers replaced."""
    chunk = [0, 0, nbytes, data, 0, 0, stop]
    return {
        "holdfast": 2,
        "step": 1,
        "kind": "full",
        "created": "",
        "versions": {},
        "layout": {},
        "checksums": {"algorithm": "xxh3-64", "block_bytes": 1 << 20},
        "metadata": None,
        "files": [["__0_0.distcp", 708, 700, "0" * 16]],
        "values": [],
        "tensors": {"w": {"dtype": "float32", "shape": [4], "chunks": [chunk]}},
    }


def safe(header: object, nbytes: int = 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(nbytes)


def entry(first: int, last: int, shape: object = (4,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


class Attack:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self._call = function, args

    def __reduce__(self) -> Any:
        return self._call


DEEP = 200_000
PICKLES: dict[str, bytes] = {
    "os.system": pickle.dumps(Attack(os.system, "true"), 2),
    "eval": pickle.dumps({"w": Attack(eval, "1")}, 4),
    "a call of what is a constant": b"\x80\2ctorch\nfloat32\n)R.",
    "a memo index of 2^32": b"\x80\2Nr\xff\xff\xff\xff0.",
    "a memo index of 10^18": b"\x80\2Np" + b"9" * 18 + b"\n0.",
    "a get of what was never put": b"\x80\2j\xff\xff\xff\xff.",
    "tuples nested deep as a key": b"\x80\2})" + b"\x85" * DEEP + b"Ns.",
    "tuples nested deep": b"\x80\2)" + b"\x85" * DEEP + b".",
    "lists nested deep": b"\x80\2" + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "marks nested deep": b"\x80\2" + b"(" * DEEP + b".",
    "a list that holds itself": b"\x80\2]q\0h\0a.",
    "a dict that holds itself": b"\x80\2}q\0X\1\0\0\0ah\0s.",
    "two to the sixty lists": b"\x80\2" + laughs() + b".",
    "two to the sixty lists, spelled": b"\x80\2ctorch.serialization\n_get_layout\n" + laughs()
    + b"\x85R.",
    "a tuple made of bytes over and over": b"\x80\2B\0\0\x10\0" + bytes(1 << 20) + b"q\0("
    + (SIZE + b"h\0\x85R") * 5000 + b"t.",
    "a million calls that share their arguments": b"\x80\2(" + b"N" * 100_000 + b"tq\0("
    + (f"c{MODULE.decode()}\nMetadata\n".encode() + b"h\0R") * 20_000 + b"t.",
    "a string of 2^63 bytes": b"\x80\4\x8d" + b"\xff" * 7 + b"\x7f.",
    "bytes of 2^63": b"\x80\4\x8e" + b"\xff" * 7 + b"\x7f.",
    "an int of 2^31 bytes": b"\x80\2\x8b\xff\xff\xff\x7f.",
    "an int of a million digits": b"\x80\0I" + b"9" * 1_000_000 + b"\n.",
    "keys that have one hash all of them": b"\x80\2}("
    + b"".join(b"\x8a\x0b" + ((2**61 - 1) * k).to_bytes(11, "little") + b"N" for k in range(50_000))
    + b"u.",
    "a key that costs a million to hash": b"\x80\2(" + b"K\1" * 500_000 + b"tq\0}("
    + b"h\0N" * 200_000 + b"u.",
    "an extension code": b"\x80\2\x82\x01.",
    "an object's attribute": b"\x80\2ccollections\nOrderedDict\n}X\1\0\0\0aNsb.",
    "keyword arguments": b"\x80\4ccollections\nOrderedDict\n)}X\1\0\0\0aNs\x92.",
    "nothing": b"",
    "its first half": metadata()[: len(metadata()) // 2],
}  # fmt: skip

PATHS: tuple[object, ...] = ("../x", "/etc/passwd", "a/b", 7, None, [])


Cases = dict[str, tuple[str, bytes]]
"""Parser and bytes of each file by name."""


def pickle_cases() -> Cases:
    """Make files: each pickle in each format that holds one."""
    return {
        **{f"dcp: {name}": ("dcp", data) for name, data in PICKLES.items()},
        **{f"torchzip: {name}": ("torchzip", with_pickle(data)) for name, data in PICKLES.items()},
        **{
            f"torchfile: {name}": ("torchfile", with_pickle(data)) for name, data in PICKLES.items()
        },
        **{
            f"dcp: the path {path}": ("dcp", metadata(file=path))
            for path in ("../step-1/__0_0.distcp", "/etc/passwd", "a/b", "..", "", "a\0b", "a\\b")
        },
    }


def dcp_cases() -> Cases:
    """Make files: `.metadata` of stock DCP."""
    return {
        "dcp: a chunk outside of its shape": ("dcp", metadata(stop=(10**18,))),
        "dcp: a size past 2^63": (
            "dcp",
            metadata(shape=(2**62,), stop=(2**62,)).replace(pickled_int(2**62), pickled_int(2**63)),
        ),
        "dcp: a million dims": ("dcp", metadata(shape=(1,) * 10**6)),
        "dcp: a negative offset": (
            "dcp",
            metadata(span=Span(30000, 700)).replace(pickled_int(30000), b"J\xff\xff\xff\xff"),
        ),
        "dcp: chunks that start at one place": (
            "dcp",
            metadata(
                chunks=(
                    Chunk(Region((0,), (4,)), "f", Span(0, 9)),
                    Chunk(Region((0,), (3,)), "f", Span(0, 9)),
                )
            ),
        ),
        "dcp: nine million chunks in 200 kB": ("dcp", shared_chunks()),
    }


def archive_cases() -> Cases:
    """Make files: zip archives of torch."""
    return {
        **{
            f"{parser}: {name}": (parser, data)
            for parser in ("torchzip", "torchfile")
            for name, data in {
                "a gigabyte of zeros, compressed": archive(
                    {"data.pkl": bytes(100 << 20)}, zipfile.ZIP_DEFLATED
                ),
                "records at one place": overlapping_records(),
                "a record of 4 GiB": with_central(20, b"\xfe\xff\xff\xff" * 2),
                "a record that begins past its archive": with_central(42, b"\xf0\xff\xff\xff"),
                "an encrypted record": with_central(8, b"\1\0"),
                "a directory of 4 GiB": GOOD[:-10] + b"\xff\xff\xff\xff" + GOOD[-6:],
                "a directory of 65535 records": GOOD[:-14] + b"\xff\xff\xff\xff" + GOOD[-10:],
                "a directory elsewhere": GOOD[:-6] + b"\0\0\0\0\0\0",
                "bytes after its end": GOOD + b"x",
                "a record twice": patched(
                    archive({"data.pkl": b"\x80\2N.", "data/0": b"", "data/1": b""}),
                    b"data/1",
                    b"data/0",
                ),
                "a storage that is not there": with_pickle(
                    patched(tensor_pickle(b"(K\4t", b"(K\1t"), b"\0\0\x000X", b"\0\0\x009X")
                ),
                "a tensor past its storage": with_pickle(tensor_pickle(b"(K\5t", b"(K\1t")),
                "a tensor of 10^18 elements": with_pickle(
                    tensor_pickle(b"(\x8a\x08" + BIG + b"t", b"(K\1t")
                ),
                "a stride of 10^18": with_pickle(
                    tensor_pickle(b"(K\2t", b"(\x8a\x08" + BIG + b"t")
                ),
                "a negative stride": with_pickle(tensor_pickle(b"(K\2t", b"(J\xff\xff\xff\xfft")),
            }.items()
        },
        "torchfile: a tensor of 10^18 times one element": (
            "torchfile",
            with_pickle(tensor_pickle(b"(\x8a\x08" + BIG + b"t", b"(K\0t")),
        ),
        "torchfile: the stream of torch before 1.6": ("torchfile", pickle.dumps(0x1950A86A, 2)),
    }


def manifest_cases() -> Cases:
    """Make files: `manifest.json`."""
    return {
        "manifest: no checksum": ("manifest", json.dumps(manifest_of()).encode()),
        "manifest: nested deep": ("manifest", sealed(b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}")),
        "manifest: a region of 10^18": ("manifest", sealed(manifest_of(stop=10**18))),
        "manifest: an item of 10^18": ("manifest", sealed(manifest_of(nbytes=10**18))),
        "manifest: data outside of its item": ("manifest", sealed(manifest_of(data=10**18))),
        "manifest: an int of a million digits": (
            "manifest",
            sealed(b'{"holdfast":' + b"9" * 1_000_000 + b"}"),
        ),
        **{
            f"manifest: the path {wrong}": (
                "manifest",
                sealed({**manifest_of(), "files": [[wrong, 708, 700, "0" * 16]]}),
            )
            for wrong in PATHS
        },
        "manifest: a file twice": (
            "manifest",
            sealed({**manifest_of(), "files": [["f", 708, 700, "0" * 16]] * 2}),
        ),
    }


def safetensors_cases() -> Cases:
    """Make files: safetensors files and their index."""
    return {
        "safetensors: a header of 2^63": ("safetensors", safe({}, length=2**63)),
        "safetensors: a header past its file": ("safetensors", safe({}, length=1000)),
        "safetensors: too short": ("safetensors", b"\1\0\0"),
        "safetensors: nested deep": (
            "safetensors",
            safe(b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}"),
        ),
        "safetensors: a name twice": (
            "safetensors",
            safe(b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 16)).encode(),) * 2)),
        ),
        "safetensors: a list": ("safetensors", safe(b"[1, 2]")),
        "safetensors: not a number": ("safetensors", safe(b'{"a":NaN}')),
        **{
            f"safetensors: {name}": ("safetensors", safe(header, nbytes))
            for name, header, nbytes in (
                ("overlapping tensors", {"a": entry(0, 16), "b": entry(8, 24)}, 24),
                ("one place for two", {"a": entry(0, 16), "b": entry(0, 16)}, 16),
                ("a gap", {"a": entry(0, 16), "b": entry(20, 36)}, 36),
                ("bytes after the last", {"a": entry(0, 16)}, 17),
                ("a tensor past its file", {"a": entry(0, 16)}, 15),
                ("another size than its shape", {"a": entry(0, 12)}, 12),
                ("10^18 elements", {"a": entry(0, 16, [10**18])}, 16),
                ("sizes whose product wraps to 0", {"a": entry(0, 0, [2**32, 2**32])}, 0),
                ("a negative size", {"a": entry(0, 16, [-4])}, 16),
                ("a size that is true", {"a": entry(0, 4, [True])}, 4),
                ("a size of 0.5", {"a": entry(0, 16, [4.0])}, 16),
                ("a negative place", {"a": entry(-16, 0)}, 16),
                ("an end before its start", {"a": entry(16, 0)}, 16),
                ("an unknown dtype", {"a": entry(0, 16, dtype="F128")}, 16),
                ("a dtype that is a list", {"a": entry(0, 16, dtype=[])}, 16),
                ("another key", {"a": entry(0, 16) | {"code": "x"}}, 16),
                ("metadata that is no text", {"__metadata__": {"a": 1}}, 0),
                ("a million dims", {"a": entry(0, 4, [1] * 10**6)}, 4),
            )
        },
        **{
            f"index: {name}": ("index", data)
            for name, data in {
                "a path outside": b'{"weight_map": {"a": "../model.safetensors"}}',
                "an absolute path": b'{"weight_map": {"a": "/etc/passwd"}}',
                "a path that is a number": b'{"weight_map": {"a": 7}}',
                "no object": b"[]",
                "no map": b'{"weight_map": []}',
                "a name twice": b'{"weight_map": {"a": "b", "a": "c"}}',
                "nested deep": b"[" * DEEP,
                "not text": b"\xff\xfe\xfd",
            }.items()
        },
    }


def cases() -> Cases:
    """Make every file. Returns its parser and its bytes by name."""
    return {
        **pickle_cases(),
        **dcp_cases(),
        **archive_cases(),
        **manifest_cases(),
        **safetensors_cases(),
    }
