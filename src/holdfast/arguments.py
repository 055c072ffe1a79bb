"""What callers hand over, checked by its type before anything is done with it.

numpy's and torch's single numbers count as numbers; a bool is never one. Neither package is
imported for that.
"""

from __future__ import annotations

import math
import operator
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import wraps
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from holdfast.errors import UsageError

C = TypeVar("C")

SHOWN_MAX = 80
"""Characters of a value that a message repeats."""

MEMBERS_SHOWN_MAX = 8
"""Members of a list that a message repeats."""

_SHOWN = (bool, int, float, str, bytes, type(None))
"""Types whose `repr` is quick and never fails."""


# ------------------------------------------------------------------------------------ single values


def whole_number(value: object) -> int | None:
    """`value` as an int; None where it is no whole number: a bool, a float, text."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not _is_single(value) or _dtype(value).endswith("bool"):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001 - a tensor without data refuses by an error of its own
        return None


def number(value: object) -> float | None:
    """`value` as a float; None where it is no number: a bool, text, complex."""
    if type(value) is float:
        return value
    if isinstance(value, bool | str | bytes | bytearray) or not _is_single(value):
        return None
    if _dtype(value).endswith("bool") or "complex" in _dtype(value):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001 - whatever `__float__` raises
        return None


def flag(value: object) -> bool | None:
    """`value` as a bool; None where it is neither Python's own nor one of numpy or torch."""
    if type(value) is bool:
        return value
    if not _is_single(value) or not _dtype(value).endswith("bool"):
        return None
    try:
        return bool(value)
    except Exception:  # noqa: BLE001 - a tensor without data refuses by an error of its own
        return None


def _is_single(value: object) -> bool:
    """Whether this is no array, or one without dims."""
    return len(getattr(value, "shape", ())) == 0


def _dtype(value: object) -> str:
    """numpy's or torch's name of an element's type; empty for other objects."""
    return str(getattr(value, "dtype", "")).removesuffix("_")


def shown(value: object) -> str:
    """A value as a message shows it: itself where that is short, else its type.

    >>> shown("asynk"), shown(2.5), shown({"a": 1})
    ("'asynk'", '2.5', 'a dict')
    """
    if isinstance(value, int) and value.bit_length() > 4 * SHOWN_MAX:
        return f"a number of {value.bit_length()} bits"
    parts: Sequence[object] = [value]
    if isinstance(value, list | tuple) and len(value) <= MEMBERS_SHOWN_MAX:
        parts = value
    if all(isinstance(one, _SHOWN) for one in parts):
        spelled = repr(value)
        if len(spelled) <= SHOWN_MAX:
            return spelled
        if isinstance(value, str):
            return f"{spelled[:SHOWN_MAX]}..."
    elif _dtype(value) and _is_single(value):
        return f"{type(value).__name__} of {_dtype(value)}"
    kind = type(value).__name__
    return f"{'an' if kind[:1] in 'AEIOUaeiou' else 'a'} {kind}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """A hint that names what `name` was probably meant to be; None where nothing is near."""
    folded = {candidate.casefold(): candidate for candidate in known}
    close = get_close_matches(name.casefold(), folded, n=1)
    return f"did you mean `{folded[close[0]]}`?" if close else None


def checked_flag(value: object, what: str) -> bool:
    """The bool that was passed as `what`.

    Raises:
        UsageError: something else was.
    """
    found = flag(value)
    if found is None:
        raise UsageError(f"`{what}` must be True or False, found: {shown(value)}")
    return found


def checked_path(path: object, what: str) -> str:
    """The path that was passed as `what`, as text.

    Raises:
        UsageError: no path, or one that no file system takes.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str):
        raise UsageError(
            f"`{what}` must be a path, as text or `pathlib.Path`, found: {shown(path)}"
        )
    if not text.strip() or "\0" in text or not is_encodable(text):
        raise UsageError(f"`{what}` must name a folder or a file, found: {shown(text)}")
    return text


def is_encodable(text: str) -> bool:
    """Whether a file can have this name: half of a surrogate pair is no character."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def not_installed(error: ImportError, what: str) -> UsageError:
    """The error that says which package `what` needs and has not.

    Raises:
        ImportError: it is a module of this package, which is a fault of ours.
    """
    package = (error.name or "").partition(".")[0]
    if package == "holdfast":
        raise error
    # Without a name a package is there, and something that it needs is not: its own words say it.
    said = f"needs `{package}`, which is not installed" if package else f"cannot run: {error}"
    return UsageError(f"{what} {said}", hint=f"pip install {package}" if package else None)


# ------------------------------------------------------------------------------------------ by type


def is_list(hint: Any) -> bool:
    """Whether values of this type are written as lists."""
    return get_origin(hint) is tuple


def members(hint: Any) -> tuple[Any, ...]:
    """The types that an optional hint allows beside None; the hint itself where it is none."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(member for member in get_args(hint) if member is not type(None))
    return (hint,)


