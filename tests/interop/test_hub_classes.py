"""Models of every architecture of transformers go to a checkpoint and back."""

from __future__ import annotations

from pathlib import Path

import pytest

import hub_classes
from extent import EVERYTHING

TESTED = hub_classes.architectures() if EVERYTHING else hub_classes.DEFAULT


@pytest.mark.parametrize("model_type", TESTED)
def test_every_architecture_comes_back_with_the_same_bits_and_outputs(
    model_type: str, tmp_path: Path
) -> None:
    """G10. Method: convert a model that transformers has saved to a checkpoint and back to several
    files; the tensors, and the outputs where a forward pass runs, are equal. docs/architectures.md
    has the same outcome. By default some architectures of each kind; with `--all` all that
    transformers can build small."""
    assert hub_classes.outcome_of(model_type, tmp_path) == hub_classes.listed()[model_type]


def test_the_page_lists_more_than_a_hundred_architectures_and_counts_them() -> None:
    page = hub_classes.PAGE.read_text()
    found = hub_classes.listed()
    assert len([one for one in found.values() if one not in hub_classes.NOT_BUILT]) >= 100
    for outcome, text in hub_classes.OUTCOMES.items():
        number = [*found.values()].count(outcome)
        assert not number or f"| {text} | {number} |" in page
