"""The catalog: listing, publishing, deleting, and cleaning up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashes import cut_everywhere, recorded
from holdfast.catalog.catalog import Catalog, open_manifest
from holdfast.catalog.cleanup import execute, plan_cleanup
from holdfast.catalog.structure import check_structure
from holdfast.errors import DamagedError, ExistsError, FormatError, NotFoundError, StorageError
from holdfast.format.checksum import checksum
from holdfast.format.manifest import Manifest, Span, Table, ValueEntry
from holdfast.format.names import MANIFEST, METADATA, HiddenFolder, hidden_folder_of
from holdfast.storage.memory import MemoryStore
from holdfast.storage.store import Store
from holdfast.testing.failing import FailingStore
from holdfast.testing.stores import put, refuses
from manifest_bytes import encode

FILE = "__0_0.distcp"


def fill(store: Store, folder: str, content: bytes) -> Manifest:
    """Write a checkpoint of one value into a folder by hand, without the code that saves."""
    manifest = Manifest(
        tensors={},
        values={"v": ValueEntry(FILE, Span(0, len(content)), checksum(content), ("v",))},
        files={FILE: len(content)},
        tables={FILE: Table(len(content), checksum(b""))},
        metadata=(4, checksum(b"meta")),
    )
    put(store, f"{folder}/{FILE}", content)
    put(store, f"{folder}/{METADATA}", b"meta")
    put(store, f"{folder}/{MANIFEST}", encode(manifest))
    store.sync(folder)
    store.sync("")
    return manifest


def write_checkpoint(store: Store, folder: str, content: bytes) -> Manifest:
    store.make_folder(folder)
    return fill(store, folder, content)


def publish(catalog: Catalog, name: str, content: bytes) -> None:
    attempt = catalog.begin(name, replace=True)
    fill(catalog.store, str(attempt), content)
    catalog.publish(attempt)


def content_of(store: MemoryStore, name: str) -> bytes:
    assert open_manifest(store, name)
    return store.read(f"{name}/{FILE}", 0, 99)


def test_steps_are_listed_by_number_and_other_names_ignored() -> None:
    """G5. Method: steps that sort differently as text, folders and files with similar names."""
    store = MemoryStore()
    for folder in (
        "step-10",
        "step-9",
        "step-100",
        "step-030",
        "best-step-20",
        "step-30.bak",
        "hf",
        "old-step-7-keep",
        ".attempt-step-11-00000000",
        ".replaced-step-9-00000000",
    ):
        store.make_folder(folder)
    put(store, "step-12", b"a file")
    assert Catalog(store).steps() == [9, 10, 100]


def test_an_attempt_is_no_checkpoint_until_it_is_published() -> None:
    """G1. Method: the steps before and after."""
    store = MemoryStore()
    catalog = Catalog(store)
    attempt = catalog.begin("step-5")
    assert catalog.steps() == []
    assert list(store.list()) == [f"{attempt}/"]
    catalog.publish(attempt)
    assert catalog.steps() == [5]
    assert list(store.list()) == ["step-5/"]


def test_two_attempts_at_one_step_have_folders_of_their_own() -> None:
    """G1. Method: both begin before either ends."""
    catalog = Catalog(MemoryStore())
    assert catalog.begin("step-5") != catalog.begin("step-5")


def test_an_aborted_attempt_leaves_nothing() -> None:
    """G7. Method: abort."""
    store = MemoryStore()
    catalog = Catalog(store)
    catalog.abort(catalog.begin("step-5"))
    assert list(store.list()) == []


def test_publishing_again_renames_the_earlier_checkpoint() -> None:
    """G1. Method: published twice; the earlier one is complete under a hidden name, for the
    cleanup."""
    store = MemoryStore()
    catalog = Catalog(store)
    publish(catalog, "step-5", b"first")
    publish(catalog, "step-5", b"second")
    assert content_of(store, "step-5") == b"second"
    (aside,) = [n.rstrip("/") for n in store.list() if n != "step-5/"]
    assert aside.startswith(".removing-step-5-")
    assert content_of(store, aside) == b"first"
    assert execute(store, plan_cleanup(store.list())) == []
    assert list(store.list()) == ["step-5/"]


def test_three_saves_of_one_name_leave_nothing_behind() -> None:
    """G16. Method: an attempt that began while the name was free is published while an overwrite
    has renamed the earlier checkpoint."""
    store = MemoryStore()
    late = Catalog(store)
    attempt = late.begin("ck", replace=True)
    fill(store, str(attempt), b"late")
    publish(Catalog(store), "ck", b"first")

    def between(operation: str, key: str) -> None:
        if operation == "rename" and key == str(slow_attempt):
            # The last step of the late save, which found the name free.
            store.rename(str(attempt), "ck")

    slow = Catalog(FailingStore(store, between))
    slow_attempt = slow.begin("ck", replace=True)
    fill(store, str(slow_attempt), b"slow")
    error = refuses(ExistsError, lambda: slow.publish(slow_attempt))
    assert "another save has just taken its place" in error.what
    assert content_of(store, "ck") == b"late"
    slow.abort(slow_attempt)
    assert store.list() == ["ck/"]


@pytest.mark.parametrize("leftover", ["00000000", "ffffffff"])
def test_after_a_killed_save_only_the_checkpoint_before_it_is_restored(leftover: str) -> None:
    """G2. Method: an earlier save's cleanup never ran, so that its `.replaced` folder is still
    there; the next save dies at each of its operations. Whichever `.replaced` folder sorts first,
    the cleanup restores the newest checkpoint, or the new one."""
    attempt = HiddenFolder("attempt", "step-5", "7f7f7f7f")

    def before(store: Store) -> None:
        publish(Catalog(store), "step-5", b"second")
        write_checkpoint(store, f".replaced-step-5-{leftover}", b"first")
        write_checkpoint(store, str(attempt), b"third")

    def look(store: MemoryStore) -> bytes:
        assert execute(store, plan_cleanup(store.list())) == []
        assert list(store.list()) == ["step-5/"]
        return content_of(store, "step-5")

    def take_over(store: Store) -> None:
        catalog = Catalog(store)
        catalog.hold(attempt, replace=True)
        catalog.publish(attempt)

    found = cut_everywhere(take_over, look, before=before)
    assert {content for _, content in found} == {b"second", b"third"}
    assert found[-1][1] == b"third"


def test_a_checkpoint_loses_its_name_before_the_first_of_its_files() -> None:
    """G5. Method: the order of the operations on the store."""
    before, removal = recorded(
        lambda store: write_checkpoint(store, "step-5", b"1"),
        lambda store: store.remove(Catalog(store).set_aside_for_deletion("step-5")),
    )
    assert before
    done = [str(operation) for operation in removal]
    assert done[0].startswith("rename step-5 to .removing-step-5-")
    assert done[1] == "sync_folder "
    assert all(line.startswith("unlink .removing-step-5-") for line in done[2:])
    assert len(done) == 6


def aside(role: str, step: int, number: int) -> str:
    return f".{role}-step-{step}-{number:08x}/"


def test_a_cleanup_plan_has_a_reason_for_each_folder() -> None:
    """G1, G2. Method: one folder of each role, with and without a successor."""
    names = [
        "step-1/",
        "step-2/",
        aside("attempt", 3, 1),
        aside("replaced", 2, 2),
        aside("replaced", 4, 3),
        aside("removing", 1, 4),
        aside("removing", 9, 5),
    ]
    plan = {action.folder: action for action in plan_cleanup(names)}
    assert {a.verb for a in plan.values()} == {"delete", "restore"}
    assert plan[aside("replaced", 4, 3).rstrip("/")].verb == "restore"
    assert len(plan) == 5
    assert all(action.why for action in plan.values())


def test_a_cleanup_plan_for_one_name_ignores_the_others() -> None:
    """G5. Method: attempts at two steps, where the name of one begins with the other's."""
    names = [aside("attempt", 1, 1), aside("attempt", 10, 2), aside("replaced", 10, 3)]
    assert [a.folder for a in plan_cleanup(names, only="step-1")] == [names[0].rstrip("/")]


