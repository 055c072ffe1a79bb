"""Values that are stored as another type have their own type again, however they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import holdfast
from holdfast.cli.main import main
from holdfast.state.same import same

SAVED: dict[str, Any] = {
    "empty": b"",
    "text": "",
    "number": np.float32(2.5),
    "list": [b"", np.int8(3), ("", b"a")],
    "keys": {1: b"", "1.5": {"inner": np.bool_(True)}},
}

VALUES: dict[str, Any] = {
    "empty": b"",
    "text": "",
    "number": np.float32(2.5),
    "list": [b"", np.int8(3), ("", b"a")],
    "keys.1": b"",
    "keys.1.5.inner": np.bool_(True),
}
"""Values of `SAVED` by name."""


class Holder:
    """An object whose state has values that are stored as another type."""

    def state_dict(self) -> dict[str, Any]:
        return {"inside": b"", "member": SAVED["list"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError(state)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    holdfast.save(tmp_path / "one", {**SAVED, "object": Holder()})
    return tmp_path / "one"


def test_an_open_checkpoint_returns_each_value_with_its_type(folder: Path) -> None:
    """Method: each value by its name; `state()` returns the same ones."""
    opened = holdfast.open(folder)
    values = {**VALUES, "object.inside": b"", "object.member": VALUES["list"]}
    assert {*opened.names()} == {*values}
    for name, value in values.items():
        found = opened.value(name)
        assert type(found) is type(value)
        assert same(found, value), name
    assert same(opened.state(), {**SAVED, "object": Holder().state_dict()})


def test_a_conversion_keeps_empty_bytes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: to a `.pt` file and back. `torch.load` and `holdfast show` read the file. It has
    numbers of Python in place of numpy scalars, which `torch.load` refuses."""
    assert main(["convert", str(folder), str(tmp_path / "one.pt")]) == 0
    loaded = torch.load(tmp_path / "one.pt", weights_only=True)
    assert loaded["empty"] == b""
    assert loaded["text"] == ""
    assert loaded["keys"]["1"] == b""
    assert same(loaded["list"], [b"", 3, ("", b"a")])
    assert same(loaded["number"], 2.5)
    assert main(["convert", str(tmp_path / "one.pt"), str(tmp_path / "back"), "--to", "dcp"]) == 0
    assert same(holdfast.open(tmp_path / "back").state()["list"], [b"", 3, ["", b"a"]])
    state = {"empty": None, "text": None}
    holdfast.load(tmp_path / "back", state)
    assert state == {"empty": b"", "text": ""}
    assert main(["convert", str(folder), str(tmp_path / "again"), "--to", "dcp"]) == 0
    assert same(holdfast.open(tmp_path / "again").state(), holdfast.open(folder).state())


def test_a_difference_of_types_is_a_difference(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = {"empty": "", "text": "", "number": 2.5, "list": VALUES["list"], "keys": SAVED["keys"]}
    holdfast.save(tmp_path / "two", {**plain, "object": Holder()})
    assert main(["diff", str(folder), str(tmp_path / "two"), "--json"]) == 6
    states = json.loads(capsys.readouterr().out)["values"]
    assert {name for name, state in states.items() if state != "equal"} == {"empty", "number"}
    assert main(["diff", str(folder), str(folder)]) == 0


def test_show_tells_empty_bytes_from_an_empty_text(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("empty", "b''"), ("text", "''"), ("list", "[b'', 3, ('', b'a')]")):
        assert main(["show", str(folder), name]) == 0
        assert f"{name}  {text}  " in capsys.readouterr().out
