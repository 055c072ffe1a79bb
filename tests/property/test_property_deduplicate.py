"""Random sequences of saves of a run that deduplicates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deduplicated import Run, flat, loaded
from extent import EVERYTHING
from holdfast.catalog.catalog import open_manifest
from holdfast.catalog.marks import mark_damaged
from holdfast.catalog.verify import VerifyTarget, verify
from holdfast.format.names import step_name
from holdfast.planning.shared_files import LINKED_FILES_MAX
from holdfast.storage.memory import MemoryStore

SIZES = (0, 3, 5_000, 70_000, 70_000, 200_000)
"""Elements of each tensor: none, one block, several blocks."""

changes = st.sets(st.integers(0, len(SIZES) - 1))
actions = st.one_of(
    st.tuples(st.just("save"), changes),
    st.tuples(st.just("save"), changes),
    st.tuples(st.just("again"), changes),
    st.tuples(st.just("resume"), changes),
    st.tuples(st.just("damage"), changes),
    st.tuples(st.just("delete"), changes),
)


@settings(max_examples=200 if EVERYTHING else 20)
@given(st.lists(actions, min_size=3, max_size=14), st.sampled_from([1, 2]), st.integers(0, 3))
def test_every_step_is_whole_whatever_changes(
    sequence: list[tuple[str, set[int]]], size: int, check_every: int
) -> None:
    """G19. Method: random sets of tensors change before each save. In between, a step is saved
    again, the run resumes, the step that would be linked is damaged and marked, or deleted. Each
    step loads bit for bit, verifies, shares no file with the one before it, has few files, and at
    most half of their bytes are stale."""
    store = MemoryStore()
    run = Run(Path(), store, size=size, check_every=check_every)
    state: dict[str, Any] = {"model": {str(n): torch.zeros(size) for n, size in enumerate(SIZES)}}
    saved: dict[int, dict[str, Any]] = {}
    step = 0
    for number, (action, changed) in enumerate(sequence, start=1):
        for index in changed:
            # A new tensor: the run must not notice the change by the identity of the object.
            state["model"][str(index)] = torch.full((SIZES[index],), float(number))
        earlier = [each for each in saved if each < step]
        if action == "resume" and earlier and step in saved:
            run = Run(Path(), store, size=size, check_every=check_every)
            run.resume(step, before=max(earlier))
        elif action in ("damage", "delete") and step - 1 in saved:
            del saved[step - 1]
            if action == "delete":
                store.remove(step_name(step - 1))
            else:
                mark_damaged(store, step - 1, "found by a load")
        step += action != "again" or step == 0
        saved.pop(step, None)
        run.save(step, state)
        saved[step] = flat(state)
        assert loaded(store, step) == saved[step]
        check_files(store, step)
    for each, expected in saved.items():
        assert loaded(store, each) == expected


def check_files(store: MemoryStore, step: int) -> None:
    manifest = open_manifest(store, step_name(step))
    used: dict[str, int] = {}
    for entry in manifest.tensors.values():
        for chunk in entry.chunks:
            used[chunk.file] = used.get(chunk.file, 0) + chunk.item.nbytes
    for file in manifest.shared or ():
        assert used[file] >= manifest.files[file] / 2
    ranks = [file.split("_")[2] for file in manifest.files]
    assert max(map(ranks.count, ranks)) <= LINKED_FILES_MAX + 2
    assert verify(VerifyTarget(store, step_name(step))).good
    if f"{step_name(step - 1)}/" in store.list():
        assert not identities(store, step) & identities(store, step - 1)


def identities(store: MemoryStore, step: int) -> set[str]:
    names = store.list(step_name(step))
    return {store.links(f"{step_name(step)}/{file}").file for file in names}