foreign = st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=20)
ours = st.builds(
    aside,
    st.sampled_from(["attempt", "replaced", "removing"]),
    st.integers(0, 3),
    st.integers(0, 2**32 - 1),
)
steps = st.integers(0, 3).map(lambda step: f"step-{step}/")


@given(st.sets(ours | steps | foreign.map(lambda name: f"{name}/") | foreign))
def test_a_cleanup_touches_only_hidden_folders_and_needs_one_pass(names: set[str]) -> None:
    """G5. Method: any folders; after the cleanup all other folders and every step are still there,
    and a second plan is empty. Files are never touched, whatever their names."""
    store = MemoryStore()
    for name in names:
        if name.endswith("/"):
            if name.rstrip("/"):
                store.make_folder(name.rstrip("/"))
        elif f"{name}/" not in names:
            put(store, name, b"1")
    before = set(store.list())
    actions = plan_cleanup(store.list())
    assert execute(store, actions) == []
    after = set(store.list())
    planned = {f"{action.folder}/" for action in actions}
    hidden = [hidden_folder_of(a.folder) for a in actions if a.verb == "restore"]
    restored = {f"{folder.name}/" for folder in hidden if folder is not None}
    assert before - planned <= after
    assert after == (before - planned) | restored
    assert not restored & before
    assert plan_cleanup(after) == []


