"""Access buckets of S3, Google Cloud Storage and Azure through obstore.

No other module imports obstore. Credentials, regions and endpoints come from the same environment
variables as for each store's own tools: `AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `AWS_PROFILE`,
`GOOGLE_APPLICATION_CREDENTIALS`, `AZURE_STORAGE_ACCOUNT_NAME`, ...
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from configparser import ConfigParser
from configparser import Error as ConfigError
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

from holdfast.errors import HoldfastError, NotFoundError, StorageError, UsageError
from holdfast.storage.bucket import (
    Listing,
    StoredObject,
    TakenError,
    UnansweredError,
    Version,
    pause,
    until_answered,
)
from holdfast.storage.bucket_leases import REQUEST_S
from holdfast.storage.store import Buffer
from holdfast.storage.streams import PART_BYTES

try:
    import obstore
    from obstore import exceptions
    from obstore.store import from_url
except ImportError:
    obstore = None  # type: ignore[assignment]

CONCURRENT_PARTS = 4
"""Parts of one upload that are sent at the same time. These parts and the one that is being filled
are all the memory that an upload takes besides the snapshot."""

_PIECE_BYTES = 256 << 10
"""Bytes of a response that are copied to the caller's buffer at a time, while more bytes arrive."""

_PATIENCE_S = 180.0
"""Seconds during which a request for data is retried after errors, with growing random pauses."""

_TRIES = 3
"""Maximum number of times that a listing or a deletion is sent. obstore itself does not retry them
if the response is cut short."""

_RETRIES_MAX = 50
"""Maximum number of retries of a request. So large that the time limit always comes first."""

_DATA_S = 300.0
"""Time-out, in seconds, of one request for data."""

