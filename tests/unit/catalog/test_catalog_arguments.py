"""`save`, `load` and `open`: a wrong argument is refused before anything is touched."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

import holdfast
from holdfast import ExistsError, NotFoundError, UsageError
from holdfast.convert.target import open_target
from holdfast.format.names import NAME_BYTES_MAX, Aside, held_file

STATE = {"w": torch.arange(12.0).view(4, 3), "step": 7}


@pytest.mark.parametrize(
    "path", [None, 3, b"x", "", "  ", "a\0b", "\ud800", [Path("x")], torch.ones(1)]
)
def test_what_is_no_path_is_refused(path: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Method: each way in; the current directory, which an empty path would stand for, stays as it
    was."""
    monkeypatch.chdir(tmp_path)
    for call in (
        lambda: holdfast.save(path, STATE, overwrite=True),
        lambda: holdfast.load(path, {**STATE}),
        lambda: holdfast.open(path),
    ):
        with pytest.raises(UsageError, match="`path` must "):
            call()
    assert not [*tmp_path.iterdir()]
    assert tmp_path.exists()


def test_arguments_the_other_way_round_are_told_their_order(tmp_path: Path) -> None:
    """Method: the state first, as `torch.save` has it; as text and as a path."""
    for path in (str(tmp_path / "x"), tmp_path / "x"):
        for call in (holdfast.save, holdfast.load):
            with pytest.raises(UsageError, match="the path comes first: ") as raised:
                call(STATE, path)  # type: ignore[arg-type]
            assert "found: a dict" in raised.value.what
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("state", [None, 5, "text", [torch.ones(1)], torch.ones(1), {1, 2}])
def test_what_is_no_state_is_refused(state: Any, tmp_path: Path) -> None:
    holdfast.save(tmp_path / "there", STATE)
    for call in (
        lambda: holdfast.save(tmp_path / "new", state),
        lambda: holdfast.load(tmp_path / "there", state),
    ):
        with pytest.raises(UsageError, match="`state` must be a dict of tensors, values and"):
            call()
    assert not (tmp_path / "new").exists()


def test_a_state_that_cannot_be_filled_is_refused(tmp_path: Path) -> None:
    """Method: a view of a dict, which nothing can be put into."""
    holdfast.save(tmp_path / "there", MappingProxyType(STATE))
    with pytest.raises(UsageError, match="filled in place, found: a mappingproxy"):
        holdfast.load(tmp_path / "there", MappingProxyType(STATE))


@pytest.mark.parametrize("value", [1, "no", None, []])
def test_flags_are_flags(value: Any, tmp_path: Path) -> None:
    """Method: what Python takes for true or false, with a checkpoint that it could replace."""
    holdfast.save(tmp_path / "there", STATE)
    before = (tmp_path / "there").stat().st_ino
    with pytest.raises(UsageError, match="`overwrite` must be True or False, found: "):
        holdfast.save(tmp_path / "there", STATE, overwrite=value)
    with pytest.raises(UsageError, match="`strict` must be True or False, found: "):
        holdfast.load(tmp_path / "there", {**STATE}, strict=value)
    assert (tmp_path / "there").stat().st_ino == before


def test_a_region_is_slices_or_one_of_ours(tmp_path: Path) -> None:
    """Method: a slice by itself; indices, steps, too many dims, floats, text."""
    holdfast.save(tmp_path / "there", STATE)
    there = holdfast.open(tmp_path / "there")
    assert torch.equal(there.read("w", slice(1, 3)), STATE["w"][1:3])  # type: ignore[arg-type, index]
    wrong: list[Any] = [0, (0,), (slice(0, 2), 1), "all", {}, torch.ones(2), (slice(0.5, 2),)]
    for region in wrong:
        with pytest.raises(UsageError, match="`region` must "):
            there.read("w", region)
    for slices in ((slice(0, 4, 2),), (slice(0, 1),) * 3):
        with pytest.raises(UsageError, match="has no region"):
            there.read("w", slices)


def test_a_name_is_text_and_of_the_right_kind(tmp_path: Path) -> None:
    """Method: numbers; a value asked for as a tensor, and the other way round."""
    holdfast.save(tmp_path / "there", STATE)
    there = holdfast.open(tmp_path / "there")
    for name in (5, None, ("w",)):
        for call in (there.read, there.value):
            with pytest.raises(UsageError, match="`name` must be text, found: "):
                call(name)  # type: ignore[arg-type]
    with pytest.raises(NotFoundError, match=r'no tensor `step`\nhint: `value\("step"\)`'):
        there.read("step")
    with pytest.raises(NotFoundError, match=r'no value `w`\nhint: `read\("w"\)`'):
        there.value("w")


