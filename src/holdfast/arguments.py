"""Check the types of arguments and settings.

Scalars of numpy and torch count as numbers, bools never do. This module imports neither package.
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
T = TypeVar("T")

SHOWN_MAX = 80
"""Longest value that a message quotes, in characters."""

MEMBERS_SHOWN_MAX = 8
"""Longest list that a message quotes, in members."""

_SHOWN = (bool, int, float, str, bytes, type(None))
"""Types with a fast `repr` that never fails."""


# ------------------------------------------------------------------------------------ single values


def whole_number(value: object) -> int | None:
    """Convert an integer to int; None for anything else, such as a bool, a float or text."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not _is_single(value) or _dtype(value).endswith("bool"):
        return None
    return _converted(value, operator.index)


def number(value: object) -> float | None:
    """Convert a real number to float; None for anything else, such as a bool or text."""
    if type(value) is float:
        return value
    if isinstance(value, bool | str | bytes | bytearray) or not _is_single(value):
        return None
    if _dtype(value).endswith("bool") or "complex" in _dtype(value):
        return None
    return _converted(value, float)


def flag(value: object) -> bool | None:
    """Convert a bool of Python, numpy or torch; None for anything else."""
    if type(value) is bool:
        return value
    if not _is_single(value) or not _dtype(value).endswith("bool"):
        return None
    return _converted(value, bool)


def _converted(value: Any, convert: Callable[[Any], T]) -> T | None:
    try:
        return convert(value)
    except Exception:  # noqa: BLE001 - a meta tensor raises torch's own error
        return None


def _is_single(value: object) -> bool:
    """Whether `value` is a scalar, or an array without dims."""
    return len(getattr(value, "shape", ())) == 0


def _dtype(value: object) -> str:
    """Name of the dtype of a numpy or torch object; empty for other objects."""
    return str(getattr(value, "dtype", "")).removesuffix("_")


def shown(value: object) -> str:
    """Format a value for a message: itself if it is short, else its type.

    >>> shown("asynk"), shown(2.5), shown({"a": 1})
    ("'asynk'", '2.5', 'a dict')
    """
    if isinstance(value, int) and value.bit_length() > 4 * SHOWN_MAX:
        return f"a number of {value.bit_length()} bits"
    quoted: Sequence[object] = [value]
    if isinstance(value, list | tuple) and len(value) <= MEMBERS_SHOWN_MAX:
        quoted = value
    if all(isinstance(member, _SHOWN) for member in quoted):
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
    """Return a text that suggests the known name closest to `name`; None if none is similar."""
    folded = {candidate.casefold(): candidate for candidate in known}
    close = get_close_matches(name.casefold(), folded, n=1)
    return f"did you mean `{folded[close[0]]}`?" if close else None


def checked_flag(value: object, what: str) -> bool:
    """Return the argument `what` as a bool.

    Raises:
        UsageError: the argument is not a bool.
    """
    checked = flag(value)
    if checked is None:
        raise UsageError(f"`{what}` must be True or False, found: {shown(value)}")
    return checked


def checked_path(path: object, what: str) -> str:
    """Return the path that was passed as argument `what`, as text.

    Raises:
        UsageError: the argument is not a path, or no file can have that path.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str):
        raise UsageError(
            f"`{what}` must be a path, as text or `pathlib.Path`, found: {shown(path)}"
        )
    if not text.strip() or "\0" in text or not _is_encodable(text):
        raise UsageError(f"`{what}` must name a folder or a file, found: {shown(text)}")
    return text


def _is_encodable(text: str) -> bool:
    """Whether a file can have this name. It cannot have a lone surrogate."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def not_installed(error: ImportError, what: str) -> UsageError:
    """Return the error to raise after an import that `what` needs has failed with `error`.

    Raises:
        ImportError: a module of Holdfast is missing, which is a bug.
    """
    package = (error.name or "").partition(".")[0]
    if package == "holdfast":
        raise error
    # If the error has no name, the package is installed, but cannot be imported.
    reason = f"needs `{package}`, which is not installed" if package else f"cannot run: {error}"
    return UsageError(f"{what} {reason}", hint=f"pip install {package}" if package else None)