_ENDPOINTS = {
    "s3": ("endpoint", ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")),
    "az": ("endpoint", ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")),
    "gs": ("base_url", ("GOOGLE_BASE_URL",)),
}
"""For each kind of store, obstore's option for the endpoint, and the environment variables that set
the option."""

_NO_BUCKET = re.compile("NoSuchBucket|ContainerNotFound|specified bucket does not exist")

_STATUS = re.compile(r"status code: ([0-9]{3})")

_REFUSED_HINT = (
    "check the credentials and the rights of the bucket; the endpoint and the region too"
)


class CloudBucket:
    """A prefix of a bucket, through obstore."""

    def __init__(self, url: str, config: Mapping[str, Any] | None = None) -> None:
        """`config`: options of obstore, in addition to those from the environment.

        Raises:
            UsageError: obstore is not installed, or the URL does not name a bucket.
        """
        if obstore is None:
            raise UsageError(
                f"`{url}` is in an object store, and obstore is not installed",
                hint="pip install 'holdfast[remote]'",
            )
        self._url = url.rstrip("/")
        options = {**_environment(url), **(config or {})}
        self._data = self._store(options, timeout_s=_DATA_S, patience_s=_PATIENCE_S)
        # The time-out is half of the time for all tries, so a request that hangs is sent again.
        self._control = self._store(options, timeout_s=REQUEST_S / 2, patience_s=REQUEST_S)
        self._once = self._store(options, timeout_s=REQUEST_S, patience_s=REQUEST_S, retries=0)

    def _store(
        self,
        options: dict[str, Any],
        *,
        timeout_s: float,
        patience_s: float,
        retries: int = _RETRIES_MAX,
    ) -> Any:
        options = dict(options)
        provider = options.pop("credential_provider", None)
        endpoint = options.get("endpoint") or options.get("base_url") or ""
        insecure = str(endpoint).startswith("http://")
        more = {} if provider is None else {"credential_provider": provider}
        try:
            return from_url(
                self._url,
                config=cast("Any", options),
                client_options={
                    "timeout": timedelta(seconds=timeout_s),
                    "connect_timeout": timedelta(seconds=REQUEST_S / 2),
                    **({"allow_http": True} if insecure else {}),
                },
                retry_config={
                    "max_retries": retries,
                    "retry_timeout": timedelta(seconds=patience_s),
                },
                **more,
            )
        except (exceptions.BaseError, ValueError, TypeError) as error:
            raise UsageError(f"`{self._url}` cannot be opened: {_line(error)}") from error

    @property
    def url(self) -> str:
        return self._url

    def head(self, key: str) -> StoredObject:
        with self._errors_of("look at", key):
            return _described(obstore.head(self._control, key))

    def get(self, key: str, nbytes_max: int) -> tuple[bytes, StoredObject]:
        # obstore sends a request again, but not if the body of its answer is cut.
        return until_answered(partial(self._get, key, nbytes_max), _TRIES)

    def _get(self, key: str, nbytes_max: int) -> tuple[bytes, StoredObject]:
        with self._errors_of("read", key):
            try:
                result = obstore.get(self._control, key, options={"range": (0, nbytes_max)})
                data = bytes(result.bytes())
            except exceptions.GenericError as error:
                if not _is_past_the_end(error):
                    raise
                return b"", self.head(key)  # The object is empty, so no range of it exists.
            return data, _described(result.meta)

    def get_range(self, key: str, start: int, stop: int) -> Buffer:
        with self._errors_of("read", key):
            try:
                data = obstore.get_range(self._data, key, start=start, end=stop)
            except exceptions.GenericError as error:
                if not _is_past_the_end(error):
                    raise
                return b""  # The object ends before `start`.
            return cast("Buffer", data)

    def get_into(self, key: str, start: int, target: memoryview) -> int:
        stop, nbytes = start + len(target), 0
        with self._errors_of("read", key):
            try:
                result = obstore.get(self._data, key, options={"range": (start, stop)})
            except exceptions.GenericError as error:
                if not _is_past_the_end(error):
                    raise
                return 0  # The object ends before `start`.
            # Stream the response: reading the range at once would keep all its bytes twice.
            for data in result.stream(min_chunk_size=_PIECE_BYTES):
                piece = memoryview(data)
                target[nbytes : nbytes + len(piece)] = piece
                nbytes += len(piece)
        return nbytes

    def put_new(self, key: str, data: bytes) -> Version:
        return self._put(self._once, key, data, "create")

    def put_over(self, key: str, data: bytes, version: Version) -> Version:
        try:
            return self._put(self._once, key, data, dict(version))
        except NotFoundError as error:
            raise TakenError(f"`{key}` does not exist") from error

    def put(self, key: str, data: bytes) -> None:
        store = self._control if len(data) <= PART_BYTES else self._data
        self._put(store, key, data, "overwrite")

    def _put(self, store: Any, key: str, data: bytes, mode: Any) -> Version:
        with self._errors_of("write", key):
            # A multipart put would not be conditional.
            return _version(obstore.put(store, key, data, mode=mode, use_multipart=False))

    def put_stream(self, key: str, parts: Iterator[Buffer]) -> None:
        is_begun = False

        def taken() -> Iterator[Buffer]:
            nonlocal is_begun
            for part in parts:
                is_begun = True
                yield part

        def put() -> None:
            try:
                with self._errors_of("write", key):
                    obstore.put(
                        self._data,
                        key,
                        taken(),
                        use_multipart=True,
                        chunk_size=PART_BYTES,
                        max_concurrency=CONCURRENT_PARTS,
                    )
            except NotFoundError as error:
                # If the answer to the last request is cut, obstore gives the upload up, which the
                # store does not have any more if it has executed the request.
                raise UnansweredError(f"the upload of {error.what} is gone") from error

        # The answer to the request that begins the upload may be cut. Once a part is taken, the
        # upload cannot begin again.
        until_answered(put, _TRIES, may_repeat=lambda: not is_begun)

    def copy(self, source: str, target: str) -> None:
        with self._errors_of("copy", source):
            obstore.copy(self._data, source, target)

    def list(self, prefix: str) -> Listing:
        return until_answered(partial(self._list, prefix), _TRIES)

    def _list(self, prefix: str) -> Listing:
        with self._errors_of("list", prefix):
            found = obstore.list_with_delimiter(self._data, prefix or None)
            prefixes = [name.rpartition("/")[2] for name in found["common_prefixes"]]
            return Listing([_described(meta) for meta in found["objects"]], prefixes)

    def list_all(self, prefix: str) -> Iterator[StoredObject]:
        last: str | None = None
        for number in range(1, _TRIES + 1):
            try:
                with self._errors_of("list", prefix):
                    pages = obstore.list(self._data, prefix or None, offset=last, chunk_size=1000)
                    for found in map(_described, itertools.chain.from_iterable(pages)):
                        yield found
                        last = found.key
                return
            except UnansweredError:
                if number == _TRIES:
                    raise
                pause()

    def delete(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), 1000):
            some = [*keys[start : start + 1000]]
            until_answered(partial(self._delete, some), _TRIES)

    def _delete(self, keys: Sequence[str]) -> None:
        with self._errors_of("remove", keys[0]):
            try:
                obstore.delete(self._control, [*keys])
            except FileNotFoundError as error:
                if _NO_BUCKET.search(str(error)):
                    raise
                # S3 ignores missing objects. With other stores, the first missing object ends the
                # whole deletion, so delete the objects one by one.
                for key in keys:
                    with suppress(FileNotFoundError):
                        obstore.delete(self._control, key)

    @contextmanager
    def _errors_of(self, doing: str, key: str) -> Iterator[None]:
        """Convert errors of obstore to errors of Holdfast."""
        where = f"{self._url}/{key}".rstrip("/")
        try:
            yield
        except HoldfastError:
            raise
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
            raise TakenError(_line(error)) from error
        except FileNotFoundError as error:
            if _NO_BUCKET.search(str(error)):
                raise _failed(doing, where, error) from error
            raise NotFoundError(f"nothing at `{where}`", file=where) from error
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise StorageError(
                f"cannot {doing} `{where}`: {_line(error)}", hint=_REFUSED_HINT, file=where
            ) from error
        except exceptions.BaseError as error:
            raise _failed(doing, where, error) from error


def _failed(doing: str, where: str, error: Exception) -> StorageError:
    status, text = _status(error), _line(error)
    if _NO_BUCKET.search(text):
        return StorageError(
            f"cannot {doing} `{where}`: there is no such bucket",
            hint="make the bucket with the tool of that store, or correct the URL",
        )
    what = f"cannot {doing} `{where}`: {text}"
    if status == 507 or "Quota" in text or "StorageFull" in text:
        return StorageError(what, hint="the bucket is full, or its quota is used up: free space")
    if status is not None and 400 <= status < 500 and status not in (408, 409, 429):
        return StorageError(what, hint=_REFUSED_HINT, file=where)
    return UnansweredError(what, hint="check the network and the endpoint of the store", file=where)


def _described(meta: Mapping[str, Any]) -> StoredObject:
    return StoredObject(
        key=meta["path"],
        nbytes=meta["size"],
        version=_version(meta),
        modified=meta["last_modified"],
    )


def _version(result: Mapping[str, Any]) -> Version:
    names = ("e_tag", "version")
    return {name: result[name] for name in names if result.get(name) is not None}


def _status(error: Exception) -> int | None:
    """Return the HTTP status code in an error; None if the error has none."""
    found = _STATUS.search(str(error))
    return None if found is None else int(found[1])


def _is_past_the_end(error: Exception) -> bool:
    """Return whether a read failed because the object ends before the requested range."""
    return _status(error) == 416 or "Wanted range starting at" in str(error)


def _line(error: Exception) -> str:
    """Format an error of obstore on one line, without its debug output."""
    text = str(error).partition("\n\nDebug source")[0]
    code = re.search(r"<Code>([^<]+)</Code>", text)
    message = re.search(r"<Message>([^<]+)</Message>", text)
    text = text.partition("\n")[0].partition(": <?xml")[0]
    more = [found[1] for found in (code, message) if found is not None]
    return ": ".join([text, *more])


def _environment(url: str) -> dict[str, Any]:
    """Return the options in environment variables that obstore itself does not read."""
    kind = next((kind for kind in ("s3", "gs") if url.startswith(kind)), "az")
    option, names = _ENDPOINTS[kind]
    found = [os.environ[name] for name in names if os.environ.get(name)]
    options: dict[str, Any] = {option: found[0]} if found else {}
    if kind == "s3" and (name := os.environ.get("AWS_PROFILE") or _default_profile()):
        options["credential_provider"] = _profile(url, name)
    return options


_OTHER_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
"""Environment variables with credentials, which obstore reads. As in AWS's own tools, they come
before the default profile."""


def _default_profile() -> str | None:
    """Return the name of the default profile, if it has credentials that are to be used."""
    if any(os.environ.get(name) for name in _OTHER_CREDENTIALS):
        return None
    parser = ConfigParser(interpolation=None)
    file = os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
    with suppress(ConfigError, UnicodeDecodeError):
        parser.read(Path(file).expanduser())
    return "default" if parser.has_option("default", "aws_access_key_id") else None


def _profile(url: str, name: str) -> Callable[[], Any]:
    """Return a provider of the credentials in a profile of `~/.aws`. obstore itself does not read
    profiles."""
    try:
        from boto3 import Session  # type: ignore[import-untyped, unused-ignore]
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise UsageError(
            f"`{url}`: the credentials are in the profile `{name}` of `~/.aws`, and reading "
            "profiles needs boto3",
            hint="pip install boto3; or pass AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ) from error
    return Boto3CredentialProvider(Session(profile_name=name))
