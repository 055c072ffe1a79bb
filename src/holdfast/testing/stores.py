"""What every store must do, as a suite."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from holdfast.errors import ExistsError, HoldfastError, NotFoundError, StorageError
from holdfast.storage.store import Store


def read_opened(store: Store, key: str) -> int:
    with store.open(key) as reader:
        return reader.read_into(0, memoryview(bytearray(1)))


class StoreSuite:
    """Tests that every `Store` passes: derive a class for pytest, and give it a new store each.

    class TestMyStore(StoreSuite):
        def new_store(self) -> Store:
            return MyStore(...)
    """

    def new_store(self) -> Store:
        """An empty store; called once a test."""
        raise TypeError("derive a class that makes a store")

    def test_what_is_written_is_read_back_at_every_range(self) -> None:
        """Method: parts written out of order; all ranges over and past the file's end."""
        store, data = self.new_store(), bytes(range(20))
        with store.create("file", len(data)) as writer:
            writer.write(12, [memoryview(data)[12:15], bytearray(data[15:20])])
            writer.write(0, [data[:5], b"", memoryview(data)[5:12]])
        assert store.size("file") == len(data)
        for start in range(len(data) + 2):
            for stop in range(start, len(data) + 3):
                assert store.read("file", start, stop) == data[start:stop]
                target = bytearray(b"?" * (stop - start))
                count = store.read_into("file", start, memoryview(target))
                assert count == len(data[start:stop])
                assert target == data[start:stop] + b"?" * (stop - start - count)
                with store.open("file") as reader:
                    again = bytearray(b"?" * (stop - start))
                    assert reader.read_into(start, memoryview(again)) == count
                    assert again == target

    def test_a_write_of_very_many_parts_keeps_their_order(self) -> None:
        """Method: more buffers than one system call takes, empty ones among them."""
        store = self.new_store()
        parts = [bytes([i % 251]) * (i % 4) for i in range(5000)]
        whole = b"".join(parts)
        with store.create("file", len(whole)) as writer:
            writer.write(0, parts)
        assert store.read("file", 0, len(whole)) == whole

    def test_a_file_may_be_empty(self) -> None:
        """Method: no bytes, no writes."""
        store = self.new_store()
        with store.create("file", 0):
            pass
        assert store.size("file") == 0
        assert store.read("file", 0, 10) == b""

    def test_a_file_is_never_written_over(self) -> None:
        """G1. Method: a second file of one name; the first is as it was."""
        store = self.new_store()
        put(store, "file", b"first")
        refuses(StorageError, lambda: put(store, "file", b"second"))
        assert store.read("file", 0, 9) == b"first"

    def test_an_error_while_writing_goes_on_to_the_caller(self) -> None:
        """G7. Method: an error of the caller's own inside the context."""
        store = self.new_store()

        def fail() -> None:
            with store.create("file", 3):
                raise KeyError("mine")

        refuses(KeyError, fail)

    def test_folders_list_what_lies_directly_in_them(self) -> None:
        """Method: files, folders and what is below; names sorted, folders end in a slash."""
        store = self.new_store()
        assert list(store.list()) == []
        for folder in ("b", "b/inner", "a"):
            store.make_folder(folder)
        for file in ("c", "b/x", "b/inner/y"):
            put(store, file, b"1")
        assert list(store.list()) == ["a/", "b/", "c"]
        assert list(store.list("b")) == ["inner/", "x"]
        assert list(store.list("a")) == []

    def test_a_folder_that_is_there_is_not_made_anew(self) -> None:
        """G1. Method: making it again; what lies in it is still there."""
        store = self.new_store()
        store.make_folder("folder")
        put(store, "folder/file", b"kept")
        refuses(StorageError, lambda: store.make_folder("folder"))
        assert store.read("folder/file", 0, 9) == b"kept"

    def test_the_root_may_be_made_again_and_again(self) -> None:
        """Method: an empty key, with files there."""
        store = self.new_store()
        put(store, "file", b"kept")
        store.make_folder("")
        assert list(store.list()) == ["file"]

    def test_what_is_not_there_is_not_found(self) -> None:
        """Method: every way to ask for it; the error names it."""
        store = self.new_store()
        asks: list[Callable[[], object]] = [
            lambda: store.list("absent"),
            lambda: store.size("absent"),
            lambda: store.read("absent", 0, 1),
            lambda: store.read_into("absent", 0, memoryview(bytearray(1))),
            lambda: read_opened(store, "absent"),
            lambda: store.size("absent/file"),
        ]
        for ask in asks:
            assert "absent" in refuses(NotFoundError, ask).what

    def test_changing_what_is_not_there_is_an_error(self) -> None:
        """G7. Method: every way to change it."""
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

    def test_a_file_is_no_folder_and_a_folder_no_file(self) -> None:
        """G11. Method: each where the other belongs."""
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

    def test_a_rename_moves_all_that_is_in_a_folder(self) -> None:
        """G1. Method: a folder with a folder in it."""
        store = self.new_store()
        for folder in ("old", "old/inner"):
            store.make_folder(folder)
        put(store, "old/inner/file", b"1")
        store.rename("old", "new")
        assert list(store.list()) == ["new/"]
        assert store.read("new/inner/file", 0, 1) == b"1"

    def test_a_rename_never_takes_a_name_that_is_taken(self) -> None:
        """G1. Method: a folder with files, an empty one and a file in the place; both stay."""
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

    def test_removing_takes_a_file_or_a_folder_with_all_that_is_in_it(self) -> None:
        """Method: one of each; what stands beside them stays."""
        store = self.new_store()
        for folder in ("gone", "gone/inner", "kept"):
            store.make_folder(folder)
        for file in ("gone/inner/file", "gone/file", "kept/file", "plain"):
            put(store, file, b"1")
        store.remove("gone")
        store.remove("plain")
        assert list(store.list()) == ["kept/"]
        assert list(store.list("kept")) == ["file"]

    def test_a_lock_is_held_by_one_and_tells_the_others_by_whom(self) -> None:
        """G11. Method: refused twice while held, with the holder's note each time; free after."""
        store = self.new_store()
        with store.lock("lock", "run 7 on host a"):
            for _ in range(2):
                refused = refuses(ExistsError, lambda: enter(store, "run 8"))
                assert "run 7 on host a" in refused.what
        enter(store, "run 9")
        with suppress(KeyError), store.lock("lock", "run 10"):
            raise KeyError("mine")
        enter(store, "run 11")

    def test_whoever_looks_is_told_who_holds_a_lock(self) -> None:
        """G16. Method: asking before, while and after it is held; asking takes nothing."""
        store = self.new_store()
        assert store.holder("lock") is None
        with store.lock("lock", "run 7 on host a"):
            assert store.holder("lock") == "run 7 on host a"
        assert store.holder("lock") is None
        enter(store, "run 8")

    def test_a_folder_is_held_by_one_whatever_it_is_renamed_to(self) -> None:
        """G16. Method: held twice, renamed, and another folder under its old name."""
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

    def test_what_is_held_may_be_read_and_removed(self) -> None:
        """G16. Method: by its holder; the name is free at once."""
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

    def test_a_file_is_renamed_only_to_a_name_that_is_free(self) -> None:
        """G16. Method: a file onto a file, then onto a free name in another folder."""
        store = self.new_store()
        store.make_folder("folder")
        put(store, "source", b"source")
        put(store, "taken", b"taken")
        refuses(ExistsError, lambda: store.rename("source", "taken"))
        assert store.read("taken", 0, 9) == b"taken"
        store.rename("source", "folder/free")
        assert list(store.list()) == ["folder/", "taken"]
        assert store.read("folder/free", 0, 9) == b"source"

    def test_free_space_is_a_number_or_not_known(self) -> None:
        """G11. Method: asking."""
        free = self.new_store().free_bytes()
        assert free is None or free > 0


def put(store: Store, key: str, data: bytes) -> None:
    """A new file with these bytes."""
    with store.create(key, len(data)) as writer:
        writer.write(0, [data])


def enter(store: Store, note: str) -> None:
    """Take the lock of the suite, and give it back."""
    with store.lock("lock", note):
        pass


def refuses(
    errors: type[Exception] | tuple[type[Exception], ...], act: Callable[[], object]
) -> HoldfastError:
    """The error that `act` ends in; it must be one of these."""
    try:
        act()
    except errors as error:
        return error if isinstance(error, HoldfastError) else HoldfastError(str(error))
    raise AssertionError(f"nothing was raised, expected {errors}")
