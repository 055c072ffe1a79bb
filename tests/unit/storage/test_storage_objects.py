"""Object stores: a bucket in memory and a real server pass the same suites."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from azure_server import new_azure_url
from buckets import ModelBucket
from google_server import new_google_url
from holdfast.errors import NotFoundError, StorageError, UsageError
from holdfast.storage import streams
from holdfast.storage.bucket import Bucket, TakenError
from holdfast.storage.cloud import CloudBucket
from holdfast.storage.objects import ObjectStore
from holdfast.storage.store import Store
from holdfast.testing.stores import StoreSuite, put
from http_faults import Fault
from s3_server import new_s3_url, s3_server


@pytest.fixture
def s3_url(monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a new bucket of the server, which the environment leads to."""
    return new_s3_url(monkeypatch)


class BucketSuite:
    """Tests that every `Bucket` must pass."""

    def new_bucket(self) -> Bucket:
        """Return an empty bucket."""
        raise TypeError("derive a class that makes a bucket")

    def test_an_object_is_read_as_it_was_put(self) -> None:
        """Method: whole, and every range in and past it; an empty object."""
        bucket = self.new_bucket()
        bucket.put("a/b", b"01234")
        bucket.put("empty", b"")
        for start in range(7):
            for stop in range(start + 1, 8):
                wanted = b"01234"[start:stop]
                assert bytes(bucket.get_range("a/b", start, stop)) == wanted
                memory = bytearray(stop - start)
                assert bucket.get_into("a/b", start, memoryview(memory)) == len(wanted)
                assert memory.startswith(wanted)
        data, found = bucket.get("a/b", 3)
        assert (data, found.key, found.nbytes) == (b"012", "a/b", 5)
        assert bucket.head("a/b") == found
        assert bucket.get("empty", 9)[0] == b""
        assert bytes(bucket.get_range("empty", 0, 9)) == b""

    def test_a_missing_object_is_not_found(self) -> None:
        """Method: every reading request, and a listing of nothing."""
        bucket = self.new_bucket()
        for ask in (
            lambda: bucket.head("absent"),
            lambda: bucket.get("absent", 9),
            lambda: bucket.get_range("absent", 0, 9),
            lambda: bucket.get_into("absent", 0, memoryview(bytearray(9))),
        ):
            with pytest.raises(NotFoundError, match="absent"):
                ask()
        assert not bucket.list("absent").objects
        assert not bucket.list("absent").prefixes
        assert list(bucket.list_all("absent")) == []
        for name in "abc":
            bucket.put(name, b"1")
        bucket.delete(["absent", "a", "absent", "b"])
        assert [found.key for found in bucket.list_all("")] == ["c"]

    def test_listings_show_objects_and_prefixes(self) -> None:
        """Method: names that begin alike; the root and a prefix."""
        bucket = self.new_bucket()
        for key in ("step-5/a", "step-5/id/b", "step-50/c", "d"):
            bucket.put(key, b"1")
        root, below = bucket.list(""), bucket.list("step-5")
        assert [found.key for found in root.objects] == ["d"]
        assert list(root.prefixes) == ["step-5", "step-50"]
        assert [found.key for found in below.objects] == ["step-5/a"]
        assert list(below.prefixes) == ["id"]
        assert sorted(found.key for found in bucket.list_all("step-5")) == [
            "step-5/a",
            "step-5/id/b",
        ]
        bucket.delete(["step-5/a", "step-5/id/b"])
        assert list(bucket.list("").prefixes) == ["step-50"]

    def test_a_conditional_put_has_one_winner(self) -> None:
        """G16. Method: eight at once that put a new object, then eight that replace one version of
        it; a version that is no longer there."""
        bucket = self.new_bucket()
        first = self.race(lambda number: bucket.put_new("x", b"first %d" % number))
        data, found = bucket.get("x", 99)
        assert data == b"first %d" % first
        second = self.race(lambda number: bucket.put_over("x", b"next %d" % number, found.version))
        assert bucket.get("x", 99)[0] == b"next %d" % second
        with pytest.raises(TakenError):
            bucket.put_over("x", b"late", found.version)
        bucket.delete(["x"])
        with pytest.raises(TakenError):
            bucket.put_over("x", b"late", found.version)
        with pytest.raises(NotFoundError):
            bucket.head("x")

    def race(self, request: Any) -> int:
        """Send a request from eight threads at once. Returns the number of the only winner."""
        start = threading.Barrier(8)

        def send(number: int) -> bool:
            start.wait()
            try:
                request(number)
            except TakenError:
                return False
            return True

        with ThreadPoolExecutor(8) as threads:
            won = list(threads.map(send, range(8)))
        assert sum(won) == 1
        return won.index(True)

    def test_a_stream_becomes_an_object_only_when_it_is_complete(self) -> None:
        """G1. Method: parts of several sizes; then an error of the caller in between."""
        bucket = self.new_bucket()
        parts = [bytes([number]) * (3 << 20) for number in range(5)]
        bucket.put_stream("large", iter(parts))
        assert bytes(bucket.get_range("large", 0, 1 << 30)) == b"".join(parts)
        memory = bytearray(15 << 20)
        assert bucket.get_into("large", 0, memoryview(memory)) == len(memory)
        assert memory == b"".join(parts)

        def broken() -> Iterator[bytes]:
            yield from parts
            raise KeyError("mine")

        with pytest.raises((KeyError, StorageError), match="mine"):
            bucket.put_stream("broken", broken())
        with pytest.raises(NotFoundError):
            bucket.head("broken")


