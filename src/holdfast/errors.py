"""All errors that Holdfast raises, grouped by what the caller should do.

    HoldfastError
    |-- UsageError        wrong call or configuration: change it                       (exit 2)
    |-- NotFoundError     nothing has that name: list what exists                      (exit 4)
    |-- ExistsError       the name is taken or in use: choose another                  (exit 5)
    |-- MismatchError     the checkpoint does not fit the state: see the differences   (exit 6)
    |-- DamagedError      the data changed after it was written: load an older one     (exit 7)
    |-- FormatError       invalid, unsupported or unsafe file                          (exit 8)
    |-- StorageError      the store failed: fix space, rights or mount, try again      (exit 9)
    `-- RankError         another rank failed or left: restart the job                 (exit 10)

A message states what is wrong, where, what was expected and what was found. `hint` is the next
step to take.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self


class HoldfastError(Exception):
    """Base class of the errors that this package raises on purpose."""

    exit_status: ClassVar[int] = 1
    """Exit status of a command that ends in this error."""

    def __init__(
        self,
        what: str,
        *,
        hint: str | None = None,
        file: str | None = None,
        entry: str | None = None,
        block: int | None = None,
    ) -> None:
        super().__init__(what, hint)
        self.what = what
        self.hint = hint
        self.file = file
        """Path or URL of the file that the error is about; None if it is not about one file."""

        self.entry = entry
        """Name of the tensor or value that the error is about."""

        self.block = block
        """Index of the damaged block of the tensor."""

    def reworded(self, what: str) -> Self:
        """Return the same error with another message."""
        return type(self)(what, hint=self.hint, file=self.file, entry=self.entry, block=self.block)

    def __reduce__(self) -> tuple[object, ...]:
        # Errors are pickled to reach other ranks. By default, unpickling would pass `hint` by
        # position, which `__init__` does not accept.
        details = {"hint": self.hint, "file": self.file, "entry": self.entry, "block": self.block}
        return (_rebuild, (type(self), self.what, details))

    def __str__(self) -> str:
        return self.what if self.hint is None else f"{self.what}\nhint: {self.hint}"


def _rebuild(cls: type[HoldfastError], what: str, details: dict[str, Any]) -> HoldfastError:
    return cls(what, **details)


class UsageError(HoldfastError):
    """The call or the configuration is wrong."""

    exit_status = 2


class NotFoundError(HoldfastError):
    """Nothing has that name."""

    exit_status = 4


class ExistsError(HoldfastError):
    """The name is taken, or another process is using it."""

    exit_status = 5


class MismatchError(HoldfastError):
    """The checkpoint does not fit the state to load into. The message lists every difference."""

    exit_status = 6


class DamagedError(HoldfastError):
    """The bytes changed after they were written. Load an older checkpoint; retrying cannot help."""

    exit_status = 7


class FormatError(HoldfastError):
    """The file is invalid, in an unsupported format, or refers to code."""

    exit_status = 8


class StorageError(HoldfastError):
    """The store failed, for example for lack of space or rights. Fix that, then try again."""

    exit_status = 9


class RankError(HoldfastError):
    """Another rank failed or left the job."""

    exit_status = 10
