"""Turn text into a token file, which all ranks and later runs use."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from holdfast.errors import FormatError, NotFoundError, UsageError
from holdfast.trainer.config import Config

SUFFIXES = (".txt", ".jsonl", ".parquet")
"""Suffixes of data files at or below `training.dataset_path`."""

EXTRA_HINT = "pip install 'holdfast[hf]'"
"""Hint that installs support for tokenizers, parquet files and the Hugging Face hub."""


class ByteTokenizer:
    """Tokenizer with one token per byte of UTF-8, a begin token and an end token."""

    vocab_size = 258
    """Highest id plus one."""

    name = "bytes"
    """Name of the tokenizer. Two tokenizers that encode a text differently have different names."""

    def encode(self, text: str) -> npt.NDArray[np.integer[Any]]:
        """Return the bytes of `text` as token ids, between begin token 256 and end token 257."""
        ids = np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8)
        return np.concatenate(([256], ids, [257])).astype(np.uint16)


class FileTokenizer:
    """Tokenizer from a Hugging Face `tokenizer.json`."""

    def __init__(self, path: Path) -> None:
        """Load the file `path`."""
        try:
            from tokenizers import Tokenizer as Loaded
        except ImportError:
            raise UsageError(
                f"`{path}` needs the package `tokenizers`, which is not installed", hint=EXTRA_HINT
            ) from None
        try:
            self._loaded = Loaded.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - the package raises plain Exception
            raise FormatError(f"`{path}` is not a tokenizer: {error}") from None
        self.vocab_size: int = self._loaded.get_vocab_size(with_added_tokens=True)
        self.name: str = xxhash.xxh3_128_hexdigest(path.read_bytes())

    def encode(self, text: str) -> npt.NDArray[np.integer[Any]]:
        """Return the token ids of `text`, with the special tokens that the file specifies."""
        return np.asarray(self._loaded.encode(text).ids, dtype=np.uint32)


Tokenizer = ByteTokenizer | FileTokenizer


def open_tokenizer(hf_assets_path: str | None) -> Tokenizer:
    """Return the tokenizer in `model.hf_assets_path`; without one, the `ByteTokenizer`."""
    if hf_assets_path is None:
        return ByteTokenizer()
    folder = Path(hf_assets_path)
    if not folder.is_dir():
        raise NotFoundError(f"`model.hf_assets_path`: there is no folder `{folder}`")
    file = folder / "tokenizer.json"
    return FileTokenizer(file) if file.is_file() else ByteTokenizer()


@dataclass(frozen=True, slots=True)
class Tokens:
    """Data set as one sequence of tokens."""

    ids: npt.NDArray[np.integer[Any]]
    """Token ids, memory-mapped from the token file."""

    fingerprint: str
    """Hash of all token ids, the same on every machine for the same text and tokenizer."""


def open_tokens(config: Config, tokenizer: Tokenizer) -> Tokens:
    """Open the token file of the configured data set; write it first if there is none.

    Token files are in `tokens` below the dump folder. Their names are hashes of the tokenizer and
    of the data files' names, sizes and modification times. Several processes may write the same
    token file at once: each writes a temporary file, and the last rename wins.

    Raises:
        NotFoundError: there is no such data set.
        FormatError: the data set has no text, or its files are not text.
        UsageError: a package that the data set needs is not installed.
    """
    text = _open_text(config)
    key = xxhash.xxh3_128_hexdigest(f"{text.identity}\n{tokenizer.name}".encode())
    folder = Path(config.job.dump_folder) / "tokens"
    ids_file, info_file = folder / f"{key}.bin", folder / f"{key}.json"
    if (tokens := _open_cached(ids_file, info_file)) is not None:
        return tokens
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    digest, count = xxhash.xxh3_128(), 0
    temporary = ids_file.with_suffix(f".bin.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            for document in text.documents():
                ids = tokenizer.encode(document)
                # Always hashed as 32 bits, so that the file's dtype does not change the hash.
                digest.update(ids.astype("<u4").tobytes())
                file.write(ids.astype(dtype).tobytes())
                count += len(ids)
        temporary.replace(ids_file)
    finally:
        temporary.unlink(missing_ok=True)
    info = {"count": count, "dtype": dtype.name, "fingerprint": digest.hexdigest()}
    temporary = info_file.with_suffix(f".json.{os.getpid()}")
    temporary.write_text(json.dumps(info))
    # Renamed last, since the info file marks the token file as complete.
    temporary.replace(info_file)
    if (tokens := _open_cached(ids_file, info_file)) is None:
        raise FormatError(f"`{text.name}` holds no text: 0 tokens")
    return tokens


def _open_cached(ids_file: Path, info_file: Path) -> Tokens | None:
    try:
        info = json.loads(info_file.read_text())
        dtype = np.dtype(info["dtype"])
        if info["count"] == 0 or ids_file.stat().st_size != info["count"] * dtype.itemsize:
            return None
        return Tokens(np.memmap(ids_file, dtype=dtype, mode="r"), info["fingerprint"])
    except (FileNotFoundError, ValueError, KeyError):
        return None


@dataclass(frozen=True, slots=True)
class Text:
    """Data set as text."""

    name: str
    identity: str
    """Text that changes with the names, sizes and times of the data files; for a data set on the
    Hugging Face hub, its name."""

    documents: Callable[[], Iterator[str]]
    """Function that yields the documents in a fixed order."""


def _open_text(config: Config) -> Text:
    dataset, dataset_path = config.training.dataset, config.training.dataset_path
    if dataset_path is not None:
        root = Path(dataset_path)
        if root.is_file() and root.suffix in SUFFIXES:
            return _text_of_files(dataset_path, root.parent, [root])
        paths = [path for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file()]
        if not paths:
            raise NotFoundError(
                f"`training.dataset_path`: there is no file with suffix {', '.join(SUFFIXES)} "
                f"at or below `{root}`"
            )
        return _text_of_files(dataset_path, root, paths)
    if dataset == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
        paths = [
            path for path in root.rglob("*.py") if skipped.isdisjoint(path.relative_to(root).parts)
        ]
        return _text_of_files("stdlib", root, paths)
    return Text(dataset, identity=dataset, documents=partial(_hub_documents, dataset))


def _text_of_files(name: str, root: Path, paths: list[Path]) -> Text:
    """Return the text of data files at or below `root`, ordered by path."""
    paths.sort(key=lambda path: path.relative_to(root).as_posix())
    stats = [(path.relative_to(root).as_posix(), path.stat()) for path in paths]
    identity = "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
    return Text(name, identity, documents=partial(_file_documents, paths))


def _file_documents(paths: Iterable[Path]) -> Iterator[str]:
    """Yield the documents: .py and .txt files, lines of .jsonl files, rows of .parquet files."""
    for path in paths:
        if path.suffix == ".jsonl":
            yield from _json_lines(path)
        elif path.suffix == ".parquet":
            rows = _import_datasets(f"`{path}`").Dataset.from_parquet(str(path), streaming=True)
            yield from (_text_of(row, f"`{path}`") for row in rows)
        else:
            yield path.read_text(encoding="utf-8", errors="surrogateescape")


def _json_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise FormatError(f"`{path}`: line {number} is not JSON: {error}") from None
            yield _text_of(row, f"`{path}`: line {number}")


def _hub_documents(dataset: str) -> Iterator[str]:
    """Yield the texts of a data set on the Hugging Face hub, `owner/name[:config]`, as they are
    downloaded. Its split is `train`."""
    datasets = _import_datasets(f"`training.dataset` {dataset}")
    path, _, subset = dataset.partition(":")
    try:
        rows = datasets.load_dataset(path, subset or None, split="train", streaming=True)
    except Exception as error:  # noqa: BLE001 - many kinds: no such name, no network, no split
        raise NotFoundError(
            f"`training.dataset`: cannot load {dataset} from the Hugging Face hub: {error}",
            hint="--training.dataset_path PATH for local files, or --training.dataset stdlib",
        ) from None
    yield from (_text_of(row, f"`{dataset}`") for row in rows)


def _import_datasets(user: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"{user} needs the package `datasets`, which is not installed",
            hint=f"{EXTRA_HINT}; `--training.dataset stdlib` needs no package",
        ) from None
    return datasets


def _text_of(row: Any, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise FormatError(f"{where} must have text under the key `text`, found: {found}")
    return text