class TestModelBucket(BucketSuite):
    """The bucket in memory, on which the orders of requests are tried."""

    def new_bucket(self) -> Bucket:
        return ModelBucket().client()


class ServedBucketSuite(BucketSuite):
    """Tests of a bucket on a server."""

    url: str
    """URL of a new bucket."""

    def new_bucket(self) -> Bucket:
        return CloudBucket(f"{self.url}/a/prefix")


class ServedStoreSuite(StoreSuite):
    """Tests of a store in a bucket on a server."""

    stride = 7
    url: str
    """URL of a new bucket."""

    def new_store(self) -> Store:
        return ObjectStore(CloudBucket(f"{self.url}/run"))


class TestS3(ServedBucketSuite):
    """A real server, through obstore."""

    @pytest.fixture(autouse=True)
    def _url(self, s3_url: str) -> None:
        self.url = s3_url


class TestAzure(ServedBucketSuite):
    """Azurite, through obstore."""

    @pytest.fixture(autouse=True)
    def _url(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.url = new_azure_url(monkeypatch)


class TestGoogle(ServedBucketSuite):
    """The requests that obstore sends to Google, translated for a server of S3."""

    @pytest.fixture(autouse=True)
    def _url(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.url = new_google_url(monkeypatch)


class TestObjectStoreInMemory(StoreSuite):
    """The store on the bucket in memory."""

    def new_store(self) -> Store:
        return ObjectStore(ModelBucket().client())


class TestObjectStoreOnS3(ServedStoreSuite):
    """The store on a real server."""

    @pytest.fixture(autouse=True)
    def _url(self, s3_url: str) -> None:
        self.url = s3_url


class TestObjectStoreOnAzure(ServedStoreSuite):
    """The store on Azurite."""

    @pytest.fixture(autouse=True)
    def _url(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.url = new_azure_url(monkeypatch)


class TestObjectStoreOnGoogle(ServedStoreSuite):
    """The store on the requests that obstore sends to Google."""

    @pytest.fixture(autouse=True)
    def _url(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.url = new_google_url(monkeypatch)


def test_a_large_file_is_streamed_and_read_by_parts(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: parts of 5 MiB, the smallest that S3 takes; a file of three."""
    monkeypatch.setattr(streams, "PART_BYTES", 5 << 20)
    store, data = ObjectStore(CloudBucket(s3_url)), bytes(range(256)) * (50 << 10)
    with store.create("large", len(data)) as writer:
        for start in range(0, len(data), 4 << 20):
            writer.write(start, [memoryview(data)[start : start + (4 << 20)]])
    target = bytearray(len(data))
    with store.open("large") as reader:
        assert reader.read_into(0, memoryview(target)) == len(data)
    assert target == data


def test_a_file_that_ends_early_is_refused(s3_url: str) -> None:
    """G7. Method: a large file with fewer bytes than announced, and one written out of order."""
    store = ObjectStore(CloudBucket(s3_url))
    with pytest.raises(StorageError, match="of 20000000 bytes"), store.create("x", 20_000_000):
        pass
    with pytest.raises(StorageError, match="in their order"), store.create("y", 20_000_000) as file:
        file.write(1, [b"1"])
    assert list(store.list()) == []


def test_a_listing_whose_answer_is_cut_goes_on_where_it_was(s3_url: str) -> None:
    """Method: more objects than one answer has; each of the answers is cut in half once."""
    bucket = CloudBucket(f"{s3_url}/run")
    names = [f"{number:04}" for number in range(1003)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: bucket.put(name, b""), names))
    for at in range(3):
        fault = Fault("half", at)
        with s3_server().handled(fault):
            assert [found.key for found in bucket.list_all("")] == names
        assert len(fault.disturbed) == (at < 2), "two answers"
    with s3_server().handled(Fault("half", 0)):
        assert [found.key for found in bucket.list("").objects] == names


@pytest.mark.parametrize("condition", ["If-None-Match", "If-Match"])
def test_a_store_that_ignores_conditions_is_refused(s3_url: str, condition: str) -> None:
    """G16. Method: the server does not see the condition."""

    def ignore(environ: dict[str, Any]) -> None:
        environ.pop(f"HTTP_{condition.upper().replace('-', '_')}", None)

    store = ObjectStore(CloudBucket(f"{s3_url}/run"))
    with s3_server().answering(ignore), pytest.raises(UsageError, match=f"`{condition}`"):
        store.make_folder("")


def test_errors_of_the_store_name_the_place_and_the_next_step(s3_url: str) -> None:
    """G11. Method: no bucket; a bucket that refuses writes; one that is full."""
    absent = ObjectStore(CloudBucket(f"{s3_url}-absent/run"))
    with pytest.raises(StorageError, match="no such bucket"):
        absent.make_folder("")
    for status, code, wanted in (
        ("403 Forbidden", "AccessDenied", "AccessDenied"),
        ("507 Insufficient Storage", "QuotaExceeded", "Quota"),
    ):
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()

        def refuse(environ: dict[str, Any], status: str = status, body: bytes = body) -> Any:
            return (status, body) if environ["REQUEST_METHOD"] == "PUT" else None

        with s3_server().answering(refuse), pytest.raises(StorageError, match=wanted) as caught:
            put(ObjectStore(CloudBucket(f"{s3_url}/run")), "file", b"1")
        assert "/run/file" in caught.value.what
        assert caught.value.hint
