#!/usr/bin/env python3
"""Writes the tables of docs/configuration.md from the configuration classes.

    python scripts/configuration_reference.py            rewrite the tables
    python scripts/configuration_reference.py --check    status 1 if the page is out of date

A row has the key, its default and the docstring under the field.
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

NAMES = {bool: "bool", int: "int", float: "float", str: "text"}


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
    """Return a heading and a table for each section."""
    sections = get_type_hints(Config)
    names = sorted(sections, key=lambda name: name != FIRST)
    return "\n".join(table(name, sections[name]) for name in names)


def table(section: str, kind: type[Any]) -> str:
    """Return the heading and the table of one section."""
    notes, hints, defaults = docstrings(kind), get_type_hints(kind), kind()
    rows = []
    for field in dataclasses.fields(kind):
        default, note = getattr(defaults, field.name), cell(notes[field.name])
        choices = choices_of(hints[field.name])
        if not all(choice in note for choice in choices):
            note += f" One of {', '.join(map(json.dumps, choices))}."
        rows.append(f"| `{field.name}` | {default_text(default, hints[field.name])} | {note} |")
    head = f"## `[{section}]`\n\n{inspect.getdoc(kind)}\n\n"
    return head + "| key | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def docstrings(kind: type[Any]) -> dict[str, str]:
    """Return the docstring under each field of a class, by the name of the field."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    notes = {}
    for field, note in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(note, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(note.value, ast.Constant)
            notes[field.target.id] = inspect.cleandoc(str(note.value.value))
    return notes


def choices_of(hint: Any) -> list[str]:
    """Return the values that a `Literal` allows; empty for other types."""
    if get_origin(hint) is Literal:
        return [*get_args(hint)]
    return []


def default_text(value: Any, hint: Any) -> str:
    """Return a default as in TOML; for a key that is not set, its type."""
    if value is None:
        (kind,) = (kind for kind in get_args(hint) if kind is not NoneType)
        return f"none ({NAMES[kind]})"
    if isinstance(value, float) and value == 0:
        return "0"
    return json.dumps(value)


def cell(text: str) -> str:
    """Return the text as one cell of a table: without line breaks, and with `|` escaped."""
    return re.sub(r"\s+", " ", text).strip().replace("|", r"\|")


if __name__ == "__main__":
    sys.exit(main())
