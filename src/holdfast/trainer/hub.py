"""What the model of a run is called on the Hugging Face hub."""

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
    """With the `config.json` in `model.hf_assets_path` if that is of this model; else with one that
    follows from name and flavor."""
    assets = config.model.hf_assets_path
    own = config_of(config.model.name, config.model.shape, vocab_size)
    if assets is None or not (Path(assets) / CONFIG).exists():
        return HFModel(own, assets)
    try:
        theirs = read_config(*open_for_reading(assets))
        check_alike((own, f"flavor {config.model.flavor}"), (theirs, f"`{assets}/{CONFIG}`"))
    except HoldfastError as error:
        checkpoint = config.checkpoint
        if checkpoint.last_save_in_hf or checkpoint.hf_export_interval:
            logger.warning("exports get a `%s` of their own: %s", CONFIG, error.what)
        return HFModel(own, assets)
    return HFModel(theirs, assets)
