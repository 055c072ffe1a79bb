"""Lists of model families that are written by hand agree with one another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

import hf_models
from holdfast.hf.families import FAMILIES
from holdfast.hf.flavors import MODELS
from holdfast.hf.published import PUBLISHED, TYPES, flavors_of, published

DOCS = Path(__file__).parents[2] / "docs"
MODEL_TYPES = {model_type for family in FAMILIES for model_type in family.model_types}

OF_WHOLE_MODELS = {t for family in FAMILIES if not family.prefix for t in family.model_types}


def rows_of(document: str, header: str) -> list[list[str]]:
    """Return the cells of the table that begins with `header`."""
    table = (DOCS / document).read_text().split(f"{header}\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    return rows[1:]


def test_every_model_type_has_a_name() -> None:
    """Method: `TYPES` and the families have the same values of `model_type`."""
    assert {model_type for types in TYPES.values() for model_type in types} == MODEL_TYPES


@pytest.mark.parametrize("name", [*MODELS, *PUBLISHED])
def test_every_flavor_is_of_the_family_that_its_name_stands_for(name: str) -> None:
    """Method: make the `config.json` of each flavor, and look at its `model_type`."""
    assert {published(name, flavor, 64)["model_type"] for flavor in flavors_of(name)} <= {
        *TYPES[name]
    }


def test_every_model_type_has_a_model_in_the_tests() -> None:
    """Method: compare the model types with those of the models that the tests convert.

    A language model inside a larger model needs no model of its own: its tensors have the same
    names, except for a prefix.
    """
    tested = {getattr(transformers, kind).model_type for kind, _ in hf_models.MODELS.values()}
    assert tested == OF_WHOLE_MODELS


def test_the_documents_list_all_families_and_flavors() -> None:
    """Method: compare names and flavors with hugging-face.md, and values of `model_type` with
    families.md."""
    text = re.sub(r"\s+", " ", (DOCS / "hugging-face.md").read_text())
    names = re.findall(r"`(\w+)`", text.split("Names are ")[1].split(". ")[0])
    assert names == [*TYPES]
    rows = rows_of("hugging-face.md", "| model name | flavors |")
    documented = {name.strip("`"): row.replace(" (ours)", "").split(", ") for name, row in rows}
    assert documented == {name: flavors_of(name) for name in TYPES if flavors_of(name)}
    header = "| `model_type` | native model | logits |"
    listed = ", ".join(row[0] for row in rows_of("families.md", header))
    assert {*listed.split(", ")} == OF_WHOLE_MODELS
