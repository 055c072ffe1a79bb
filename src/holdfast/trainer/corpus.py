"""Text to a file of tokens, written once and shared by all ranks and by later runs."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from holdfast.errors import FormatError, NotFoundError, UsageError
from holdfast.trainer.config import Config

SUFFIXES = (".txt", ".jsonl", ".parquet")
"""Kinds of files that `training.dataset_path` may name or hold."""

EXTRA_HINT = "pip install 'holdfast[hf]'"
"""What brings the packages for tokenizers, parquet files and the Hugging Face hub."""


class Tokenizer(Protocol):
    """Text to token ids."""

    vocab_size: int
    """One more than the highest id."""

    name: str
    """Differs between tokenizers that give different ids."""

    def encode(self, text: str) -> npt.NDArray[np.integer[Any]]:
        """The ids of one document, its beginning and end marked."""
        ...


class ByteTokenizer:
    """One token per byte of UTF-8, and one each for the beginning and the end of a document."""

    vocab_size = 258
    name = "bytes"

    def encode(self, text: str) -> npt.NDArray[np.integer[Any]]:
        """The bytes, between 256 and 257."""
        ids = np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8)
        return np.concatenate(([256], ids, [257])).astype(np.uint16)


class FileTokenizer:
    """The tokenizer in a `tokenizer.json`, as Hugging Face folders hold one."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError without the extra `hf`, FormatError where the file is no tokenizer."""
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
        """The ids, with the special tokens that the file asks for."""
        return np.asarray(self._loaded.encode(text).ids, dtype=np.uint32)


def open_tokenizer(hf_assets_path: str | None) -> Tokenizer:
    """The tokenizer of `model.hf_assets_path`, or bytes where there is none.

    Raises:
        NotFoundError: the folder is not there.
    """
    if hf_assets_path is None:
        return ByteTokenizer()
    folder = Path(hf_assets_path)
    if not folder.is_dir():
        raise NotFoundError(f"`model.hf_assets_path`: there is no folder `{folder}`")
    file = folder / "tokenizer.json"
    return FileTokenizer(file) if file.is_file() else ByteTokenizer()


@dataclass(frozen=True, slots=True)
class Tokens:
    """A whole data set as one sequence of tokens."""

    ids: npt.NDArray[np.integer[Any]]
    """The tokens, mapped from the file: only what is looked at is read."""

    fingerprint: str
    """Hash of all tokens: the same text and tokenizer have the same one on any machine."""


