"""Compares the values that a checkpoint's model was trained with, such as epsilon, with a
configuration."""

from __future__ import annotations

from holdfast.catalog.hf_folder import CONFIG, of_language_model
from holdfast.catalog.source import read_value
from holdfast.convert.source import ConvertSource
from holdfast.errors import FormatError, MismatchError
from holdfast.format import container
from holdfast.format.components import DATALOADER_KEYS
from holdfast.hf.family import Config
from holdfast.hf.values import no_class, untrained_positions, value_differences

SEQ_LEN = "seq_len"
"""Name of the sequence length, in tokens, in the state of the reference run's data loader."""


def value_notes(
    opened: ConvertSource, config: Config | None, config_from: str, *, to_hf: bool
) -> list[str]:
    """Compare the values that the checkpoint's model was trained with and the values in `config`,
    the configuration of the target. Returns a note on each difference.

    `to_hf`: whether the target is an export. An export also gets notes if its configuration
    allows longer inputs than the run trained on, or names no class.

    Raises:
        MismatchError: the target is an export, and would compute something else than the trained
            model.
    """
    trained = opened.checkpoint.manifest.model
    nameless = no_class(config) if to_hf and config is not None else None
    found = [] if nameless is None else [nameless]
    if config is None or not trained or opened.checkpoint.hf is not None:
        return found
    models = of_language_model(trained), of_language_model(config)
    lines = value_differences(models[0], models[1])
    if lines and to_hf:
        raise MismatchError(
            f"`{opened.checkpoint.where}` was trained with other values than {config_from} has "
            "(the second of each):\n  " + "\n  ".join(lines),
            hint=f"leave `{CONFIG}` out of the assets: the checkpoint has its own; to change a "
            "value on purpose, make a checkpoint with it first: `--to dcp --model-only --hf-assets "
            "FOLDER`",
        )
    found += [f"trained with another value than {config_from} has: {line}" for line in lines]
    untrained = untrained_positions(models[1], _seq_len(opened)) if to_hf else None
    return [*found, untrained] if untrained is not None else found


def _seq_len(opened: ConvertSource) -> int | None:
    """Return the length of the sequences that the run trained on; None if it is not stored."""
    checkpoint = opened.checkpoint
    for name, entry in checkpoint.manifest.values.items():
        if entry.path[0] in DATALOADER_KEYS and entry.path[-1] == SEQ_LEN:
            where = f"{checkpoint.source.url}/{entry.file}"
            try:
                found = container.read_value(
                    read_value(checkpoint.source, name, entry), where=where
                )
            except FormatError:
                return None  # The stored value is not a number.
            return found if type(found) is int else None
    return None
