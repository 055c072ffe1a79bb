"""Conversion of PEFT adapters: to native names, to a PEFT folder, or merged into their base."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.catalog.hf_folder import ADAPTER_CONFIG, read_config
from holdfast.catalog.paths import open_for_reading
from holdfast.convert.source import ConvertSource, fetched, open_source
from holdfast.errors import UsageError
from holdfast.hf.adapter import PREFIX, native_adapter_mapping
from holdfast.hf.dialects import renamed
from holdfast.hf.merged import Merged
from holdfast.tensors.lazy import Joined, Mapped, Renamed, Tensors
from holdfast.tensors.mapping import TensorMapping

_LORA = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))"
    r"(?:\.(?P<adapter>(?!weight$)\w+))?(?P<end>\.weight|\.bias)?"
)
"""Name of an adapter's tensor, in a live model (with the adapter's name) or in a PEFT folder."""

_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>\w+)\.(?P<end>.+)")
"""Name, in a live model, of a weight that is trained in full."""

_BASE = re.compile(r"(?P<module>.+)\.(?:base_layer|original_module)\.(?P<end>.+)")
"""Name, in a live model, of a base weight that has an adapter."""


def has_adapter(tensors: Tensors) -> bool:
    """Return whether there are low-rank factors among the tensors."""
    return any(_LORA.fullmatch(name) for name in tensors.infos)


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter in a checkpoint, under the names of a PEFT folder."""

    tensors: Tensors
    """Low-rank factors, and weights trained in full."""

    base: Tensors
    """Base weights in the same checkpoint, under the names of the base model; may be empty."""

    config: Mapping[str, Any]
    """Contents of `adapter_config.json`."""

    @property
    def base_name(self) -> str:
        return str(self.config.get("base_model_name_or_path") or "unknown")


def adapter_config_of(opened: ConvertSource, path: str | None) -> Mapping[str, Any]:
    """Return the contents of `adapter_config.json`. `path`: path of this file, or of its folder;
    None: the file is beside the weights.

    Raises:
        UsageError: there is no such file, or the adapter is of another kind than LoRA.
    """
    hf = opened.checkpoint.hf
    config = hf.adapter if hf is not None else None
    if path is not None:
        folder, _, file = path.rpartition("/")
        folder, file = (folder or ".", file) if file.endswith(".json") else (path, ADAPTER_CONFIG)
        config = read_config(*open_for_reading(folder), file)
    if config is None:
        raise UsageError(
            f"`{opened.checkpoint.where}` has adapters, but no rank and scale of them",
            hint=f"`--adapter-config FILE`, the `{ADAPTER_CONFIG}` that `save_pretrained` of PEFT "
            "writes; `--to torch` and `--to dcp` need none",
        )
    if config.get("peft_type", "LORA") != "LORA":
        raise UsageError(f"`peft_type` of the adapter must be LORA, found: {config['peft_type']}")
    return config


def open_adapter(
    opened: ConvertSource, model: Tensors, config: Mapping[str, Any], table: TensorMapping | None
) -> AdapterSource:
    """Return the adapter of a checkpoint, under PEFT's names. `model`: tensors of the adapter, and
    of its base if the checkpoint has them. `config`: contents of `adapter_config.json`. `table`:
    mapping between native and Hugging Face tensors of the base, needed if the tensors have native
    names; else None."""
    if opened.dialect in ("meta", "titan"):
        if table is None:
            raise UsageError(
                f"`{opened.checkpoint.where}` has native names, which need the base's sizes",
                hint=f"`--hf-assets {config.get('base_model_name_or_path') or 'FOLDER'}`",
            )
        model = Renamed(model, renamed(model.infos, "meta"))
        factors = [name for name in model.infos if _LORA.fullmatch(name)]
        full = [n for n in table.names("native") if n in model.infos]
        mapping = native_adapter_mapping({n: model.infos[n] for n in (*factors, *full)}, table)
        model = Mapped(model, mapping, "hf")
    adapter: dict[str, str] = {}
    base: dict[str, str] = {}
    for name in model.infos:
        short = name.removeprefix(PREFIX)
        if lora := _LORA.fullmatch(short):
            # PEFT folders name a vector of DoRA's magnitudes without `.weight` at the end.
            end = "" if lora["kind"] == "lora_magnitude_vector" else lora["end"] or ""
            adapter[name] = f"{PREFIX}{lora['module']}.{lora['kind']}{end}"
        elif saved := _SAVED.fullmatch(short):
            adapter[name] = f"{PREFIX}{saved['module']}.{saved['end']}"
        elif inner := _BASE.fullmatch(short):
            base[name] = f"{inner['module']}.{inner['end']}"
        elif _is_saved(short, config) or (opened.checkpoint.hf and opened.checkpoint.hf.adapter):
            adapter[name] = PREFIX + short
        else:
            base[name] = short
    if len({*adapter.values()}) < len(adapter):
        names = sorted(
            {m["adapter"] for n in adapter if (m := _LORA.fullmatch(n)) and m["adapter"]}
        )
        raise UsageError(
            f"`{opened.checkpoint.where}` has several adapters: {', '.join(names)}",
            hint="`--skip '*.lora_*.NAME.*'` leaves one out",
        )
    return AdapterSource(Renamed(model, adapter), Renamed(model, base), config)


def base_of(
    adapter: AdapterSource, opened: ConvertSource, hf_assets: str | None
) -> ConvertSource | None:
    """Open the base model of an adapter, in the folder or hub repository `hf_assets`. Return None
    if the checkpoint has the base weights itself."""
    targets = {
        f"{match['module'].removeprefix(PREFIX)}.weight"
        for name in adapter.tensors.infos
        if (match := _LORA.fullmatch(name))
    }
    if targets <= adapter.base.infos.keys():
        return None
    if hf_assets is None:
        raise UsageError(
            f"`{opened.checkpoint.where}` has an adapter without its base",
            hint=f"`--hf-assets` with the folder or name of the base: `{adapter.base_name}`",
        )
    return open_source(fetched(hf_assets))


def merged(adapter: AdapterSource, base: ConvertSource | None) -> Tensors:
    """Return the base weights with the adapter added. `base`: the base model; None: the checkpoint
    has the base weights itself."""
    if base is None:
        return Merged(adapter.base, adapter.tensors, adapter.config)
    # Base tensors in the checkpoint, such as buffers, are newer than those of the base model.
    newer = Joined(adapter.tensors, adapter.base)
    return Merged(base.model, newer, adapter.config)


def notes_on(adapter: AdapterSource, *, is_merged: bool) -> Iterator[str]:
    """Yield notes for the user on the export of an adapter. `is_merged`: whether the export has the
    base weights with the adapter added, not the adapter alone."""
    config = adapter.config
    scale = f"r is {config.get('r')}, lora_alpha {config.get('lora_alpha')}"
    if is_merged:
        yield f"the adapter is merged into its base `{adapter.base_name}`: {scale}"
        return
    yield f"a folder of PEFT, for the base `{adapter.base_name}`: {scale}"
    if adapter.base.infos:
        yield f"left out {len(adapter.base.infos)} tensors of the base; `--merge` needs them"


def encoded_config(config: Mapping[str, Any]) -> bytes:
    """Return the bytes of `adapter_config.json`."""
    return (json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n").encode()


def _is_saved(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether `config`, an `adapter_config.json`, lists the module of tensor `name` as
    trained in full."""
    modules = config.get("modules_to_save")
    module = name.rpartition(".")[0]
    return isinstance(modules, list) and any(
        module == one or module.endswith(f".{one}") for one in modules
    )
