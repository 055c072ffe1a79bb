"""Check of a Hugging Face folder by the rules of the programs that load it.

transformers, vLLM and SGLang read `config.json`, the index, the headers and the tokenizer;
llama.cpp's converter reads the tokenizer's own files too. Each program ignores some mistakes. Other
mistakes make it fail late or compute wrong results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from reprlib import repr as shortened
from typing import Any

from holdfast.catalog.hf_folder import (
    CONFIG,
    is_of_diffusers,
    of_language_model,
    quantization_of,
    read_config,
)
from holdfast.catalog.open_any import OpenCheckpoint, open_any
from holdfast.catalog.paths import open_for_reading
from holdfast.convert.towers import absent_parts
from holdfast.errors import FormatError, HoldfastError, UsageError
from holdfast.format.safetensors import INDEX, SUFFIX, parse_json
from holdfast.hf.assets import GENERATION_CONFIG, TOKEN_IDS
from holdfast.hf.check import check_fit
from holdfast.hf.families import table_of
from holdfast.hf.family import HF_EMBEDDING, Config, fused_experts, mapping_for, mapping_of
from holdfast.hf.shards import main_dtype
from holdfast.storage.store import ReadStore
from holdfast.tensors.lazy import Tensors, only
from holdfast.tensors.quantized import QUANTIZED, Dequantized
from holdfast.tensors.stored import StoredTensors

TOKENIZERS = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
)
"""Sets of files. Each set is a complete tokenizer."""

TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/")

PROCESSORS = ("preprocessor_config.json", "processor_config.json", "feature_extractor_config.json")

JSON_BYTES_MAX = 200_000_000


@dataclass(frozen=True, slots=True)
class ExportReport:
    """Result of checking an export."""

    wrong: tuple[str, ...]
    """Mistakes that make a loader fail or compute wrong results."""

    notes: tuple[str, ...]
    """Remarks that are not mistakes: ignored files, missing files that some uses need."""


def check_export(path: str) -> ExportReport:
    """Check a Hugging Face folder. Reads headers and small files, but not the data of the weights.

    Raises:
        UsageError: `path` is not a Hugging Face folder of a whole model.
        DamagedError, FormatError: the weights cannot be opened at all.
    """
    store, name = open_for_reading(path)
    checkpoint = open_any(store, name, check_files=True)
    if checkpoint.hf is None or checkpoint.hf.adapter is not None:
        raise UsageError(
            f"`{path}` must be a Hugging Face folder of a whole model",
            hint="`holdfast convert SOURCE FOLDER --to hf` makes one",
        )
    folder = _Folder(store, name, checkpoint)
    wrong: list[str] = []
    notes: list[str] = list(checkpoint.hf.notes)
    for check in (_config, _weights, _tokenizer, _generation):
        try:
            wrong += check(folder)
        except HoldfastError as error:
            wrong.append(error.what)
    if not wrong:
        notes += _fused(folder)
    return ExportReport(tuple(wrong), (*notes, *_missing(folder)))


class _Folder:
    """A Hugging Face folder that is being checked. Its files and configuration are read only
    once."""

    def __init__(self, store: ReadStore, name: str, checkpoint: OpenCheckpoint) -> None:
        self.store, self.name, self.checkpoint = store, name, checkpoint

    @cached_property
    def files(self) -> Sequence[str]:
        return self.store.list(self.name)

    @cached_property
    def tensors(self) -> Mapping[str, str]:
        """Dtype of each tensor."""
        entries = self.checkpoint.manifest.tensors
        return {name: entry.dtype for name, entry in entries.items()}

    @cached_property
    def num_words(self) -> int | None:
        """Number of rows of the embedding; None if unknown."""
        for name, entry in self.checkpoint.manifest.tensors.items():
            if name.endswith((HF_EMBEDDING, "embed_tokens.weight", "word_embeddings.weight")):
                return entry.shape[0] if entry.shape else None
        return None

    @cached_property
    def config(self) -> Config:
        return read_config(self.store, self.name)

    def json(self, file: str) -> Any:
        """Return the contents of a JSON file. Raises a FormatError if the file is not valid
        JSON."""
        size = self.store.size(f"{self.name}/{file}")
        try:
            if size > JSON_BYTES_MAX:
                raise ValueError(f"it has {size} bytes")
            return parse_json(self.store.read(f"{self.name}/{file}", 0, size))
        except (ValueError, RecursionError) as error:
            raise FormatError(f"`{file}` is no JSON: {error}") from error


def _config(folder: _Folder) -> Iterator[str]:
    """Yield mistakes in `config.json`."""
    if CONFIG not in folder.files:
        yield f"`{CONFIG}` is missing: no loader knows the class of the model"
        return
    config = folder.config
    if is_of_diffusers(config):
        return  # Configurations of diffusers have other keys.
    text = of_language_model(config)
    if not isinstance(config.get("model_type"), str):
        yield f"`{CONFIG}` has no `model_type`"
    classes = config.get("architectures")
    if not isinstance(classes, list) or not classes:
        yield f"`{CONFIG}` has no `architectures`: vLLM and SGLang choose the model by it"
    rows, words = folder.num_words, text.get("vocab_size")
    if type(words) is int and rows is not None and rows < words:
        yield f"`vocab_size` is {words}, but the embedding has {rows} rows"
    quantization = quantization_of(config)
    packed = [n for n, d in folder.tensors.items() if d.startswith(QUANTIZED)]
    if packed and not quantization:
        yield (
            f"{len(packed)} tensors such as `{packed[0]}` are {folder.tensors[packed[0]]}, but "
            f"`{CONFIG}` has no `quantization_config`"
        )
    plain = ("float32", "float16", "bfloat16")
    if quantization and {*folder.tensors.values()} <= {*plain}:
        yield (
            f"`{CONFIG}` says that the weights are quantized by "
            f"{shortened(quantization.get('quant_method'))}, but no tensor is"
        )
    yield from absent_parts(config, folder.tensors)
    yield from _dtype(folder, config) if not quantization else ()


def _dtype(folder: _Folder, config: Config) -> Iterator[str]:
    """Yield a line that describes the mistake, if `config.json` states another dtype than that of
    most weights."""
    text = config.get("text_config")
    places = [config, text] if isinstance(text, dict) else [config]
    declared = next((p[k] for p in places for k in ("dtype", "torch_dtype") if p.get(k)), None)
    entries = folder.checkpoint.manifest.tensors.values()
    main = main_dtype((entry.dtype, entry.shape) for entry in entries)
    if declared is not None and main is not None and declared not in (main, "auto"):
        yield f"`{CONFIG}` says {shortened(declared)}, but most weights are {main}"


def _weights(folder: _Folder) -> Iterator[str]:
    """Yield mistakes in the index, the headers and the names of tensors."""
    if INDEX in folder.files:
        index = folder.json(INDEX)
        metadata = index.get("metadata") if isinstance(index, dict) else None
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        found = sum(entry.nbytes for entry in folder.checkpoint.manifest.tensors.values())
        if total != found:
            yield f"`{INDEX}` says that the tensors have {shortened(total)} bytes, found: {found}"
    for file in folder.checkpoint.manifest.files or folder.files:
        if file.endswith(SUFFIX) and _format_of(folder, file) != "pt":
            yield f"the header of `{file}` lacks `{{'format': 'pt'}}`, which transformers 4 needs"
    if CONFIG not in folder.files:
        return
    config = of_language_model(folder.config)
    family = table_of(config)
    if family is None:
        return
    hf = folder.checkpoint.hf
    assert hf is not None, "checked by the caller"
    tensors: Tensors = Dequantized(
        StoredTensors(folder.checkpoint.source, folder.checkpoint.strides), hf.quantization
    )
    if family.prefix:
        tensors = only(tensors, [n for n in tensors.infos if n.startswith(family.prefix)])
    mapping = mapping_for(family, config, tensors.infos)
    check_fit(tensors, mapping, "hf", where=folder.checkpoint.where, config_from=f"`{CONFIG}`")


def _fused(folder: _Folder) -> Iterator[str]:
    """Yield a note if the experts of a layer are fused into one tensor, as transformers has them in
    memory."""
    config = of_language_model(folder.config)
    family = table_of(config)
    if family is not None and fused_experts(mapping_of(family, config), folder.tensors):
        yield (
            "the experts of a layer are in one tensor, as transformers has them in memory; other "
            f"loaders look for one per expert: `holdfast convert {folder.checkpoint.where} FOLDER "
            "--to hf` writes those"
        )


def _format_of(folder: _Folder, file: str) -> object:
    """Return the key `format` in the metadata of a safetensors file. The caller has checked the
    file's header."""
    key = f"{folder.name}/{file}"
    nbytes = int.from_bytes(folder.store.read(key, 0, 8), "little")
    metadata = json.loads(folder.store.read(key, 8, 8 + nbytes)).get("__metadata__") or {}
    return metadata.get("format")