def described(hint: Any) -> str:
    """The type of a setting in words."""
    if len(several := members(hint)) > 1:
        return ", or ".join(map(described, several))
    (hint,) = several
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(hint))
    if is_list(hint):
        item, *others = get_args(hint)
        if others[-1] is Ellipsis:
            return f"a list, each {described(item)}"
        return f"{len(others) + 1} values, each {described(item)}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]


def fitted(where: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`: lists become tuples, paths text, numpy's numbers Python's.

    Raises:
        UsageError: the value is of another type; `where` names the setting.
    """
    if value is None and type(None) in get_args(hint):
        return None
    if len(several := members(hint)) > 1:
        return first_fit(where, several, hint, lambda one: fitted(where, value, one), value)
    (hint,) = several
    found: Any = None
    if is_list(hint):
        if not isinstance(value, list | tuple):
            raise misfit(where, value, hint)
        try:
            found = [fitted(where, one, get_args(hint)[0]) for one in value]
        except UsageError:
            raise misfit(where, value, hint) from None
        return of_length(where, found, hint)
    if get_origin(hint) is Literal:
        found = value if isinstance(value, str) and value in get_args(hint) else None
    elif hint is str:
        found = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    elif hint is float:
        found = number(value)
        found = None if found is None or not math.isfinite(found) else found
    else:
        found = {int: whole_number, bool: flag}[hint](value)
    if found is None:
        raise misfit(where, value, hint)
    return found


def first_fit(
    where: str, several: Sequence[Any], hint: Any, read: Callable[[Any], Any], value: object
) -> Any:
    """The value as the first of a union's members that it fits."""
    for member in several:
        with suppress(UsageError):
            return read(member)
    raise misfit(where, value, hint)


def of_length(where: str, values: Sequence[Any], hint: Any) -> tuple[Any, ...]:
    """The values as a tuple of as many as the hint has."""
    wanted = get_args(hint)
    if wanted[-1] is not Ellipsis and len(values) != len(wanted):
        raise misfit(where, values, hint)
    return tuple(values)


def misfit(where: str, value: object, hint: Any) -> UsageError:
    """The error about a value of another type."""
    literals = [member for member in members(hint) if get_origin(member) is Literal]
    choices = [str(choice) for literal in literals for choice in get_args(literal)]
    advice = nearest(value, choices) if isinstance(value, str) else None
    if is_list(members(hint)[0]) and isinstance(value, str):
        advice = f"a list of one: [{value!r}]"
    wanted = described(hint)
    if isinstance(value, float) and not math.isfinite(value):
        wanted = wanted.replace("a number", "a finite number")
    return UsageError(f"{where} must be {wanted}, found: {shown(value)}", hint=advice)


# ----------------------------------------------------------------------------------------- settings


def settings(section: str) -> Callable[[type[C]], type[C]]:
    """Decorate a dataclass so that what it is made with is checked by the annotations of its
    fields. `section` stands before their names in errors.

    Raises, when the class is called:
        UsageError: a name that is no field, or a value of another type.
    """

    def decorate(cls: type[C]) -> type[C]:
        made = cls.__init__
        hints: dict[str, Any] = {}

        @wraps(made)
        def __init__(self: C, *values: Any, **named: Any) -> None:  # noqa: N807 - it is one
            if not hints:
                # Not as the class is made: its module does not hold all names yet.
                hints.update(get_type_hints(cls))
            for name in named:
                if name not in hints:
                    hint = nearest(name, hints) or f"its settings: {', '.join(hints)}"
                    raise UsageError(f"`{cls.__name__}` has no setting `{name}`", hint=hint)
            # More values than fields, or one given twice: Python's own error says it.
            given: Mapping[str, Any] = dict(zip(hints, values, strict=False))
            if len(values) <= len(hints) and not given.keys() & named.keys():
                named, values = {**given, **named}, ()
            made(self, *values, **{n: _checked(section, n, v, hints[n]) for n, v in named.items()})

        cls.__init__ = __init__  # type: ignore[method-assign, assignment]
        return cls

    return decorate


def _checked(section: str, name: str, value: Any, hint: Any) -> Any:
    if isinstance(hint, type) and hint not in (int, float, bool, str):
        if not isinstance(value, hint):
            raise UsageError(f"`{name}` must be a `{hint.__name__}`, found: {shown(value)}")
        return value
    return fitted(f"`{section}.{name}`", value, hint)