def open_tokens(config: Config, tokenizer: Tokenizer) -> Tokens:
    """The tokens of the configured data set; made on first use, which can take a while.

    They lie below the dump folder, keyed by names, sizes and times of the files and by the
    tokenizer. Several processes may come at once: each writes aside and the last rename wins.
    """
    text = _source(config)
    key = xxhash.xxh3_128_hexdigest(f"{text.identity}\n{tokenizer.name}".encode())
    folder = Path(config.job.dump_folder) / "tokens"
    ids_file, facts_file = folder / f"{key}.bin", folder / f"{key}.json"
    if (tokens := _cached(ids_file, facts_file)) is not None:
        return tokens
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    digest, count = xxhash.xxh3_128(), 0
    aside = ids_file.with_suffix(f".bin.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            for document in text.documents():
                ids = tokenizer.encode(document)
                # Hashed in one width: a tokenizer's size does not change what the data are.
                digest.update(ids.astype("<u4").tobytes())
                file.write(ids.astype(dtype).tobytes())
                count += len(ids)
        aside.replace(ids_file)
    finally:
        aside.unlink(missing_ok=True)
    facts = {"count": count, "dtype": dtype.name, "fingerprint": digest.hexdigest()}
    facts_aside = facts_file.with_suffix(f".json.{os.getpid()}")
    facts_aside.write_text(json.dumps(facts))
    # Last: where it stands, the tokens stand.
    facts_aside.replace(facts_file)
    if (tokens := _cached(ids_file, facts_file)) is None:
        raise FormatError(f"`{text.name}` holds no text: 0 tokens")
    return tokens


def _cached(ids_file: Path, facts_file: Path) -> Tokens | None:
    try:
        facts = json.loads(facts_file.read_text())
        dtype = np.dtype(facts["dtype"])
        if facts["count"] == 0 or ids_file.stat().st_size != facts["count"] * dtype.itemsize:
            return None
        return Tokens(np.memmap(ids_file, dtype=dtype, mode="r"), facts["fingerprint"])
    except (FileNotFoundError, ValueError, KeyError):
        return None


# ---------------------------------------------------------------------------------------- text


class Text(Protocol):
    """A data set before it is cut into tokens."""

    name: str
    """How messages call it."""

    identity: str
    """Differs where the text does, as far as can be told without reading it."""

    def documents(self) -> Iterator[str]:
        """The texts, in an order that never changes."""
        ...


class Files:
    """The files of a folder, by path, or one file."""

    def __init__(self, name: str, root: Path, paths: Iterable[Path]) -> None:
        self.name = name
        self._paths = sorted(paths, key=lambda path: path.relative_to(root).as_posix())
        facts = [(path, path.stat()) for path in self._paths]
        self.identity: str = "\n".join(
            f"{path.relative_to(root).as_posix()} {stat.st_size} {stat.st_mtime_ns}"
            for path, stat in facts
        )

    def documents(self) -> Iterator[str]:
        """A document per .py or .txt file, line of a .jsonl or row of a .parquet."""
        for path in self._paths:
            if path.suffix == ".jsonl":
                yield from _json_lines(path)
            elif path.suffix == ".parquet":
                yield from _parquet_rows(path)
            else:
                yield path.read_text(encoding="utf-8", errors="surrogateescape")


class HFDataset:
    """The `text` column of a data set on the Hugging Face hub, by `owner/name[:config]`."""

    def __init__(self, name: str) -> None:
        self.identity: str = name
        self.name: str = name

    def documents(self) -> Iterator[str]:
        """The rows of the split `train`, as they are downloaded."""
        try:
            from datasets import load_dataset
        except ImportError:
            raise UsageError(
                f"`training.dataset` {self.name} needs the package `datasets`, which is not "
                "installed; without it there is `stdlib`",
                hint=EXTRA_HINT,
            ) from None
        path, _, subset = self.name.partition(":")
        try:
            rows = load_dataset(path, subset or None, split="train", streaming=True)
        except Exception as error:  # noqa: BLE001 - many kinds: no such name, no network, no split
            raise NotFoundError(
                f"`training.dataset`: {self.name} cannot be had from the Hugging Face hub: {error}",
                hint="local files: --training.dataset_path PATH; built in: stdlib",
            ) from None
        for row in rows:
            yield _text_of(row, f"`{self.name}`")


def _source(config: Config) -> Text:
    given = config.training.dataset_path
    if given is not None:
        root = Path(given)
        if root.is_file() and root.suffix in SUFFIXES:
            return Files(given, root.parent, [root])
        found = [path for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file()]
        if not found:
            raise NotFoundError(
                f"`training.dataset_path`: there is no file of kind {', '.join(SUFFIXES)} "
                f"at or below `{root}`"
            )
        return Files(given, root, found)
    if config.training.dataset == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
        found = [
            path for path in root.rglob("*.py") if skipped.isdisjoint(path.relative_to(root).parts)
        ]
        return Files("stdlib", root, found)
    return HFDataset(config.training.dataset)


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


def _parquet_rows(path: Path) -> Iterator[str]:
    try:
        from datasets import Dataset
    except ImportError:
        raise UsageError(
            f"`{path}` needs the package `datasets`, which is not installed", hint=EXTRA_HINT
        ) from None
    for row in Dataset.from_parquet(str(path), streaming=True):
        yield _text_of(row, f"`{path}`")


def _text_of(row: Any, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise FormatError(f"{where} has no text under `text`, found: {found}")
    return text