# ------------------------------------------------------------------------------------------ by type


def is_list(hint: Any) -> bool:
    """Whether a type hint is a tuple. Configurations write tuples as lists."""
    return get_origin(hint) is tuple


def members(hint: Any) -> tuple[Any, ...]:
    """Return the types in a union, without None. Return any other hint alone in a tuple."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(member for member in get_args(hint) if member is not type(None))
    return (hint,)


def described(hint: Any) -> str:
    """Describe the type of a setting in words."""
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
    """Convert `value` to the type `hint`: lists to tuples, paths to text, scalars to Python's.

    Raises:
        UsageError: the value has another type. `where` names the setting in the message.
    """
    if value is None and type(None) in get_args(hint):
        return None
    if len(several := members(hint)) > 1:
        return first_fit(where, several, hint, lambda member: fitted(where, value, member), value)
    (hint,) = several
    converted: Any = None
    if is_list(hint):
        if not isinstance(value, list | tuple):
            raise misfit(where, value, hint)
        try:
            converted = [fitted(where, member, get_args(hint)[0]) for member in value]
        except UsageError:
            raise misfit(where, value, hint) from None
        return of_length(where, converted, hint)
    if get_origin(hint) is Literal:
        converted = value if isinstance(value, str) and value in get_args(hint) else None
    elif hint is str:
        converted = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    elif hint is float:
        converted = number(value)
        converted = None if converted is None or not math.isfinite(converted) else converted
    else:
        converted = {int: whole_number, bool: flag}[hint](value)
    if converted is None:
        raise misfit(where, value, hint)
    return converted


def first_fit(
    where: str, several: Sequence[Any], hint: Any, read: Callable[[Any], Any], value: object
) -> Any:
    """Convert `value` by `read` to the first type in `several` that fits. `hint`: their union."""
    for member in several:
        with suppress(UsageError):
            return read(member)
    raise misfit(where, value, hint)


def of_length(where: str, values: Sequence[Any], hint: Any) -> tuple[Any, ...]:
    """Return `values` as a tuple. Raise `UsageError` if the type `hint` needs more or fewer."""
    wanted = get_args(hint)
    if wanted[-1] is not Ellipsis and len(values) != len(wanted):
        raise misfit(where, values, hint)
    return tuple(values)


def misfit(where: str, value: object, hint: Any) -> UsageError:
    """Return the error about a value of the wrong type."""
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
    """Make a dataclass convert and check its arguments by the annotations of its fields.

    Error messages name a field as `section.name`.

    Raises, when the class is called:
        UsageError: an argument has an unknown name, or a value of the wrong type.
    """

    def decorate(cls: type[C]) -> type[C]:
        original = cls.__init__
        hints: dict[str, Any] = {}

        @wraps(original)
        def __init__(self: C, *values: Any, **named: Any) -> None:  # noqa: N807 - it replaces `__init__`
            if not hints:
                # Only now: when the class was decorated, its module did not define all names yet.
                hints.update(get_type_hints(cls))
            for name in named:
                if name not in hints:
                    hint = nearest(name, hints) or f"its settings: {', '.join(hints)}"
                    raise UsageError(f"`{cls.__name__}` has no setting `{name}`", hint=hint)
            # If there are too many values, or one field twice, let Python raise its own error.
            given: Mapping[str, Any] = dict(zip(hints, values, strict=False))
            if len(values) <= len(hints) and not given.keys() & named.keys():
                named, values = {**given, **named}, ()
            checked = {n: _checked(section, n, v, hints[n]) for n, v in named.items()}
            original(self, *values, **checked)

        cls.__init__ = __init__  # type: ignore[method-assign, assignment]
        return cls

    return decorate


def _checked(section: str, name: str, value: Any, hint: Any) -> Any:
    if isinstance(hint, type) and hint not in (int, float, bool, str):
        if not isinstance(value, hint):
            raise UsageError(f"`{name}` must be a `{hint.__name__}`, found: {shown(value)}")
        return value
    return fitted(f"`{section}.{name}`", value, hint)