def stubborn(store: MemoryStore) -> FailingStore:
    """A store that deletes all but the last entry of a folder, then fails: as NFS does with an open
    file."""

    def fail(verb: str, key: str) -> None:
        if verb == "remove":
            for name in sorted(store.list(key))[:-1]:
                store.remove(f"{key}/{name}")
            raise StorageError(f"cannot remove `{key}`: Device or resource busy")

    return FailingStore(store, fail)


def test_a_partly_deleted_folder_is_never_restored() -> None:
    """G1, G5. Method: the cleanup of a replaced step fails half-way; the step itself is deleted
    later; the next cleanup must not restore the incomplete one."""
    store = MemoryStore()
    write_checkpoint(store, "step-5", b"new")
    write_checkpoint(store, ".replaced-step-5-00000001", b"old")
    failed = execute(stubborn(store), plan_cleanup(store.list()))
    assert len(failed) == 1
    assert "Device or resource busy" in failed[0]
    store.remove(Catalog(store).set_aside_for_deletion("step-5"))
    assert execute(store, plan_cleanup(store.list())) == []
    assert Catalog(store).steps() == []
    assert list(store.list()) == []


def test_a_cleanup_reports_failed_actions_and_does_the_others() -> None:
    """G5. Method: a store that fails to delete, and a folder to restore."""
    store = MemoryStore()
    write_checkpoint(store, ".attempt-step-6-00000001", b"1")
    write_checkpoint(store, ".replaced-step-5-00000002", b"old")
    failed = execute(stubborn(store), plan_cleanup(store.list()))
    assert ["could not delete" in line for line in failed] == [True]
    assert content_of(store, "step-5") == b"old"
    assert execute(store, plan_cleanup(store.list())) == []


def test_the_error_about_a_folder_without_a_checkpoint_lists_its_files() -> None:
    """G4. Method: an empty folder, one with other files, none."""
    store = MemoryStore()
    store.make_folder("step-1")
    store.make_folder("step-2")
    put(store, "step-2/model.pt", b"1")
    assert "nothing" in (refuses(NotFoundError, lambda: open_manifest(store, "step-1")).hint or "")
    assert "model.pt" in (refuses(NotFoundError, lambda: open_manifest(store, "step-2")).hint or "")
    refuses(NotFoundError, lambda: open_manifest(store, "step-3"))


def rewrite(store: MemoryStore, key: str, data: bytes) -> None:
    store.remove(key)
    put(store, key, data)


@pytest.mark.parametrize(
    ("key", "data", "said"),
    [
        (FILE, None, "`__0_0.distcp` is missing"),
        (FILE, b"12", "has 2 bytes, 3 were written"),
        (FILE, b"1234", "has 4 bytes, 3 were written"),
        (METADATA, None, "`.metadata` is missing"),
        (METADATA, b"meto", "`.metadata` is not the 4 bytes"),
        (METADATA, b"meta+", "`.metadata` is not the 4 bytes"),
        (METADATA, b"met", "`.metadata` is not the 4 bytes"),
    ],
)
def test_a_missing_file_or_one_of_another_size_is_damage(
    key: str, data: bytes | None, said: str
) -> None:
    """G3. Method: one file of a good checkpoint is deleted, shortened, lengthened or changed."""
    store = MemoryStore()
    write_checkpoint(store, "step-1", b"123")
    store.remove(f"step-1/{key}")
    if data is not None:
        put(store, f"step-1/{key}", data)
    assert said in refuses(DamagedError, lambda: open_manifest(store, "step-1")).what


def test_every_problem_of_a_checkpoint_is_listed() -> None:
    """G4. Method: three at once."""
    store = MemoryStore()
    manifest = write_checkpoint(store, "step-1", b"123")
    store.remove(f"step-1/{FILE}")
    rewrite(store, f"step-1/{METADATA}", b"other")
    wider = replace(manifest, files={**manifest.files, "__1_0.distcp": 7})
    assert len(check_structure(store, "step-1", wider)) == 3


def test_a_manifest_that_is_a_folder_or_random_bytes_raises_our_error() -> None:
    """G4. Method: other things under the names of the index files."""
    store = MemoryStore()
    write_checkpoint(store, "step-1", b"123")
    rewrite(store, f"step-1/{MANIFEST}", b"{}")
    refuses(DamagedError, lambda: open_manifest(store, "step-1"))
    store.remove(f"step-1/{MANIFEST}")
    refuses(FormatError, lambda: open_manifest(store, "step-1"))
    store.remove(f"step-1/{METADATA}")
    store.make_folder(f"step-1/{METADATA}")
    refuses(NotFoundError, lambda: open_manifest(store, "step-1"))
