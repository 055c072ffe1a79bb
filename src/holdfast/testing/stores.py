"""A test suite for every implementation of a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

from holdfast.errors import ExistsError, HoldfastError, NotFoundError, StorageError
from holdfast.format.names import held_of
from holdfast.storage.store import FolderStore, Joining, Store


def read_opened(store: Store, key: str) -> int:
    """Open a file, and read its first byte. Return the number of bytes read."""
    with store.open(key) as reader:
        return reader.read_into(0, memoryview(bytearray(1)))


class StoreSuite:
    """Tests that every `Store` must pass. G1, G2, ... are the guarantees in `docs/guarantees.md`.
    To run the tests, derive a class for pytest that makes stores.

    class TestMyStore(StoreSuite):
        def new_store(self) -> Store:
            return MyStore(...)
    """

    stride = 1
    """Distance between the tested starts and stops of ranges. Slow stores set it above 1."""

    def new_store(self) -> Store:
        """Return an empty store. Called once per test."""
        raise TypeError("derive a class that makes a store")

    def test_written_bytes_are_read_back_at_every_range(self) -> None:
        """Method: writes parts out of order, and reads all ranges in the file and past its end."""
        store, data = self.new_store(), bytes(range(20))
        with store.create("file", len(data)) as writer:
            writer.write(12, [memoryview(data)[12:15], bytearray(data[15:20])])
            writer.write(0, [data[:5], b"", memoryview(data)[5:12]])
        assert store.size("file") == len(data)
        for start in range(0, len(data) + 2, self.stride):
            for stop in range(start, len(data) + 3, self.stride):
                assert store.read("file", start, stop) == data[start:stop]
                target = bytearray(b"?" * (stop - start))
                with store.open("file") as reader:
                    count = reader.read_into(start, memoryview(target))
                assert count == len(data[start:stop])
                assert target == data[start:stop] + b"?" * (stop - start - count)

    def test_a_write_of_many_parts_keeps_their_order(self) -> None:
        """Method: writes more buffers than one system call takes, some of them empty."""
        store = self.new_store()
        parts = [bytes([i % 251]) * (i % 4) for i in range(5000)]
        whole = b"".join(parts)
        with store.create("file", len(whole)) as writer:
            writer.write(0, parts)
        assert store.read("file", 0, len(whole)) == whole

    def test_a_file_may_be_empty(self) -> None:
        """Method: creates a file of size 0 without a write."""
        store = self.new_store()
        with store.create("file", 0):
            pass
        assert store.size("file") == 0
        assert store.read("file", 0, 10) == b""

    def test_a_file_is_never_overwritten(self) -> None:
        """Guarantee G1. Method: creates a second file of the same name; the first file is
        unchanged."""
        store = self.new_store()
        put(store, "file", b"first")
        refuses(StorageError, lambda: put(store, "file", b"second"))
        assert store.read("file", 0, 9) == b"first"

    def test_an_error_while_writing_is_raised_to_the_caller(self) -> None:
        """Guarantee G7. Method: raises an error in the context of `create`."""
        store = self.new_store()

        def fail() -> None:
            with store.create("file", 3):
                raise KeyError("mine")

        refuses(KeyError, fail)

    def test_the_root_may_be_made_repeatedly(self) -> None:
        """Method: makes the folder with the empty key while the store has a file."""
        store = self.new_store()
        put(store, "file", b"kept")
        store.make_folder("")
        assert list(store.list()) == ["file"]

    def test_a_missing_file_or_folder_is_not_found(self) -> None:
        """Method: calls every reading method; the error contains the key."""
        store = self.new_store()
        asks: list[Callable[[], object]] = [
            lambda: store.list("absent"),
            lambda: store.size("absent"),
            lambda: store.read("absent", 0, 1),
            lambda: read_opened(store, "absent"),
            lambda: store.size("absent/file"),
        ]
        for ask in asks:
            assert "absent" in refuses(NotFoundError, ask).what

    def test_a_lock_has_one_holder_and_names_it_to_others(self) -> None:
        """Guarantee G11. Method: tries twice to take a held lock; both errors have the note of the
        holder. Afterwards the lock is free, even if its holder raised an error."""
        store = self.new_store()
        with store.lock("lock", "run 7 on host a"):
            for _ in range(2):
                refused = refuses(ExistsError, lambda: enter(store, "run 8"))
                assert "run 7 on host a" in refused.what
        enter(store, "run 9")
        with suppress(KeyError), store.lock("lock", "run 10"):
            raise KeyError("mine")
        enter(store, "run 11")

    def test_the_holder_of_a_lock_can_be_queried(self) -> None:
        """Guarantee G16. Method: queries a lock before it is taken, while it is held and after its
        release. A query does not take the lock."""
        store = self.new_store()
        assert store.holder("lock") is None
        with store.lock("lock", "run 7 on host a"):
            assert store.holder("lock") == "run 7 on host a"
        assert store.holder("lock") is None
        enter(store, "run 8")

    def test_free_space_is_a_positive_number_or_unknown(self) -> None:
        """Guarantee G11. Method: queries the free space of a new store."""
        free = self.new_store().free_bytes()
        assert free is None or free > 0

    def test_a_published_attempt_is_a_checkpoint_with_all_its_files(self) -> None:
        """Guarantee G1. Method: lists the store before and after; at first no checkpoint is
        listed."""
        store = self.new_store()
        attempt = begin(store, "step-5", "00000001", {"a": b"1", "b": b"22"})
        with store.hold(attempt):
            assert listed(store) == [f"{attempt}/"]
            store.sync(attempt)
            store.publish(attempt, "step-5")
        assert list(store.list()) == ["step-5/"]
        assert content(store, "step-5") == {"a": b"1", "b": b"22"}
        assert store.size("step-5/b") == 2

    def test_publishing_never_replaces_a_checkpoint_unasked(self) -> None:
        """Guarantees G1, G16. Method: publishes a second attempt of the same name; both keep their
        files."""
        store = self.new_store()
        first = begin(store, "step-5", "00000001", {"a": b"first"})
        second = begin(store, "step-5", "00000002", {"a": b"second"})
        store.publish(first, "step-5")
        with store.hold(second):
            refuses(ExistsError, lambda: store.publish(second, "step-5"))
            assert listed(store) == [f"{second}/", "step-5/"]
        assert content(store, "step-5") == {"a": b"first"}
        assert content(store, second) == {"a": b"second"}

    def test_a_checkpoint_is_replaced_as_a_whole(self) -> None:
        """Guarantee G1. Method: replaces a checkpoint by one with other files. No old file is in
        the new checkpoint. The old files are in a hidden folder until the cleanup."""
        store = self.new_store()
        store.publish(begin(store, "step-5", "00000001", {"a": b"first", "c": b"3"}), "step-5")
        second = begin(store, "step-5", "00000002", {"a": b"second"})
        with store.hold("step-5"):
            store.publish(second, "step-5", replace=True)
        assert content(store, "step-5") == {"a": b"second"}
        (hidden,) = (name.rstrip("/") for name in store.list() if name != "step-5/")
        assert hidden.startswith(".removing-step-5-")
        assert content(store, hidden) == {"a": b"first", "c": b"3"}
        store.remove(hidden)
        assert list(store.list()) == ["step-5/"]
        assert content(store, "step-5") == {"a": b"second"}

    def test_an_unpublished_checkpoint_has_no_name_and_can_be_removed(self) -> None:
        """Guarantee G5. Method: unpublishes one of two checkpoints, publishes a new one under its
        name, and removes the old files."""
        store = self.new_store()
        for step, number in (("step-5", "00000001"), ("step-6", "00000002")):
            store.publish(begin(store, step, number, {"a": step.encode()}), step)
        removing = store.unpublish("step-5", ".removing-step-5-0000000a")
        assert sorted(store.list()) == [f"{removing}/", "step-6/"]
        assert content(store, removing) == {"a": b"step-5"}
        refuses(NotFoundError, lambda: store.size("step-5/a"))
        refuses(
            (NotFoundError, StorageError),
            lambda: store.unpublish("step-5", ".removing-step-5-0000000b"),
        )
        again = begin(store, "step-5", "00000003", {"a": b"again"})
        store.publish(again, "step-5")
        store.remove(removing)
        assert list(store.list()) == ["step-5/", "step-6/"]
        assert content(store, "step-5") == {"a": b"again"}

    def test_an_attempt_has_one_holder_and_can_be_removed(self) -> None:
        """Guarantee G16. Method: holds an attempt, and later the published checkpoint; holding
        either twice fails. The name of an attempt does not exist after it is published."""
        store = self.new_store()
        attempt = begin(store, "step-5", "00000001", {"a": b"1"})
        with store.hold(attempt) as held:
            assert held
            with store.hold(attempt) as again:
                assert again is False
        with store.hold(attempt) as held:
            assert held
            store.publish(attempt, "step-5")
        with store.hold("step-5") as held:
            assert held
            with store.hold("step-5") as again:
                assert again is False
        refuses((NotFoundError, StorageError), lambda: store.remove(attempt))
        assert content(store, "step-5") == {"a": b"1"}
        other = begin(store, "step-5", "00000002", {"a": b"1"})
        with store.hold(other) as held:
            assert held
            store.remove(other)
        assert list(store.list()) == ["step-5/"]
        refuses(NotFoundError, lambda: store.hold("step-6").__enter__())


class FolderStoreSuite(StoreSuite):
    """Tests that every `FolderStore` must pass, in addition to those of `StoreSuite`."""

    def new_store(self) -> FolderStore:
        """Return an empty store. Called once per test."""
        raise TypeError("derive a class that makes a store")

    def test_folders_list_their_direct_members(self) -> None:
        """Method: lists files, folders and nested folders. Names are sorted. Those of folders end
        in a slash."""
        store = self.new_store()
        assert list(store.list()) == []
        for folder in ("b", "b/inner", "a"):
            store.make_folder(folder)
        for file in ("c", "b/x", "b/inner/y"):
            put(store, file, b"1")
        assert list(store.list()) == ["a/", "b/", "c"]
        assert list(store.list("b")) == ["inner/", "x"]
        assert list(store.list("a")) == []

    def test_an_existing_folder_is_not_made_again(self) -> None:
        """Guarantee G1. Method: makes a folder a second time; its files are still there."""
        store = self.new_store()
        store.make_folder("folder")
        put(store, "folder/file", b"kept")
        refuses(StorageError, lambda: store.make_folder("folder"))
        assert store.read("folder/file", 0, 9) == b"kept"

    def test_changing_a_missing_file_or_folder_is_an_error(self) -> None:
        """Guarantee G7. Method: calls every method that changes a store."""
        store = self.new_store()
        changes: list[Callable[[], object]] = [
            lambda: put(store, "absent/file", b"1"),
            lambda: store.sync("absent"),
            lambda: store.rename("absent", "other"),
            lambda: store.remove("absent"),
        ]
        for change in changes:
            refuses((NotFoundError, StorageError), change)
        assert list(store.list()) == []

    def test_a_file_is_not_used_as_a_folder_nor_a_folder_as_a_file(self) -> None:
        """Guarantee G11. Method: passes the key of a file where a folder is needed, and the
        reverse."""
        store = self.new_store()
        put(store, "file", b"1")
        store.make_folder("folder")
        mistakes: list[Callable[[], object]] = [
            lambda: put(store, "file/below", b"1"),
            lambda: store.list("file"),
            lambda: store.size("folder"),
            lambda: store.read("folder", 0, 1),
            lambda: store.make_folder("file"),
        ]
        for mistake in mistakes:
            refuses((NotFoundError, StorageError), mistake)
        assert list(store.list()) == ["file", "folder/"]

    def test_a_rename_moves_everything_in_a_folder(self) -> None:
        """Guarantee G1. Method: renames a folder that contains a folder."""
        store = self.new_store()
        for folder in ("old", "old/inner"):
            store.make_folder(folder)
        put(store, "old/inner/file", b"1")
        store.rename("old", "new")
        assert list(store.list()) == ["new/"]
        assert store.read("new/inner/file", 0, 1) == b"1"

    def test_a_rename_never_replaces_anything(self) -> None:
        """Guarantee G1. Method: renames a folder to the name of a full folder, of an empty one and
        of a file, which fails and changes none of them."""
        store = self.new_store()
        for folder in ("source", "full", "empty"):
            store.make_folder(folder)
        for file in ("source/file", "full/file", "plain"):
            put(store, file, file.encode())
        for target in ("full", "empty", "plain"):
            refuses(ExistsError, lambda target=target: store.rename("source", target))  # type: ignore[misc]
        assert list(store.list()) == ["empty/", "full/", "plain", "source/"]
        assert store.read("full/file", 0, 99) == b"full/file"
        assert store.read("source/file", 0, 99) == b"source/file"

    def test_remove_deletes_a_file_or_a_folder_with_its_content(self) -> None:
        """Method: removes a file and a folder; everything beside them stays."""
        store = self.new_store()
        for folder in ("gone", "gone/inner", "kept"):
            store.make_folder(folder)
        for file in ("gone/inner/file", "gone/file", "kept/file", "plain"):
            put(store, file, b"1")
        store.remove("gone")
        store.remove("plain")
        assert list(store.list()) == ["kept/"]
        assert list(store.list("kept")) == ["file"]

    def test_a_held_folder_stays_held_when_it_is_renamed(self) -> None:
        """Guarantee G16. Method: holds a folder, renames it, and makes another folder with its old
        name."""
        store = self.new_store()
        store.make_folder("one")
        with store.hold("one") as held:
            assert held
            with store.hold("one") as again:
                assert again is False
            store.rename("one", "moved")
            store.make_folder("one")
            with store.hold("moved") as again, store.hold("one") as other:
                assert again is False
                assert other
        with store.hold("moved") as held:
            assert held
        refuses(NotFoundError, lambda: store.hold("absent").__enter__())

    def test_a_held_folder_may_be_read_and_removed(self) -> None:
        """Guarantee G16. Method: the holder reads and removes the folder. The name is free at
        once."""
        store = self.new_store()
        store.make_folder("one")
        put(store, "one/file", b"1")
        with store.hold("one") as held:
            assert held
            assert store.read("one/file", 0, 9) == b"1"
            store.remove("one")
            store.make_folder("one")
            with store.hold("one") as other:
                assert other

    def test_several_writers_fill_one_new_file(self) -> None:
        """Guarantee G1. Method: the creator of a file and two other writers each write a part, if
        the store supports that. Joining a missing file or a folder fails."""
        store = self.new_store()
        if not isinstance(store, Joining):
            return
        with store.create("file", 7) as first:
            first.write(0, [b"12"])
            with store.join("file") as second, store.join("file") as third:
                third.write(5, [b"67"])
                second.write(2, [b"34", b"5"])
        assert store.read("file", 0, 9) == b"1234567"
        store.make_folder("folder")
        refuses((NotFoundError, StorageError), lambda: store.join("absent").__enter__())
        refuses((NotFoundError, StorageError), lambda: store.join("folder").__enter__())

    def test_a_file_is_renamed_only_to_a_free_name(self) -> None:
        """Guarantee G16. Method: renames a file to a taken name, then to a free name in another
        folder."""
        store = self.new_store()
        store.make_folder("folder")
        put(store, "source", b"source")
        put(store, "taken", b"taken")
        refuses(ExistsError, lambda: store.rename("source", "taken"))
        assert store.read("taken", 0, 9) == b"taken"
        store.rename("source", "folder/free")
        assert list(store.list()) == ["folder/", "taken"]
        assert store.read("folder/free", 0, 9) == b"source"


def put(store: Store, key: str, data: bytes) -> None:
    """Create a file with these bytes."""
    with store.create(key, len(data)) as writer:
        writer.write(0, [data])


def enter(store: Store, note: str) -> None:
    """Take the lock named `lock`, and release it."""
    with store.lock("lock", note):
        pass


def refuses(
    errors: type[Exception] | tuple[type[Exception], ...], act: Callable[[], object]
) -> HoldfastError:
    """Return the error that `act` raises, which must be one of `errors`."""
    try:
        act()
    except errors as error:
        return error if isinstance(error, HoldfastError) else HoldfastError(str(error))
    raise AssertionError(f"nothing was raised, expected {errors}")


def begin(store: Store, name: str, number: str, files: Mapping[str, bytes]) -> str:
    """Make the attempt of a save of `name`, with these files. Return the folder of the attempt."""
    attempt = f".attempt-{name}-{number}"
    store.make_folder(attempt)
    for file, data in files.items():
        put(store, f"{attempt}/{file}", data)
    return attempt


def listed(store: Store) -> list[str]:
    """Return the names at the root, without the lock files by which some stores hold a folder."""
    return [name for name in store.list() if held_of(name) is None]


def content(store: Store, folder: str) -> dict[str, bytes]:
    """Return the bytes of all files directly in a folder."""
    names = store.list(folder)
    return {name: store.read(f"{folder}/{name}", 0, 99) for name in names}
