"""ARCHITECTURE.md names only files and functions that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "holdfast"
PAGE = (ROOT / "ARCHITECTURE.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)(?:::([\w.]+))?`", PAGE)))


def definitions(file: Path) -> set[str]:
    """Return the names of a file's top-level functions and classes, and `Class.method` for each
    method."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
            names |= {f"{node.name}.{method.name}" for method in methods}
    return names


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_file_or_function_in_the_architecture_page_exists(file: str, name: str) -> None:
    """Method: look up every `file.py::name` of the page in the syntax tree of that file."""
    assert (SOURCE / file).exists(), f"{file} is gone: update ARCHITECTURE.md"
    assert not name or name in definitions(SOURCE / file), f"{file} has no {name}"


def test_the_page_and_the_readme_have_every_package() -> None:
    """Method: compare the folders of the source with the tree in the README and the diagram of the
    page."""
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    tree = set(re.findall(r"^[|`]-- (\w+)/", (ROOT / "README.md").read_text(), re.M))
    assert tree == packages
    layers = PAGE.split("```")[1]
    assert packages <= set(re.findall(r"\w+", layers))


def test_the_page_walks_a_save_a_load_and_a_conversion() -> None:
    """Method: each of the three sections names functions of at least four files."""
    for walk in ("One save", "One load", "One conversion"):
        section = PAGE.split(f"## {walk}\n")[1].split("\n## ")[0]
        assert len({file for file, _ in re.findall(r"`([\w/]+\.py)::(\w+)", section)}) >= 4