def _tokenizer(folder: _Folder) -> Iterator[str]:
    """Yield mistakes in the tokenizer."""
    for file in ("tokenizer_config.json", "special_tokens_map.json", *PROCESSORS):
        if file in folder.files:
            folder.json(file)
    if "tokenizer.json" not in folder.files:
        return
    tokenizer, rows = folder.json("tokenizer.json"), folder.num_words
    ids = [token.get("id") for token in _list(tokenizer, "added_tokens")]
    model = tokenizer.get("model") if isinstance(tokenizer, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        ids += vocabulary.values()
    elif isinstance(vocabulary, list):
        ids.append(len(vocabulary) - 1)
    largest = max((one for one in ids if type(one) is int), default=None)
    if largest is None:
        yield "`tokenizer.json` has no tokens"
    elif rows is not None and largest >= rows:
        yield f"`tokenizer.json` has token {largest}, but the embedding has {rows} rows"


def _list(value: Any, key: str) -> list[dict[str, Any]]:
    found = value.get(key) if isinstance(value, dict) else None
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _generation(folder: _Folder) -> Iterator[str]:
    """Yield mistakes in `generation_config.json`; without this file, in `eos_token_id` of
    `config.json`."""
    file, rows = GENERATION_CONFIG, folder.num_words
    keys: Sequence[str] = TOKEN_IDS
    if file in folder.files:
        config = folder.json(file)
    elif CONFIG in folder.files:
        # Check only this token: for others, `config.json` may have defaults of the configuration
        # class, which are often beyond the vocabulary.
        file, config = CONFIG, of_language_model(folder.config)
        keys = ("eos_token_id",)
    else:
        return
    for key in keys:
        value = config.get(key) if isinstance(config, dict) else None
        for token in value if isinstance(value, list) else [value]:
            if rows is not None and type(token) is int and token >= rows:
                yield f"`{file}`: `{key}` is {token}, but the embedding has {rows} rows"


def _missing(folder: _Folder) -> Iterator[str]:
    """Yield notes on missing files that some uses need."""
    files = {*folder.files}
    if CONFIG in files and is_of_diffusers(folder.config):
        return
    if not any(files.issuperset(needed) for needed in TOKENIZERS):
        yield "no tokenizer: servers of text need one, from `--hf-assets`"
    elif not files.intersection(TEMPLATES) and not _has_template(folder):
        yield "no chat template: servers answer chat requests only with `--chat-template`"
    if GENERATION_CONFIG not in files:
        ends = of_language_model(folder.config).get("eos_token_id") if CONFIG in files else None
        where = (
            f"the `eos_token_id` of `{CONFIG}`, {ends}" if ends is not None else "a default token"
        )
        yield f"no `{GENERATION_CONFIG}`: generation ends at {where}"
    if CONFIG in files and not files.intersection(PROCESSORS):
        parts = [key for key in ("vision_config", "audio_config") if folder.config.get(key)]
        if parts:
            yield f"no `{PROCESSORS[0]}`, though `{CONFIG}` has `{parts[0]}`"


def _has_template(folder: _Folder) -> bool:
    file = "tokenizer_config.json"
    try:
        config = folder.json(file) if file in folder.files else None
    except FormatError:
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))
