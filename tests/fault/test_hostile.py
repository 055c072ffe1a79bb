"""Crafted files that attack their reader: each is refused, in bounded time and memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from checkpoints import save_step, save_stock
from holdfast.catalog.catalog import open_manifest
from holdfast.catalog.verify import VerifyTarget, verify
from holdfast.errors import DamagedError, FormatError
from holdfast.format import checksum
from holdfast.format.manifest import Chunk, Manifest, Span, TensorEntry
from holdfast.format.pickles import pickled_int
from holdfast.format.region import Region
from holdfast.storage.local import LocalStore
from holdfast.storage.remote import RemoteStore
from holdfast.testing.failing import FailingStore
from manifest_bytes import encode_metadata

MEMORY_BYTES = 512 << 20
"""Of address space, interpreter included: the files below ask for up to 2^63."""

CPU_S = 10
"""Of processor time: the machine may have other things to do."""

READ = """
import json, os, resource, sys
from pathlib import Path
from holdfast.errors import DamagedError, FormatError
from holdfast.format import dcp, manifest, safetensors, torchfile, torchzip
from holdfast.format.manifest import Span

def read(parser, data):
    fetch = lambda offset, nbytes: data[offset : offset + nbytes]
    {
        "dcp": lambda: dcp.decode_metadata(data, where="f"),
        "manifest": lambda: manifest.decode(data, where="f"),
        "torchzip": lambda: torchzip.locate(fetch, Span(0, len(data)), where="f"),
        "torchfile": lambda: torchfile.read_file(fetch, len(data), file="f", where="f"),
        "safetensors": lambda: safetensors.read_file(fetch, len(data), file="f", where="f"),
        "index": lambda: safetensors.read_index(data, where="f"),
    }[parser]()

def attempt(parser, path, said):
    data = path.read_bytes()
    limits = zip((resource.RLIMIT_AS, resource.RLIMIT_CPU), map(int, sys.argv[2:]))
    for limit, most in limits:
        resource.setrlimit(limit, (most, most))
    try:
        read(parser, data)
        result = "it was read"
    except (FormatError, DamagedError) as error:
        result = "refused: " + str(error)[:300]
    except BaseException as error:
        result = type(error).__name__ + " " + str(error)[:300]
    said.write_text(result)
    os._exit(0)

folder = Path(sys.argv[1])
for name, parser in json.loads((folder / "parsers").read_text()).items():
    child = os.fork()
    if not child:
        attempt(parser, folder / name, folder / (name + ".said"))
    _, status = os.waitpid(child, 0)
    if status:
        (folder / (name + ".said")).write_text(f"died of {status}")
"""

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


def sealed(body: object) -> bytes:
    """Add a correct checksum to any manifest."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    seal = checksum.to_hex([checksum.checksum(text)]).encode()
    return text[:-1] + b',"checksum":"' + seal + b'"}'


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

