"""Rules for the source code that a test can check, so that no reviewer has to."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from holdfast.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "holdfast"
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 60
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "base", "types"}
BANNED = re.compile(r"TODO|FIXME|XXX|NotImplementedError|breakpoint\(|/(?:home|work|Users|root)/")

SOURCES = sorted(SOURCE.rglob("*.py"))
FILES = SOURCES + sorted((ROOT / "tests").rglob("*.py"))


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def of_each(paths: Sequence[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """Make one test of a check of a file, which fails with the files that the check fails for.

    A test of each file and check, over two thousand, would take longer than the checks.
    """

    def decorate(check: Callable[[Path], None]) -> Callable[[], None]:
        def test() -> None:
            wrong = []
            for path in paths:
                try:
                    check(path)
                except AssertionError as error:
                    wrong.append(f"{_id(path)}: {error}")
            assert not wrong, "\n".join(wrong)

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


def _functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every function's name and its number of lines without the docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            start = node.lineno
            if ast.get_docstring(node, clean=False) is not None:
                start = (node.body[0].end_lineno or 0) + 1
            yield node.name, (node.end_lineno or 0) - start + 1


def _undocumented(tree: ast.Module) -> Iterator[str]:
    """Yield public top-level functions and classes without a docstring.

    Methods need none, since a protocol documents those of the classes that implement it.
    """
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            short = isinstance(node, ast.FunctionDef) and len(node.body) == 1
            if ast.get_docstring(node) is None and not short:
                yield node.name


def test_no_literal_is_unpacked_where_its_elements_could_be_written() -> None:
    """Method: look for `*(a, b)` and `*[a, b]` in the syntax of every file."""
    found = [
        f"{_id(path)}:{node.lineno}"
        for path in [*FILES, *sorted((ROOT / "benchmarks").glob("*.py"))]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Starred) and isinstance(node.value, ast.Tuple | ast.List)
    ]
    assert not found


@of_each(FILES)
def test_a_file_and_its_functions_fit_on_the_pages_they_are_given(path: Path) -> None:
    """Method: count the lines of the file, and of each function without its docstring."""
    text = path.read_text()
    lines = text.count("\n")
    assert lines <= FILE_LINES_MAX, f"{lines} lines, the limit is {FILE_LINES_MAX}"
    too_long = [(n, c) for n, c in _functions(ast.parse(text)) if c > FUNCTION_LINES_MAX]
    assert not too_long, f"limit of {FUNCTION_LINES_MAX} lines: {too_long}"


@of_each(SOURCES)
def test_a_module_is_named_for_what_it_holds_and_says_so_first(path: Path) -> None:
    """Method: the name is not in a list of vague names, and the module has a docstring."""
    assert path.stem not in VAGUE, "name the module after its contents"
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, "no module docstring"


@of_each(SOURCES)
def test_what_is_public_says_what_the_caller_gets(path: Path) -> None:
    """Method: look for the docstrings of public classes, and of public functions longer than one
    statement."""
    missing = list(_undocumented(ast.parse(path.read_text())))
    assert not missing, f"without docstring: {missing}"


UNCONFIGURED = [
    path
    for path in SOURCES
    if path.relative_to(SOURCE).parts[0] not in ("manager", "trainer", "testing")
    and path != SOURCE / "hosts/torchtitan.py"
]
"""Modules that are used without a configuration. TorchTitan's has these keys too."""

KEY = re.compile(r"`checkpoint\.[a-z]|--checkpoint\.|`load_step|exclude_from_loading")


@of_each(UNCONFIGURED)
def test_keys_of_a_configuration_are_named_where_there_is_one(path: Path) -> None:
    """G8: messages of `holdfast.load` and of commands name no configuration keys, since these have
    no configuration. Method: search every line of the modules outside `manager` and `trainer`."""
    lines = path.read_text().splitlines()
    assert not [line for line in lines if KEY.search(line)]


@of_each(SOURCES)
def test_nothing_unfinished_and_no_place_of_one_machine_is_left_in_the_code(path: Path) -> None:
    """Method: search the lines of the file for markers of unfinished code and for paths of a
    machine."""
    found = [
        f"{number}: {line.strip()}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if BANNED.search(line)
    ]
    assert not found, "\n".join(found)


@of_each(SOURCES)
def test_values_are_frozen_and_slotted(path: Path) -> None:
    """Method: the decorator of every dataclass has `slots=True`. It also has `frozen=True`, unless
    the class is private or in the list `written_to`."""
    written_to = {"CheckpointConfig", "Spans"}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef) or "trainer" in path.parts:
            continue
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "dataclass":
                options = {k.arg: ast.literal_eval(k.value) for k in decorator.keywords}
                assert options.get("slots"), f"{node.name}: slots=True"
                private = node.name.startswith("_") or node.name in written_to
                assert options.get("frozen") or private, f"{node.name}: frozen=True"


STORES = ("LocalStore", "RemoteStore", "ObjectStore", "CloudBucket")


@of_each([p for p in SOURCES if p.parent.name != "storage"])
def test_a_store_is_made_by_the_functions_that_tell_a_folder_from_a_url(path: Path) -> None:
    """G16: a URL such as `s3://...` never becomes a folder of that name. Method: outside of
    `storage`, only the functions of `storage.opening` make stores; no other code calls the classes.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            assert called not in STORES, f"line {node.lineno}"


DEVICE_KINDS = ("accelerator", "cuda", "mps", "mtia", "xpu", "Event", "Stream")


@of_each([path for path in SOURCES if path != SOURCE / "accelerator.py"])
def test_only_one_module_knows_devices(path: Path) -> None:
    """Method: outside of `accelerator.py`, look for modules and classes of torch that are about
    devices, and for the argument `pin_memory`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "torch":
            assert node.attr not in DEVICE_KINDS, f"line {node.lineno}"
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                names.add(node.module or "")
            assert not {f"torch.{kind}" for kind in DEVICE_KINDS} & names, f"line {node.lineno}"
        if isinstance(node, ast.keyword):
            assert node.arg != "pin_memory", f"line {node.lineno}"


def test_every_command_has_a_module_and_every_module_with_a_command_is_listed() -> None:
    """Method: compare the table of commands with the modules of `holdfast.cli` with a `run`."""
    modules = {
        path.stem
        for path in (SOURCE / "cli").glob("*.py")
        if "run" in {getattr(node, "name", "") for node in ast.parse(path.read_text()).body}
    }
    assert modules == COMMANDS.keys()


@pytest.mark.parametrize(
    "statement",
    [
        "import holdfast",
        "import holdfast.errors",
        *sorted(
            f"import holdfast.{room}.{path.stem}"
            for room in ("format", "storage", "catalog")
            for path in (SOURCE / room).glob("[!_]*.py")
        ),
    ],
)
def test_what_knows_only_bytes_imports_no_torch(statement: str) -> None:
    """Method: import the module in a new interpreter; this must not import torch."""
    script = f"import sys; {statement}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_class_name_means_one_class() -> None:
    modules: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                modules.setdefault(node.name, []).append(_id(path))
    assert {name: where for name, where in modules.items() if len(where) > 1} == {}
