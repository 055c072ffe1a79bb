"""Other packages add stores and families by entry points, without a change here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import holdfast
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.hf import families
from holdfast.hf.families import family_of, llama, register_family
from holdfast.hf.family import Family
from holdfast.storage.opening import open_store

ENTRY_POINTS = """
[holdfast.stores]
shelf = other_package:store_of

[holdfast.families]
sheep = other_package:SHEEP
"""

MODULE = """
from holdfast.hf.families.llama import LLAMA
from holdfast.hf.family import Family
from holdfast.storage.memory import MemoryStore

STORES = {}
SHEEP = Family(("sheep",), LLAMA.rows)


def store_of(url):
    return STORES.setdefault(url, MemoryStore())
"""


@pytest.fixture
def _other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package with entry points of both kinds."""
    metadata = tmp_path / "other_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "other_package.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    known = dict(families._BY_TYPE)
    yield
    families._BY_TYPE.clear()
    families._BY_TYPE.update(known)
    sys.modules.pop("other_package", None)


@pytest.mark.usefixtures("_other_package")
def test_a_run_saves_to_a_store_of_another_package() -> None:
    model = nn.Linear(2, 2)
    config = CheckpointConfig(enable=True, interval=5)
    with CheckpointManager("shelf://run", model=model, config=config) as manager:
        manager.load()
        manager.save(5)
    weight = model.weight.detach().clone()
    nn.init.zeros_(model.weight)
    with CheckpointManager("shelf://run", model=model, config=config) as manager:
        assert manager.load() == 5
    assert torch.equal(model.weight, weight)
    assert "step-5/" in open_store("shelf://run").list()


@pytest.mark.usefixtures("_other_package")
def test_a_family_of_another_package_is_found() -> None:
    config = {"model_type": "sheep"}
    assert family_of(config, where="`config.json`").model_types == ("sheep",)


@pytest.mark.usefixtures("_other_package")
def test_a_family_can_be_registered_but_not_replaced() -> None:
    goat = Family(("goat",), llama.LLAMA.rows)
    register_family(goat)
    register_family(goat)
    assert family_of({"model_type": "goat"}, where="`config.json`") is goat
    with pytest.raises(holdfast.UsageError, match="`llama` has a family already"):
        register_family(Family(("llama",), llama.LLAMA.rows))
    with pytest.raises(holdfast.UsageError, match="must be a `Family`"):
        register_family("llama")  # type: ignore[arg-type]


def test_unknown_schemes_are_refused_as_before(tmp_path: Path) -> None:
    with pytest.raises(holdfast.UsageError, match="is a URL"):
        CheckpointManager("shelf://run", model=nn.Linear(2, 2))
