"""Small random models of every architecture that transformers can build.

A configuration starts from the defaults of its class. Every width is divided by one factor, since
widths depend on each other; every count of layers, experts and words is cut. Several factors are
tried, the largest first. An architecture that none of them suits is counted as not built.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

import hf_models
from hf_folders import assert_same, tensors_in
from holdfast.convert.convert import convert
from holdfast.convert.plan import ConvertOptions, plan

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"

Outcome = Literal["table", "table, bits", "own", "own, bits", "none"]

OUTCOMES: Mapping[Outcome, str] = {
    "table": "native names in the checkpoint; back with the same bits and outputs",
    "table, bits": "native names in the checkpoint; back with the same bits",
    "own": "own names in the checkpoint; back with the same bits and outputs",
    "own, bits": "own names in the checkpoint; back with the same bits",
    "none": "not tested",
}
"""Outcome of each architecture, as the page spells it. Without outputs, the inputs that the test
has suit no forward pass of the model."""

PARAMETERS_MAX = 16_000_000
"""Largest model that is built: larger ones would take too long."""

DEFAULT = (
    "gpt2",
    "t5",
    "bert",
    "mamba",
    "vit",
    "whisper",
    "clip",
    "llava",
)
"""Architectures that are tested by default: one of each kind."""

_HEADS = (
    "CAUSAL_LM IMAGE_TEXT_TO_TEXT MULTIMODAL_LM SPEECH_SEQ_2_SEQ SEQ_TO_SEQ_CAUSAL_LM MASKED_LM "
    "CTC IMAGE_CLASSIFICATION OBJECT_DETECTION PRETRAINING"
)
"""Kinds of models, by transformers' names: the first one that an architecture has is built."""

_LAYERS = ("layers", "n_layer", "num_hidden_layers", "depth", "num_blocks", "iou_head_depth")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_WIDTHS = ("size", "dim", "width", "d_model", "n_embd", "channels", "d_ff", "d_kv", "n_inner")
_KEPT = ("image_size", "patch_size", "kernel_size", "window_size", "block_size", "chunk_size")
_TRIES = ((16, 2), (8, 2), (32, 2), (4, 2), (16, 4), (4, 4), (16, 0), (1, 2))
"""Factors that divide all widths, with the number of layers; 0: as by default."""

_WORDS = 128
"""Size of every vocabulary."""


def architectures() -> list[str]:
    """Return the model types that transformers has."""
    return sorted(CONFIG_MAPPING_NAMES)


def classes_of(config: Any) -> Iterator[Any]:
    """Yield the classes that a configuration has: those with a head first."""
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING", {}) for head in _HEADS.split()]
    for mapping in (*mappings, modeling_auto.MODEL_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            yield found[0] if isinstance(found, tuple) else found


def build(model_type: str) -> Any:
    """Build a small random model of an architecture, or return None if no configuration fits."""
    with hf_models.quiet():
        for factor, num_layers in _TRIES:
            model = _built(model_type, factor, num_layers)
            if model is not None:
                return model
    return None


def _built(model_type: str, factor: int, num_layers: int) -> Any:
    try:
        config_class = CONFIG_MAPPING[model_type]
        values = config_class().to_dict()
        config = config_class.from_dict(_smaller(values, factor, num_layers))
        cls = next(filter(partial(_fits, config), classes_of(config)))
        torch.manual_seed(7)
        model = cls(config).eval()
    except Exception:  # noqa: BLE001 - any error of a configuration that does not fit
        return None
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape).mul_(0.05).to(tensor.dtype))
    return model


def _fits(config: Any, cls: Any) -> bool:
    """Return whether a class makes a model that is small enough."""
    try:
        with torch.device("meta"):
            size: int = sum(tensor.numel() for tensor in cls(config).state_dict().values())
    except Exception:  # noqa: BLE001 - any error of a class that the configuration does not suit
        return False
    return size <= PARAMETERS_MAX


