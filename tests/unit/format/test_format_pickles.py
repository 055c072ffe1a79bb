"""Pickles: Python reads those of Holdfast, and Holdfast reads Python's without running code."""

from __future__ import annotations

import os
import pickle
import pickletools
from collections import OrderedDict
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import FormatError
from holdfast.format.dumper import Call, Dumper, Global, Instance, pickled_int, pickled_str
from holdfast.format.pickles import DtypeName, Plain, loads

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), inner, max_size=4)
    ),
    max_leaves=30,
)


def dumps(value: Any) -> bytes:
    out = Dumper(b"\x80\x04")
    out.put(value)
    out.raw(b".")
    return out.take()


def alike(a: Any, b: Any) -> bool:
    """Whether two values are equal and of the same types: `True` is not 1."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict):
        return [*a] == [*b] and all(map(alike, a.values(), b.values()))
    return bool(a == b)


@given(PLAIN)
def test_python_reads_what_the_dumper_writes(value: Any) -> None:
    """G10. Method: `pickle.loads`, and our reader without allowed globals; values and types."""
    data = dumps(value)
    assert alike(pickle.loads(data), value)
    assert alike(loads(data, {}, where="p"), value)
    assert dumps(value) == data


@given(st.integers())
def test_every_int_survives_a_round_trip(value: int) -> None:
    """Method: any int, and those around each opcode's limit, read by Python's pickle."""
    for number in (value, *(s * 2**b + d for b in (7, 8, 15, 16, 31, 32, 63, 64) for s in (1, -1)
                            for d in (-1, 0, 1))):  # fmt: skip
        assert pickle.loads(b"\x80\x02" + pickled_int(number) + b".") == number


@given(st.text(st.characters(codec="utf-8")))
def test_a_string_of_protocol_2_is_read_back(text: str) -> None:
    """Method: any text, read by Python's pickle."""
    assert pickle.loads(b"\x80\x02" + pickled_str(text) + b".") == text


def test_strings_of_any_length_and_number_are_memoized() -> None:
    """Method: lengths around 255, each string twice, more than 256 strings: both widths of memo
    opcodes."""
    texts = ["x" * n for n in (0, 1, 255, 256, 257, 70000)] + [f"name {i}" for i in range(400)]
    assert pickle.loads(dumps([texts, texts])) == [texts, texts]


def test_python_reads_globals_calls_and_instances() -> None:
    """G10. Method: real classes of the standard library, made by `pickle.loads`."""
    ordered = Global("collections", "OrderedDict")
    value = [
        Call(ordered, ([("a", 1)],)),
        ordered,
        Instance(Global("argparse", "Namespace"), {"a": 1}),
    ]
    import argparse

    assert pickle.loads(dumps(value)) == [
        OrderedDict(a=1),
        OrderedDict,
        argparse.Namespace(a=1),
    ]


def test_take_returns_each_part_once_and_keeps_the_memo() -> None:
    """Method: a string memoized in one part of a pickle and used in the next."""
    out = Dumper(b"\x80\x04")
    out.memoize("a")
    first = out.take()
    assert pickle.loads(first + out.get("a") + b".") == "a"
    out.put("a")
    assert out.take() == out.get("a")


def test_an_unsupported_value_raises_type_error() -> None:
    """Method: a set."""
    with pytest.raises(TypeError, match="no plain value"):
        dumps({1})


class Attack:
    """An object whose pickle calls `os.system`."""

    def __init__(self, marker: str) -> None:
        self._command = f"touch {marker}"

    def __reduce__(self) -> Any:
        return os.system, (self._command,)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_a_command_is_refused_by_name(tmp_path: Any, protocol: int) -> None:
    """G8. Method: `os.system` in every protocol, with a command that creates a file. `pickle.loads`
    of the same bytes does create it, so the attack is real."""
    marker = tmp_path / "ran"
    data = pickle.dumps({"a": [Attack(str(marker))]}, protocol)
    with pytest.raises(FormatError, match=r"refers to `posix\.system`"):
        loads(data, {("collections", "OrderedDict"): OrderedDict}, where="p")
    assert not marker.exists()
    pickle.loads(data)
    assert marker.exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "builtins.getattr", "torch.load", "torch.hub.load", "os.path.join"]
)
def test_an_unknown_global_is_refused_by_name_even_without_a_call(name: str) -> None:
    """G8. Method: a reference to the global alone."""
    module, _, member = name.rpartition(".")
    with pytest.raises(FormatError) as refused:
        loads(f"c{module}\n{member}\n.".encode(), {}, where="the file")
    assert f"`{name}`" in refused.value.what
    assert "`the file`" in refused.value.what


