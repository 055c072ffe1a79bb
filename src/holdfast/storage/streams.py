"""Read and write the bytes of one object: several ranges at once, or as one stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Queue
from threading import Condition, Thread
from types import TracebackType

from holdfast.errors import HoldfastError, NotFoundError, StorageError
from holdfast.storage.bucket import Bucket, TakenError, UnansweredError, Version
from holdfast.storage.store import Buffer

PART_BYTES = 8 << 20
"""Bytes of one request. Smaller requests spend most of their time on the network's latency."""

WAITING_BYTES_MAX = 16 << 20
"""Maximum number of bytes that wait to be sent."""

_TRIES = 5


class ObjectReader:
    """Reads ranges of an object. A large range is read by several requests at once."""

    def __init__(self, read: Callable[[int, memoryview], int], threads: ThreadPoolExecutor) -> None:
        """`read(start, target)`: sends one request, as `Bucket.get_into` does."""
        self._read, self._threads = read, threads

    def read_into(self, start: int, target: memoryview) -> int:
        def read(offset: int) -> int:
            return self._read(start + offset, target[offset : offset + PART_BYTES])

        offsets = range(0, len(target), PART_BYTES)
        if len(offsets) < 2:
            return sum(map(read, offsets))
        return sum(self._threads.map(read, offsets))

    def __enter__(self) -> ObjectReader:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class ObjectWriter:
    """Writes an object. A small object is put by one request. A large object is put as a stream, so
    its bytes must be written in order."""

    def __init__(
        self, bucket: Bucket, key: str, nbytes: int, where: str, *, replaces: bool = False
    ) -> None:
        """`replaces`: whether the object may exist, and is then replaced."""
        self._bucket, self._key, self._nbytes, self._where = bucket, key, nbytes, where
        self._replaces = replaces
        self._before: Version | None = None
        """Version of the object that is to be replaced; None if there is none."""

        self._small = bytearray(nbytes) if nbytes <= PART_BYTES else None
        self._stream: _Stream | None = None
        self._offset = 0

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        for part in parts:
            view = memoryview(part).cast("B")
            if self._small is not None:
                self._small[offset : offset + len(view)] = view
            elif offset != self._offset:
                raise StorageError(
                    f"`{self._where}`: byte {offset} was written after byte {self._offset}, and an "
                    "object store takes the bytes of a file in their order"
                )
            elif len(view):
                assert self._stream is not None, "the file is open"
                self._stream.put(view)
                self._offset += len(view)
            offset += len(view)

    def __enter__(self) -> ObjectWriter:
        if self._small is None:
            with suppress(NotFoundError):
                self._before = self._bucket.head(self._key).version
                if not self._replaces:
                    raise self._taken()
            self._stream = _Stream(self._bucket, self._key)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            short = error is None and self._offset != self._nbytes
            if short:
                error = StorageError(
                    f"`{self._where}`: {self._offset} of {self._nbytes} bytes were written"
                )
            try:
                self._stream.end(error)
            except UnansweredError:
                if not self._is_stored():
                    raise
            if short and error is not None:
                raise error
        elif error is None:
            self._put_small()

    def _is_stored(self) -> bool:
        """Return whether the whole object is there, after the store has not answered its upload."""
        try:
            found = self._bucket.head(self._key)
        except HoldfastError:
            return False
        return found.nbytes == self._nbytes and found.version != self._before

    def _put_small(self) -> None:
        assert self._small is not None
        data = bytes(self._small)
        if self._replaces:
            self._bucket.put(self._key, data)
            return
        for number in range(1, _TRIES + 1):
            try:
                self._bucket.put_new(self._key, data)
                return
            except TakenError as error:
                raise self._taken() from error
            except UnansweredError:
                with suppress(NotFoundError):
                    found, _ = self._bucket.get(self._key, len(data) + 1)
                    if found == data:
                        return
                if number == _TRIES:
                    raise

    def _taken(self) -> StorageError:
        return StorageError(f"`{self._where}` exists already")


class _Stream:
    """A thread that sends parts to the store, in order."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self._queue: Queue[memoryview | BaseException | None] = Queue()
        self._waiting = 0
        self._changed = Condition()
        self._error: BaseException | None = None
        self._ended = False
        self._thread = Thread(
            target=self._run, args=(bucket, key), name="holdfast-upload", daemon=True
        )
        self._thread.start()

    def put(self, part: memoryview) -> None:
        """Send a part after all earlier parts. Blocks while too many bytes wait to be sent."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._waiting < WAITING_BYTES_MAX)
            if self._ended:
                self._raise()
            self._waiting += len(part)
        self._queue.put(part)

    def end(self, error: BaseException | None) -> None:
        """Wait until all parts are stored, and raise the error of the thread if it failed. If the
        caller failed with `error`, make the upload fail too, so that no object is created."""
        self._queue.put(error)
        self._thread.join()
        if error is None:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self, bucket: Bucket, key: str) -> None:
        try:
            bucket.put_stream(key, self._parts())
        except BaseException as error:  # noqa: BLE001 - raised by the thread that writes
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _parts(self) -> Iterator[Buffer]:
        while (part := self._queue.get()) is not None:
            if isinstance(part, BaseException):
                # Raise a new error, since the store's client may keep the error that it gets. The
                # caller's own error would keep alive all objects that its traceback refers to.
                raise StorageError(f"given up: {part}")
            yield part
            with self._changed:
                self._waiting -= len(part)
                self._changed.notify_all()
