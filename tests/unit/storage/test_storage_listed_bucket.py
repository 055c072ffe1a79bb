"""A view of a bucket for readers that look again and again."""

from __future__ import annotations

from collections import Counter

import pytest

import holdfast.storage.listed_bucket as listed_bucket
from buckets import ModelBucket
from checkpoints import save_leaves
from holdfast.catalog.catalog import Catalog
from holdfast.comm import Solo
from holdfast.errors import HoldfastError, NotFoundError
from holdfast.format.names import step_name
from holdfast.state.objects import StateTree
from holdfast.storage.bucket import Bucket
from holdfast.storage.listed_bucket import ListedBucket, TooManyError
from holdfast.storage.objects import ObjectStore

PREFIXES = ("", "a", "a/step-5", "a/step-5/id", "a/step-50", "b", "absent")
KEYS = ("a/step-5/id/b", "a/step-5/a", "a/step-50/c", "a/empty", "b/d", "e")


def filled() -> ModelBucket:
    """A bucket with an object at each of the keys, of which some names begin alike."""
    return ModelBucket({key: b"" if key == "a/empty" else key.encode() * 5 for key in KEYS})


def said(bucket: Bucket, key: str) -> object:
    """Answers to all reading requests for a key."""
    try:
        return bucket.head(key), bucket.get(key, 3), bytes(bucket.get_range(key, 2, 9))
    except NotFoundError:
        return None


@pytest.mark.parametrize("below", [None, "a"])
@pytest.mark.parametrize("small", [0, 4096])
def test_the_view_answers_as_the_bucket(
    below: str | None, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: every request, before and after changes of the bucket; with each way of listing, and
    without the memory of small objects."""
    monkeypatch.setattr(listed_bucket, "SMALL_BYTES", small)
    model = filled()
    bucket, view = model.client(), ListedBucket(model.client(), below)
    for changed, data in ((None, b""), ("a/step-5/a", b"new bytes"), ("a/x/y/z", b"deep")):
        if changed is not None:
            model.delete("a/step-50/c")
            model.put(changed, data)
        view.refresh()
        for prefix in PREFIXES:
            listing, expected = view.list(prefix), bucket.list(prefix)
            assert [*listing.objects] == [*expected.objects]
            assert [*listing.prefixes] == [*expected.prefixes]
        for key in (*KEYS, "a/x/y/z", "absent", "a/absent", "a/step-5"):
            assert said(view, key) == said(bucket, key)


def test_a_second_look_at_an_unchanged_run_is_one_request() -> None:
    """Method: count the requests for all names, sizes and pointers of three checkpoints."""
    requests: Counter[str] = Counter()
    model = ModelBucket()
    for step in (1, 2, 3):
        leaves = StateTree({"own": {"n": step}}).flatten()
        catalog = Catalog(ObjectStore(model.client(), threads=1))
        save_leaves(catalog, step_name(step), leaves, Solo(), step=step, kind="full")

    def count(verb: str, _: str, when: str) -> None:
        requests[verb] += when == "before"

    # The view is of a folder in the bucket.
    for key, data in model.contents().items():
        model.put(f"run/{key}", data)
    store = ObjectStore(model.client(count), threads=1)
    view, refresh = store.listed(below="run")

    def look() -> list[object]:
        refresh()
        folders = [name.rstrip("/") for name in view.list("run") if name.startswith("step-")]
        return [
            (folder, view.stamp(f"run/{folder}"), view.size(f"run/{folder}/manifest.json"))
            for folder in folders
        ]

    first = look()
    assert len(first) == 3
    requests.clear()
    assert look() == first
    assert requests == {"list": 1}
    model.put("run/step-4/00000001/__0_0.distcp", b"half")
    refresh()
    assert any(name.startswith(".removing-step-4") for name in view.list("run"))


def test_a_view_lists_so_many_objects_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listed_bucket, "OBJECTS_MAX", 3)
    monkeypatch.setattr(listed_bucket, "LISTINGS_MAX", 2)
    with pytest.raises(TooManyError, match="has more than 3 objects"):
        ListedBucket(filled().client(), "a").refresh()
    view = ListedBucket(filled().client())
    view.list("")
    view.list("a")
    with pytest.raises(HoldfastError, match="has more than 2 prefixes"):
        view.list("b")
    view.refresh()
    view.list("b")
