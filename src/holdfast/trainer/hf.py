"""The Hugging Face description of the model that a run trains."""

from __future__ import annotations

import logging
from pathlib import Path

from holdfast.catalog.hf_folder import CONFIG, read_config
from holdfast.catalog.paths import open_for_reading
from holdfast.convert.sizes import check_alike
from holdfast.errors import HoldfastError
from holdfast.hf.export import HFModel
from holdfast.hf.flavors import config_of
from holdfast.trainer.config import Config

logger: logging.Logger = logging.getLogger("holdfast.trainer")


def hf_model(config: Config, vocab_size: int) -> HFModel:
    """Return the Hugging Face description of the configured model.

    Its `config.json` is the one in `model.hf_assets_path` if that describes this model, else one
    derived from `model.name` and `model.flavor`.
    """
    assets = config.model.hf_assets_path
    derived = config_of(config.model.name, config.model.shape, vocab_size)
    if assets is None or not (Path(assets) / CONFIG).exists():
        return HFModel(derived, assets)
    try:
        given = read_config(*open_for_reading(assets))
        check_alike((derived, f"flavor {config.model.flavor}"), (given, f"`{assets}/{CONFIG}`"))
    except HoldfastError as error:
        if config.checkpoint.last_save_in_hf or config.checkpoint.hf_export_interval:
            logger.warning("exports get a `%s` of their own: %s", CONFIG, error.what)
        return HFModel(derived, assets)
    return HFModel(given, assets)