CASES: dict[str, tuple[str, bytes]] = {
    **{f"dcp: {name}": ("dcp", data) for name, data in PICKLES.items()},
    **{f"torchzip: {name}": ("torchzip", with_pickle(data)) for name, data in PICKLES.items()},
    **{f"torchfile: {name}": ("torchfile", with_pickle(data)) for name, data in PICKLES.items()},
    **{
        f"dcp: the path {path}": ("dcp", metadata(file=path))
        for path in ("../step-1/__0_0.distcp", "/etc/passwd", "a/b", "..", "", "a\0b", "a\\b")
    },
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
            "a stride of 10^18": with_pickle(tensor_pickle(b"(K\2t", b"(\x8a\x08" + BIG + b"t")),
            "a negative stride": with_pickle(tensor_pickle(b"(K\2t", b"(J\xff\xff\xff\xfft")),
        }.items()
    },
    "torchfile: a tensor of 10^18 times one element": (
        "torchfile",
        with_pickle(tensor_pickle(b"(\x8a\x08" + BIG + b"t", b"(K\0t")),
    ),
    "torchfile: the stream of torch before 1.6": ("torchfile", pickle.dumps(0x1950A86A, 2)),
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
    "safetensors: a header of 2^63": ("safetensors", safe({}, length=2**63)),
    "safetensors: a header past its file": ("safetensors", safe({}, length=1000)),
    "safetensors: too short": ("safetensors", b"\1\0\0"),
    "safetensors: nested deep": ("safetensors", safe(b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}")),
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


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the error of reading each file, each in a forked process."""
    folder = tmp_path_factory.mktemp("hostile")
    for number, (_, data) in enumerate(CASES.values()):
        (folder / str(number)).write_bytes(data)
    parsers = {str(number): parser for number, (parser, _) in enumerate(CASES.values())}
    (folder / "parsers").write_text(json.dumps(parsers))
    limits = (str(MEMORY_BYTES), str(CPU_S))
    subprocess.run([sys.executable, "-c", READ, str(folder), *limits], check=True)
    return {name: (folder / f"{i}.said").read_text() for i, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_a_file_made_to_harm_is_refused(refusals: dict[str, str], name: str) -> None:
    """G8. Method: each file in a process with 512 MiB of address space and 10 s of CPU time. No
    code runs, no process crashes, no path leads outside of the folder."""
    assert refusals[name].startswith("refused:"), refusals[name]


def test_chunks_that_overlap_are_found_and_never_loaded(tmp_path: Path) -> None:
    """G6, G8. Method: a stock checkpoint whose index is replaced by one with two chunks that half
    overlap."""
    folder = tmp_path / "stock"
    save_stock(folder)
    tensor = torch.arange(8.0)
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    (folder / "__0_0.distcp").write_bytes(buffer.getvalue())
    item = Span(0, len(buffer.getvalue()))
    chunks = tuple(Chunk(Region((start,), (start + 8,)), "__0_0.distcp", item) for start in (0, 4))
    index = encode_metadata(Manifest({"w": TensorEntry("float32", (16,), chunks, ("w",))}, {}))
    # Like Python's pickler, so that it is read as a stock one.
    (folder / ".metadata").write_bytes(index[:2] + b"\x95" + struct.pack("<Q", 0) + index[2:])
    assert "some elements are there twice" in str(
        verify(VerifyTarget(LocalStore(tmp_path), "stock")).findings
    )
    with pytest.raises(DamagedError, match="twice"):
        holdfast.load(folder, {"w": torch.zeros(16)})


def test_shards_too_tangled_to_be_compared_are_refused_in_time() -> None:
    """G8. Method: five thousand regions, each of which crosses the rows and columns of all
    others."""
    from holdfast.format.region import first_overlap

    count = 5000
    tangled = [Region((i, 2 * i), (count + i, 2 * i + 1)) for i in range(count)]
    with pytest.raises(FormatError, match="unevenly"):
        first_overlap(tangled)


@pytest.mark.parametrize("kind", ["step", "stock"])
def test_a_link_to_a_file_outside_of_the_folder_is_refused(tmp_path: Path, kind: str) -> None:
    """G8: a checkpoint from elsewhere must not read files of this machine into a model. Method: a
    link in place of a data file, which was moved away; opened as a folder, by `file://` and through
    a wrapped store. A link within the folder is followed."""
    folder = save_step(tmp_path) if kind == "step" else save_stock(tmp_path / "stock")
    path = folder / "__0_0.distcp"
    path.rename(folder / "inside")
    path.symlink_to("inside")
    open_manifest(LocalStore(tmp_path), folder.name)
    path.unlink()
    (folder / "inside").rename(tmp_path / "outside")
    path.symlink_to("../outside")
    with pytest.raises(DamagedError, match="link to a place outside"):
        open_manifest(LocalStore(tmp_path), folder.name)
    assert not verify(VerifyTarget(LocalStore(tmp_path), folder.name)).good
    for wrapped in (RemoteStore(f"file://{tmp_path}"), FailingStore(LocalStore(tmp_path), nothing)):
        with pytest.raises(DamagedError, match="link to a place outside"):
            open_manifest(wrapped, folder.name)


def nothing(verb: str, key: str) -> None: ...


def test_the_limits_of_these_tests_are_real(tmp_path: Path) -> None:
    """Method: Python's own unpickler on one of the files, under the same memory limit, crashes or
    runs out of memory."""
    path = tmp_path / "f"
    path.write_bytes(PICKLES["a memo index of 2^32"])
    script = (
        "import pickle, resource, sys\n"
        "limit = int(sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "pickle.loads(open(sys.argv[1], 'rb').read())\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(path), str(MEMORY_BYTES)], capture_output=True, text=True
    )
    assert "MemoryError" in ran.stderr
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != MEMORY_BYTES