@pytest.mark.parametrize(
    "name",
    [
        ".attempt-best-00000001",
        ".removing-best-00000002",
        ".replaced-step-3-00000003",
        ".pinned-step-5",
        ".damaged-step-5",
        ".held-best-00000000",
        ".lock",
        "manifest.json",
    ],
)
def test_a_name_that_holdfast_uses_is_no_checkpoints(name: str, tmp_path: Path) -> None:
    """G14: the next start of a run there would delete it. Method: a save and a conversion."""
    with pytest.raises(UsageError, match="Holdfast itself uses names such as"):
        holdfast.save(tmp_path / "new" / name, {"a": 1})
    with pytest.raises(UsageError, match="Holdfast itself uses names such as"):
        open_target(str(tmp_path / "new" / name), overwrite=True)
    assert not (tmp_path / "new").exists()


def test_a_name_is_refused_if_what_is_set_aside_for_it_has_no_name(tmp_path: Path) -> None:
    """G8, G14. Method: the longest name allowed, of two-byte characters, saved and replaced; every
    name that Holdfast makes of it fits. One byte more is refused before anything is made."""
    longest = "\u00f6" * (NAME_BYTES_MAX // 2)
    for value in (1, 2):
        holdfast.save(tmp_path / longest, {"a": value}, overwrite=True)
    assert holdfast.open(tmp_path / longest).value("a") == 2
    for role in ("attempt", "replaced", "removing"):
        aside = str(Aside(role, longest, "0" * 8))
        (tmp_path / aside).mkdir()
        (tmp_path / held_file(aside)).touch()
    for refuse in (
        lambda path: holdfast.save(path, {"a": 1}),
        lambda path: open_target(str(path), overwrite=False),
    ):
        with pytest.raises(UsageError, match=f"a checkpoint may have {NAME_BYTES_MAX}"):
            refuse(tmp_path / "new" / f"{longest}x")
    assert not (tmp_path / "new").exists()


def test_a_home_that_nobody_has_spelled_out_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G8. Method: `~` in every path of the API; no folder of that name is made."""
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(2, 2)
    config = holdfast.CheckpointConfig(enable=True, initial_load_path="~/weights")
    with holdfast.CheckpointManager("run", model=model, config=config) as manager:
        for call in (
            lambda: holdfast.save("~/run/best", STATE),
            lambda: holdfast.load("~/run/best", dict(STATE)),
            lambda: holdfast.open("~/run/best"),
            lambda: holdfast.CheckpointManager("~/run", model=model),
            manager.load,
        ):
            with pytest.raises(UsageError, match="starts with `~`"):
                call()
    assert not (tmp_path / "~").exists()
    holdfast.save("./~/best", STATE)


def test_a_current_folder_that_was_deleted_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G8. Method: relative paths, from a folder that is gone; an absolute one is saved, and an
    error of the caller's object still has its words."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for call in (
        lambda: holdfast.save("best", STATE),
        lambda: holdfast.load("best", dict(STATE)),
        lambda: holdfast.CheckpointManager("run", model=torch.nn.Linear(2, 2)),
    ):
        with pytest.raises(UsageError, match="has been deleted") as raised:
            call()
        assert raised.value.hint
    holdfast.save(tmp_path / "best", STATE)

    class Broken(torch.nn.Module):
        def state_dict(self, *_: Any, **__: Any) -> Any:
            raise ValueError("no state")

    with pytest.raises(UsageError, match="no state"):
        holdfast.save(tmp_path / "broken", {"model": Broken()})


def test_a_link_that_leads_nowhere_is_called_one(tmp_path: Path) -> None:
    """G8, G14. Method: told to replace it, by a save and by a conversion."""
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    for replace in (
        lambda: holdfast.save(link, STATE, overwrite=True),
        lambda: open_target(str(link), overwrite=True),
        lambda: open_target(str(link), overwrite=True, file=True),
    ):
        with pytest.raises(ExistsError, match="it is a link that leads nowhere"):
            replace()
    assert link.is_symlink()


def test_a_meta_tensor_is_told_how_to_get_memory(tmp_path: Path) -> None:
    """G8. Method: a model on the meta device, saved and loaded into."""
    holdfast.save(tmp_path / "best", torch.nn.Linear(2, 2))
    model = torch.nn.Linear(2, 2, device="meta")
    for call in (
        lambda: holdfast.load(tmp_path / "best", model),
        lambda: holdfast.save(tmp_path / "new", model),
    ):
        with pytest.raises(UsageError, match="is a meta tensor, which has no elements") as raised:
            call()
        assert "to_empty" in str(raised.value.hint)
