"""Small random models of every architecture that transformers can build.

`hub_configs` makes their configurations smaller in several ways, which are tried one after the
other. An architecture that none of them suits is counted as not built.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

import hf_models
import hub_configs
from hf_folders import assert_same, tensors_in
from holdfast.convert.convert import convert
from holdfast.convert.plan import ConvertOptions, plan

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"

Outcome = Literal["table", "table, bits", "own", "own, bits", "none", "package", "part"]

OUTCOMES: Mapping[Outcome, str] = {
    "table": "native names in the checkpoint; back with the same bits and outputs",
    "table, bits": "native names in the checkpoint; back with the same bits",
    "own": "own names in the checkpoint; back with the same bits and outputs",
    "own, bits": "own names in the checkpoint; back with the same bits",
    "none": "not tested: no small model found that transformers builds and saves",
    "package": "not tested: needs another package",
    "part": "not tested: no model of its own",
}
"""Outcome of each architecture, as the page spells it. Without outputs, the inputs that the test
has suit no forward pass of the model."""

NOT_BUILT: tuple[Outcome, ...] = ("none", "package", "part")
"""Outcomes of architectures that are not tested."""

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


def architectures() -> list[str]:
    """Return the model types that transformers has."""
    return sorted(CONFIG_MAPPING_NAMES)


def classes_of(config: Any) -> Iterator[Any]:
    """Yield the classes that a configuration has: those with a head first, those that no mapping of
    transformers has last."""
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING", {}) for head in _HEADS.split()]
    for mapping in (*mappings, modeling_auto.MODEL_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            yield found[0] if isinstance(found, tuple) else found
    name = type(config).__module__.replace("configuration_", "modeling_")
    try:
        module = importlib.import_module(name)
    except ImportError:
        return
    # Parts of a model are defined before the model around them.
    for cls in reversed([*vars(module).values()]):
        if (
            inspect.isclass(cls)
            and issubclass(cls, transformers.PreTrainedModel)
            and getattr(cls, "config_class", None) is type(config)
            and cls.__module__ == name
            and not cls.__name__.endswith("PreTrainedModel")
        ):
            yield cls


class NotBuiltError(Exception):
    """No small model of an architecture can be built. Its argument is the outcome."""


def build(model_type: str) -> Any:
    """Build a small random model of an architecture.

    Raises:
        NotBuiltError: no configuration fits, or another package is needed.
    """
    with hf_models.quiet():
        failed = {"part"}
        for cut in hub_configs.cuts():
            try:
                config_class = CONFIG_MAPPING[model_type]
                values = hub_configs.smaller(config_class().to_dict(), cut)
                config = config_class.from_dict(values)
                classes = [*classes_of(config)]
            except Exception:  # noqa: BLE001 - any error of sizes that do not fit
                failed.add("none")
                continue
            for cls in classes:
                model = _built(config, cls)
                if not isinstance(model, str):
                    return model
                failed.add(model)
    raise NotBuiltError(next(one for one in ("package", "none", "part") if one in failed))


def _built(config: Any, cls: Any) -> Any:
    """Return a model with random weights, or the outcome of a class that gives none."""
    try:
        with torch.device("meta"):
            size = sum(tensor.numel() for tensor in cls(config).state_dict().values())
        if not 0 < size <= PARAMETERS_MAX:
            return "none"
        torch.manual_seed(7)
        model = cls(config).eval()
    except ImportError:
        return "package"
    except Exception:  # noqa: BLE001 - any error of a class that the configuration does not suit
        return "none"
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape).mul_(0.05).to(tensor.dtype))
    return model


def outcome_of(model_type: str, folder: Path) -> Outcome:
    """Return what becomes of an architecture, with `folder` for its files."""
    try:
        model = build(model_type)
    except NotBuiltError as error:
        outcome: Outcome = error.args[0]
        return outcome
    return round_trip(model, folder)


def round_trip(model: Any, folder: Path) -> Outcome:
    """Convert a model to a checkpoint and back to several files, and compare bits and outputs."""
    try:
        source = hf_models.save(model, folder / "hf")
    except (RuntimeError, AttributeError):
        # transformers itself cannot save the model, or rename its tensors at these sizes.
        return "none"
    wanted = tensors_in(source)
    planned = plan(str(source), ConvertOptions("dcp"))
    convert(planned, str(folder / "seed/step-0"))
    keeps = any("keep theirs" in note for note in planned.notes)
    shard_bytes = sum(tensor.nbytes for tensor in wanted.values()) // 3
    options = ConvertOptions("hf", hf_assets=str(source), max_shard_bytes=max(shard_bytes, 1))
    convert(plan(str(folder / "seed/step-0"), options), str(folder / "back"))
    assert_same(tensors_in(folder / "back"), wanted)
    # transformers does not open every folder of its own, or not with the weights of the model.
    before = None
    with contextlib.suppress(Exception):
        before = outputs(opened(model, source))
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
