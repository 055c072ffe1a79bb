"""The model to train, with the values in the `config.json` of a Hugging Face folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from holdfast.catalog.hf_folder import CONFIG
from holdfast.convert.sizes import check_alike, config_at
from holdfast.errors import HoldfastError, MismatchError, NotFoundError
from holdfast.hf.export import HFModel
from holdfast.hf.flavors import Flavor, config_of
from holdfast.hf.values import MODEL_TYPES, with_sizes, with_values
from holdfast.trainer.config import Config

logger: logging.Logger = logging.getLogger("holdfast.trainer")


@dataclass(frozen=True, slots=True)
class FollowedModel:
    """Model of a run: its flavor for training, and its description for exports."""

    flavor: Flavor
    hf_model: HFModel


def followed_model(config: Config, vocab_size: int) -> FollowedModel:
    """Return the model of a run, with the values of the `config.json` that the run follows.

    The run follows the `config.json` beside the Hugging Face weights that it starts from. If there
    is none, it follows the `config.json` in `model.hf_assets_path`, unless that file describes
    another model: the folder may be used only for its tokenizer. Without a `config.json` to follow,
    the values are those of the flavor.

    Raises:
        MismatchError: the native model cannot have the values of the `config.json`, or the weights
            to start from are of another model.
    """
    assets, weights = config.model.hf_assets_path, None
    if config.checkpoint.enable and config.checkpoint.initial_load_in_hf:
        weights = config.checkpoint.initial_load_path or assets
    for folder in filter(None, (weights, assets)):
        given = _read(folder)
        if given is None:
            continue
        try:
            flavor = _followed(config, vocab_size, given, where=f"`{folder}/{CONFIG}`")
        except _OtherModelError as error:
            if folder == weights:
                raise
            if config.checkpoint.last_save_in_hf or config.checkpoint.hf_export_interval:
                logger.warning("exports get a `%s` of their own: %s", CONFIG, error.what)
        else:
            return FollowedModel(flavor, _described(config, given))
    flavor = config.model.shape
    described = config_of(config.model.name, flavor, vocab_size)
    return FollowedModel(flavor, _described(config, described))


def _described(config: Config, contents: dict[str, Any]) -> HFModel:
    """Return the description of the run's model with the contents of a `config.json`."""
    assets, seq_len = config.model.hf_assets_path, config.training.seq_len
    return HFModel(contents, assets, exact=True, seq_len=seq_len)


class _OtherModelError(MismatchError):
    """The configuration is of another model than the run's."""


def _read(folder: str) -> dict[str, Any] | None:
    """Return the contents of `config.json` in a folder; None if there is no such file or folder."""
    try:
        return config_at(folder)
    except NotFoundError:
        return None


def _followed(config: Config, vocab_size: int, given: dict[str, Any], *, where: str) -> Flavor:
    """Return the run's flavor with the values of the configuration `given`, such as `rope_theta`.

    Raises:
        _OtherModelError: `given` is of another family, or has other sizes than the flavor.
        MismatchError: the native model cannot have one of the values.
    """
    name, shape = config.model.name, config.model.shape
    if given.get("model_type") not in MODEL_TYPES[name]:
        raise _OtherModelError(
            f"{where} is not of `model.name` {name}: model_type is {given.get('model_type')}, "
            f"expected: {' or '.join(MODEL_TYPES[name])}",
            hint="set `model.name` to the model of these weights",
        )
    # Whether weights are tied, and the width of heads, may differ from the flavor: `with_sizes`
    # takes both from `given`.
    try:
        derived = config_of(name, with_sizes(shape, given), vocab_size)
        check_alike((derived, f"flavor {config.model.flavor}"), (given, where))
    except HoldfastError as error:
        hint = "set `model.flavor` to the size of these weights"
        raise _OtherModelError(error.what, hint=hint) from error
    return with_values(shape, given, where=where)
