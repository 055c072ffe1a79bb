"""What can go wrong, grouped by what the caller does next.

    HoldfastError
    |-- UsageError        the call or the configuration is wrong: change it           (exit 2)
    |-- NotFoundError     nothing is there under that name: look at what is           (exit 4)
    |-- ExistsError       something is there already: choose another name             (exit 5)
    |-- MismatchError     the checkpoint does not fit what is to be loaded            (exit 6)
    |-- DamagedError      the bytes are not those that were written: an older step    (exit 7)
    |-- FormatError       the file is not what it claims to be, or refused as unsafe  (exit 8)
    |-- StorageError      the store failed: mend it (space, rights, mount), try again (exit 9)
    `-- RankError         another rank failed or left: restart the job                (exit 10)

Every message says what, which, expected and found; `hint` is the next thing to do.
"""

from __future__ import annotations

from typing import ClassVar


class HoldfastError(Exception):
    """Every error that this package raises on purpose."""

    exit_status: ClassVar[int] = 1
    """Status with which a command that ends in this error exits."""

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        super().__init__(what, hint)
        self.what = what
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross ranks by pickle, which would lose the keyword-only argument.
        return (_rebuild, (type(self), self.what, self.hint))

    def __str__(self) -> str:
        return self.what if self.hint is None else f"{self.what}\nhint: {self.hint}"


def _rebuild(cls: type[HoldfastError], what: str, hint: str | None) -> HoldfastError:
    return cls(what, hint=hint)


class UsageError(HoldfastError):
    """The call or the configuration is wrong. Change it."""

    exit_status = 2


class NotFoundError(HoldfastError):
    """Nothing is there under that name. Look at what is."""

    exit_status = 4


class ExistsError(HoldfastError):
    """Something is there already, or somebody else is at work on it. Choose another name."""

    exit_status = 5


class MismatchError(HoldfastError):
    """The checkpoint does not fit what is to be loaded: every difference is listed."""

    exit_status = 6


class DamagedError(HoldfastError):
    """The bytes are not those that were written. Retrying cannot help; an older step can."""

    exit_status = 7


class FormatError(HoldfastError):
    """The file is not what it claims to be, or holds what a checkpoint may not hold."""

    exit_status = 8


class StorageError(HoldfastError):
    """The store failed: no space, no rights, gone. Mend it, then try again."""

    exit_status = 9


class RankError(HoldfastError):
    """Another rank failed or left. Restart the job."""

    exit_status = 10