def _smaller(value: Any, factor: int, num_layers: int, key: str = "") -> Any:
    """Return a configuration, or one value of it, with smaller sizes."""
    if isinstance(value, dict):
        smaller = {k: _smaller(v, factor, num_layers, str(k)) for k, v in value.items()}
        return _with_lists_cut(value, smaller)
    if isinstance(value, list):
        if key == "depths" and num_layers:
            return [1 for _ in value]
        return [_smaller(item, factor, num_layers, key) for item in value]
    if type(value) is not int:
        return value
    if "vocab_size" in key or key == "codebook_size":
        return min(value, _WORDS)
    if key.endswith(("token_id", "token_index", "_id")):
        # Special tokens stay distinct: outputs of models that look for them would differ.
        return value if value < _WORDS // 2 else _WORDS // 2 + sum(map(ord, key)) % (_WORDS // 2)
    if num_layers and key.endswith(_LAYERS):
        return min(value, num_layers)
    if key in _EXPERTS:
        return min(value, 4)
    if key in ("num_experts_per_tok", "topk_group", "n_group", "num_experts_per_token"):
        return min(value, 2) if key.startswith("num") else 1
    if key.startswith("max_") and "position" in key:
        return min(value, 256)
    if key == "image_size":
        return max(32, min(value, 64))
    if any(kept in key for kept in _KEPT) or value < 16:
        return value
    if key == "mrope_section" or any(word in key for word in _WIDTHS):
        return max(value // factor, 2) if value % factor == 0 else value
    return value


def _with_lists_cut(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with lists of one item per layer cut to the number of layers."""
    for key in before:
        cut = str(key).endswith(_LAYERS) and type(before[key]) is int
        if cut and after[key] < before[key]:
            for other, items in after.items():
                if isinstance(items, list) and len(items) == before[key]:
                    after[other] = items[: after[key]]
    return after


def round_trip(model: Any, folder: Path) -> Outcome:
    """Convert a model to a checkpoint and back to several files, and compare bits and outputs."""
    try:
        source = hf_models.save(model, folder / "hf")
    except RuntimeError:
        # transformers itself cannot rename the tensors of a model of these sizes.
        return "none"
    wanted = tensors_in(source)
    planned = plan(str(source), ConvertOptions("dcp"))
    convert(planned, str(folder / "seed/step-0"))
    keeps = any("keep theirs" in note for note in planned.notes)
    shard_bytes = sum(tensor.nbytes for tensor in wanted.values()) // 3
    options = ConvertOptions("hf", hf_assets=str(source), max_shard_bytes=max(shard_bytes, 1))
    convert(plan(str(folder / "seed/step-0"), options), str(folder / "back"))
    assert_same(tensors_in(folder / "back"), wanted)
    before = outputs(opened(model, source))
    # transformers does not open every folder of its own with the weights of the model.
    if before is None or not _alike(before, outputs(opened(model, source))):
        return "own, bits" if keeps else "table, bits"
    assert _alike(before, outputs(opened(model, folder / "back")))
    return "own" if keeps else "table"


def _alike(one: list[Tensor], other: list[Tensor] | None) -> bool:
    """Return whether outputs are equal but for the order of sums, which depends on addresses."""
    return (
        other is not None
        and len(one) == len(other)
        and all(
            torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-6, equal_nan=True)
            for a, b in zip(one, other, strict=True)
        )
    )


def listed() -> dict[str, Outcome]:
    """Return the outcome of every architecture in docs/architectures.md."""
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    spelled = {text: outcome for outcome, text in OUTCOMES.items()}
    return {
        model_type: spelled[cells[1].strip()]
        for cells in rows
        if cells[1].strip() in spelled
        for model_type in cells[3].split()
    }


def opened(model: Any, folder: Path) -> Any:
    """Open a folder by the class of `model`."""
    with hf_models.quiet():
        return type(model).from_pretrained(folder).eval()


def outputs(model: Any) -> list[Tensor] | None:
    """Return all tensors that a forward pass gives, or None if the inputs here do not suit it."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(5, 50, (2, 12), generator=generator)
    image = torch.randn(2, 3, 64, 64, generator=generator)
    size = getattr(model.config, "image_size", None)
    if isinstance(size, int):
        image = image[..., :size, :size]
    candidates = {
        "input_ids": {"input_ids": tokens},
        "pixel_values": {"pixel_values": image},
        "input_features": {"input_features": torch.randn(2, 80, 3000, generator=generator)},
        "input_values": {"input_values": torch.randn(2, 4000, generator=generator)},
    }
    main = str(getattr(model, "main_input_name", "input_ids"))
    tries = [candidates.get(main, candidates["input_ids"]), candidates["input_ids"]]
    tries += [{**one, "decoder_input_ids": tokens} for one in tries]
    tries += [{**candidates["input_ids"], **candidates["pixel_values"]}]
    for inputs in tries:
        with torch.no_grad(), hf_models.quiet(), contextlib.suppress(Exception):
            torch.manual_seed(3)
            found = list(_tensors(model(**inputs)))
            if found:
                return found
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | transformers.utils.ModelOutput):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