def test_extension_codes_are_refused() -> None:
    """G8. Method: EXT1, which looks up a class in a registry."""
    import copyreg

    copyreg.add_extension("os", "system", 200)
    try:
        with pytest.raises(FormatError):
            loads(b"\x80\x02\x82\xc8U\x02lsR.", {}, where="p")
    finally:
        copyreg.remove_extension("os", "system", 200)


def test_dtypes_are_read_as_names_without_torch() -> None:
    """Method: a reference to a dtype; a member of torch that is no dtype is refused."""
    assert loads(b"ctorch\nbfloat16\n.", {}, where="p") == DtypeName("bfloat16")
    with pytest.raises(FormatError, match=r"torch\.float99"):
        loads(b"ctorch\nfloat99\n.", {}, where="p")


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """G8. Method: any bytes; only `FormatError` may be raised."""
    with suppress(FormatError):
        loads(b"\x80\x04" + data, {("a", "B"): Plain}, where="p")


@given(st.data())
def test_a_corrupted_pickle_is_read_or_refused(
    data: st.DataObject,
) -> None:
    """G8. Method: a valid pickle, truncated or with bytes replaced."""
    broken = bytearray(pickle.dumps({"a": (1, [2.5, "x" * 10]), "b": OrderedDict(c=b"bytes")}))
    for _ in range(data.draw(st.integers(0, 3))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(broken[: data.draw(st.integers(0, len(broken)))])
    with suppress(FormatError):
        loads(cut, {("collections", "OrderedDict"): OrderedDict}, where="p")


EVERYTHING = st.recursive(
    PLAIN | st.floats(allow_nan=False) | st.binary() | st.builds(bytearray, st.binary()),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.sets(st.integers(), max_size=3)
        | st.builds(lambda x: [x, x, (x, x)], inner)
    ),
)


@given(EVERYTHING, st.integers(0, 5))
def test_values_of_built_in_types_are_read_like_by_python(value: Any, protocol: int) -> None:
    """G10. Method: any value of built-in types in every protocol, with every opcode for numbers,
    texts, bytes and memos. Types that need a global are refused by name."""
    data = pickle.dumps(value, protocol)
    names = [opcode.name for opcode, *_ in pickletools.genops(data)]
    if {"GLOBAL", "STACK_GLOBAL"} & {*names}:
        with pytest.raises(FormatError, match="does not allow"):
            loads(data, {}, where="p")
    else:
        assert alike(loads(data, {}, where="p"), pickle.loads(data))


def test_more_than_256_memoized_objects_are_read_in_every_protocol() -> None:
    """G10. Method: long lists of texts, each twice, which need the widest memo opcodes."""
    texts = [f"text {number}" for number in range(70000)]
    for protocol in range(6):
        assert loads(pickle.dumps([texts, texts], protocol), {}, where="p") == [texts, texts]


@pytest.mark.parametrize(
    "opcodes",
    [
        b"Nr\xff\xff\xff\x0f.",  # LONG_BINPUT: room for 268 million memoized objects
        b"Np268435455\n.",  # PUT
        b"Np268435455",
        b"\x96\xff\xff\xff\x7f\x00\x00\x00\x00.",  # BYTEARRAY8 of 2 GiB
        b"\x8e\xff\xff\xff\x7f\x00\x00\x00\x00.",  # BINBYTES8
        b"X\xff\xff\xff\x7f.",  # BINUNICODE
    ],
)
def test_a_small_file_does_not_allocate_much_memory(opcodes: bytes) -> None:
    """G8. Method: opcodes with a size that exceeds the file; peak memory by Python's own count."""
    import tracemalloc

    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            loads(b"\x80\x04" + opcodes, {}, where="p")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def _set_on(target: str, name: str) -> bytes:
    """Return a pickle that sets attributes on a global by the BUILD opcode."""
    module, _, member = target.rpartition(".")
    state = b"(N}(X" + len(name).to_bytes(4, "little") + name.encode() + b"K\x07ut"
    return f"c{module}\n{member}\n".encode() + state + b"b."


def test_a_pickle_cannot_change_a_class_or_function_of_this_process() -> None:
    """G8. Method: BUILD on each global that `.metadata` and containers may use. By default it would
    set attributes of the class or function itself, for the whole process."""
    from holdfast.format import dcp, torchzip

    for allowed in (dcp._ALLOWED, torchzip.GLOBALS):
        for (module, member), stands in allowed.items():
            known = dict(vars(stands)) if hasattr(stands, "__dict__") else {}
            with suppress(FormatError):
                loads(_set_on(f"{module}.{member}", "marked"), allowed, where="p")
            if hasattr(stands, "__dict__"):
                assert dict(vars(stands)) == known, f"{module}.{member} was changed"
    assert not hasattr(PurePosixPath, "marked")
