"""Coverage-guided fuzzing of every parser: `pip install atheris`, then

    python tests/fuzz/fuzz_parsers.py dcp corpus -max_total_time=600

`dcp` is one of `TARGETS`. `corpus` is a folder; if it does not exist, it is created with real
files. Further arguments go to libFuzzer. An input that raises anything but `FormatError` or
`DamagedError`, or takes more than 10 s or a GiB, is written to `crash-*` and ends the run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"
BOUNDS = ("-timeout=10", "-rss_limit_mb=1024", "-max_len=65536")


def parse_dcp(data: bytes) -> object:
    """Parse `.metadata` of a stock checkpoint, and check its coverage."""
    from holdfast.catalog.structure import check_coverage
    from holdfast.format.dcp import decode_metadata

    return list(check_coverage(decode_metadata(data, where="f")))


def parse_manifest(data: bytes) -> object:
    """Parse `manifest.json`, after correcting its checksum."""
    from holdfast.format.checksum import checksum, to_hex
    from holdfast.format.manifest import decode

    tail = b',"checksum":"' + to_hex([checksum(data)]).encode() + b'"}'
    return decode(data[:-1] + tail, where="f")


def parse_torchzip(data: bytes) -> object:
    """Parse an item of a stock data file."""
    from holdfast.format.manifest import Span
    from holdfast.format.torchzip import locate

    return locate(lambda at, nbytes: data[at : at + nbytes], Span(0, len(data)), where="f")


def parse_torchfile(data: bytes) -> object:
    """Parse a `.pt` file."""
    from holdfast.format.torchfile import read_file

    return read_file(lambda at, nbytes: data[at : at + nbytes], len(data), file="f", where="f")


def parse_safetensors(data: bytes) -> object:
    """Parse a safetensors file."""
    from holdfast.format.safetensors import read_file

    return read_file(lambda at, nbytes: data[at : at + nbytes], len(data), file="f", where="f")


def parse_index(data: bytes) -> object:
    """Parse the index of an HF folder."""
    from holdfast.format.safetensors import read_index

    return read_index(data, where="f")


TARGETS: dict[str, Callable[[bytes], object]] = {
    "dcp": parse_dcp,
    "manifest": parse_manifest,
    "torchzip": parse_torchzip,
    "torchfile": parse_torchfile,
    "torchstream": parse_torchfile,
    "safetensors": parse_safetensors,
    "index": parse_index,
}


def attempt(target: str, data: bytes) -> str:
    """Run a parser; return `read` or `refused`, and raise any unexpected error."""
    from holdfast.errors import DamagedError, FormatError

    try:
        TARGETS[target](data)
    except (FormatError, DamagedError):
        return "refused"
    return "read"


def seeds(target: str) -> list[bytes]:
    """Return real inputs, all of which are readable."""
    if target == "dcp":
        # The parser also reads a `.metadata` that Holdfast wrote. Only the catalog refuses to load
        # that as a stock checkpoint.
        return [(GOLDEN / name / ".metadata").read_bytes() for name in ("stock", "solo", "ranks")]
    if target == "manifest":
        texts = [(GOLDEN / name / "manifest.json").read_bytes() for name in ("solo", "ranks")]
        return [
            json.dumps(_without_checksum(text), separators=(",", ":")).encode() for text in texts
        ]
    if target == "torchzip":
        stored = (GOLDEN / "stock/__0_0.distcp").read_bytes()
        starts = [at for at in range(len(stored)) if stored.startswith(b"PK\3\4", at)]
        ends = [at for at in range(len(stored)) if stored.startswith(b"PK\5\6", at)]
        items, start = [], 0
        for end in ends:
            items.append(stored[start : end + 22])
            start = next((at for at in starts if at >= end + 22), 0)
        return [item for item in items if attempt("torchzip", item) == "read"][:20]
    if target == "index":
        names = {f"layers.{n}.weight": f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}
        return [json.dumps({"metadata": {"total_size": 12}, "weight_map": names}).encode()]
    if target == "safetensors":
        return [_safetensors()]
    if target == "torchstream":
        return [_torchfile(_use_new_zipfile_serialization=False)]
    return [_torchfile()]


def _without_checksum(text: bytes) -> dict[str, object]:
    found: dict[str, object] = json.loads(text)
    del found["checksum"]
    return found


def _safetensors() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(range(32))


def _torchfile(**options: bool) -> bytes:
    import io
    from argparse import Namespace

    import torch

    state = {"w": torch.arange(12.0).view(3, 4).T, "n": [1, "x", None, {"b": True}]}
    file = io.BytesIO()
    torch.save({**state, "left out": Namespace(a=[1])}, file, **options)
    return file.getvalue()


def main() -> None:
    """Fuzz one parser until stopped."""
    import atheris

    target, corpus = sys.argv[1], Path(sys.argv[2])
    with atheris.instrument_imports(include=["holdfast.format", "holdfast.catalog"]):
        import holdfast.catalog.structure
        import holdfast.format.dcp
        import holdfast.format.manifest
        import holdfast.format.safetensors
        import holdfast.format.torchfile  # noqa: F401 - instrumented as it is imported
    if not corpus.exists():
        corpus.mkdir(parents=True)
        for number, seed in enumerate(seeds(target)):
            (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *BOUNDS, str(corpus), *sys.argv[3:]], lambda d: attempt(target, d))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
