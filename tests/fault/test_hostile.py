"""Crafted files that attack their reader: each is refused, in bounded time and memory."""

from __future__ import annotations

import io
import json
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import holdfast
from checkpoints import save_step, save_stock
from holdfast.catalog.catalog import open_manifest
from holdfast.catalog.verify import VerifyTarget, verify
from holdfast.errors import DamagedError, FormatError
from holdfast.format.manifest import Chunk, Manifest, Span, TensorEntry
from holdfast.format.region import Region
from holdfast.storage.local import LocalStore
from holdfast.storage.remote import RemoteStore
from holdfast.testing.failing import FailingStore
from hostile_files import PICKLES, cases
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


def test_a_file_made_to_harm_is_refused(tmp_path: Path) -> None:
    """G8. Method: each file in a process with 512 MiB of address space and 10 s of CPU time. No
    code runs, no process crashes, no path leads outside of the folder."""
    made = cases()
    assert len(made) > 150
    for number, (_, data) in enumerate(made.values()):
        (tmp_path / str(number)).write_bytes(data)
    parsers = {str(number): parser for number, (parser, _) in enumerate(made.values())}
    (tmp_path / "parsers").write_text(json.dumps(parsers))
    limits = (str(MEMORY_BYTES), str(CPU_S))
    subprocess.run([sys.executable, "-c", READ, str(tmp_path), *limits], check=True)
    said = {name: (tmp_path / f"{number}.said").read_text() for number, name in enumerate(made)}
    assert {name: text for name, text in said.items() if not text.startswith("refused:")} == {}


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
