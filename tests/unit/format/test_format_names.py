"""Names of checkpoints and of the files beside them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import FormatError
from holdfast.format.names import HiddenFolder, data_file, hidden_folder_of, step_name, step_of

FOREIGN_STEPS = [
    "best-step-20",
    "step-030",
    "step-30.bak",
    "old-step-7-keep",
    "step-",
    "step--1",
    "step-+1",
    "step-1e3",
    "step-1_0",
    "step- 1",
    "step-1 ",
    " step-1",
    "step-1\n",
    "\nstep-1",
    "Step-1",
    "step-1/",
    "a/step-1",
    "step-00",
    "step-0x10",
    "step_10",
    "step10",
    "",
    "step-1.0",
    "step-\u0661\u0662",  # digits, but Arabic ones
    "step-\u00b2",
    "step-" + "9" * 19,
]


@pytest.mark.parametrize("name", FOREIGN_STEPS)
def test_a_name_similar_to_a_checkpoint_is_ignored(name: str) -> None:
    """G5. Method: names that a loose pattern, or `int`, would accept as a step."""
    assert step_of(name) is None


@given(st.integers(0, 10**18 - 1))
def test_every_step_survives_a_round_trip_through_its_name(step: int) -> None:
    """G1. Method: steps up to the largest."""
    assert step_of(step_name(step)) == step


@given(st.text(max_size=30))
def test_a_step_has_exactly_one_name(name: str) -> None:
    """G5. Method: any text; if it parses as a step, it is the name of that step."""
    step = step_of(name)
    assert step is None or step_name(step) == name


asides = st.builds(
    HiddenFolder,
    st.sampled_from(["attempt", "replaced", "removing"]),
    st.text(min_size=1, max_size=20).filter(lambda name: "/" not in name),
    st.text("0123456789abcdef", min_size=8, max_size=8),
)


@given(asides)
def test_a_folder_set_aside_has_a_role_and_a_name_and_is_never_a_step(aside: HiddenFolder) -> None:
    """G1. Method: a round trip for any name of a checkpoint that is a single folder."""
    assert hidden_folder_of(str(aside)) == aside
    assert step_of(str(aside)) is None


@pytest.mark.parametrize(
    "name",
    [
        "attempt-step-1-0a1b2c3d",
        ".attempt-step-1-0a1b2c3",
        ".attempt-step-1-0A1B2C3D",
        ".attempt-step-1-0a1b2c3d4.",
        ".attempt--0a1b2c3d",
        ".kept-step-1-0a1b2c3d",
        ".attempt-a/b-0a1b2c3d",
        ".replaced-0a1b2c3d",
        ".removing",
        ".attempt-step-1-0a1b2c3d\n",
        "step-1",
        ".metadata",
        ".lock",
        "x.attempt-step-1-0a1b2c3d",
    ],
)
def test_a_hidden_folder_of_the_user_is_ignored(name: str) -> None:
    """G5. Method: names one character away from ours; a cleanup would delete them."""
    assert hidden_folder_of(name) is None


def test_data_files_have_the_names_of_stock_dcp() -> None:
    """G10. Method: stock's own prefix and suffix (torch/distributed/checkpoint/filesystem.py)."""
    from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX

    assert all(re.fullmatch(rf"__\d+_0{DEFAULT_SUFFIX}", data_file(rank)) for rank in (0, 7, 999))


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/passwd", "../a", "a/b", "a\\b", "a\0b"])
def test_a_data_file_outside_of_the_folder_is_refused(name: str) -> None:
    """G8. Method: every kind of name that leaves a folder."""
    from holdfast.format.untrusted import check_file_name

    with pytest.raises(FormatError, match="outside of its folder"):
        check_file_name(name, "here")
