#!/usr/bin/env python3
"""Writes the tables of docs/configuration.md from the configuration classes.

    python scripts/configuration_reference.py            rewrite the tables
    python scripts/configuration_reference.py --check    status 1 if the page is out of date

A row has the key, its type, its default and the docstring under the field.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from holdfast.trainer.config import Config

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
START = "<!-- tables: written by scripts/configuration_reference.py -->"
STOP = "<!-- end of tables -->"
FIRST = "checkpoint"
"""Section that the page shows first."""

TYPES = {bool: "bool", int: "int", float: "float", str: "string"}


def main() -> int:
    page = PAGE.read_text()
    before, rest = page.split(START)
    wanted = f"{before}{START}\n\n{tables()}\n{STOP}{rest.split(STOP)[1]}"
    if page == wanted:
        return 0
    if "--check" in sys.argv[1:]:
        print(f"{PAGE.name} differs from the configuration classes", file=sys.stderr)
        print("hint: python scripts/configuration_reference.py", file=sys.stderr)
        return 1
    PAGE.write_text(wanted)
    return 0


def tables() -> str:
    """One heading and table per section."""
    sections = get_type_hints(Config)
    names = sorted(sections, key=lambda name: name != FIRST)
    return "\n".join(table(name, sections[name]) for name in names)


def table(section: str, kind: type[Any]) -> str:
    """The keys of one section."""
    notes, types, defaults = docstrings(kind), get_type_hints(kind), kind()
    rows = [
        f"| `{field.name}` | {type_text(types[field.name])} "
        f"| {default_text(getattr(defaults, field.name))} | {cell(notes[field.name])} |"
        for field in dataclasses.fields(kind)
    ]
    head = f"## `[{section}]`\n\n{inspect.getdoc(kind)}\n\n"
    return head + "| key | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def docstrings(kind: type[Any]) -> dict[str, str]:
    """The docstring under each field of a class, by the name of the field."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    notes = {}
    for field, note in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(note, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(note.value, ast.Constant)
            notes[field.target.id] = inspect.cleandoc(str(note.value.value))
    return notes


def type_text(hint: Any) -> str:
    """A type as the page has it: the choices of a `Literal`, else its name."""
    if get_origin(hint) is Literal:
        return ", ".join(json.dumps(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        items = [item for item in get_args(hint) if item is not ...]
        return f"list of {type_text(items[0])}"
    parts = [type_text(part) for part in get_args(hint) if part is not NoneType]
    return " or ".join(parts) if parts else TYPES[hint]


def default_text(value: Any) -> str:
    """A default as in TOML; "none" for a key that is not set."""
    if value is None:
        return "none"
    if isinstance(value, float) and value == 0:
        return "0"
    return json.dumps(value)


def cell(text: str) -> str:
    """Prose on one line of a table."""
    return re.sub(r"\s+", " ", text).strip().replace("|", r"\|")


if __name__ == "__main__":
    sys.exit(main())
