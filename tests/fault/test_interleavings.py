"""Two operations at once on one store, in every order of their steps up to a bound.

After each order the checkpoint loads, the winner has returned, and the loser has raised. The bound
is two switches before one of the two ends, so any stretch of one operation runs at any place of the
other. `--all` takes three switches where that takes minutes, not hours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import save_leaves
from hf_folders import LLAMA, hf_tensors, save_folder
from holdfast.catalog.catalog import Catalog, open_manifest
from holdfast.catalog.cleanup import execute, plan_cleanup
from holdfast.catalog.open_any import Opened, open_in
from holdfast.catalog.source import Source
from holdfast.comm import Solo
from holdfast.convert.convert import convert_to, values_of
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.convert.target import target_in
from holdfast.errors import ExistsError
from holdfast.format.names import LOCK, hidden_folder_of, step_name
from holdfast.loading.checkpoint import Checkpoint
from holdfast.loading.load import load_tree
from holdfast.loading.opening import read_on_all
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.context import RunContext
from holdfast.manager.hf import HFFormat
from holdfast.manager.lifetime import Lifetime
from holdfast.manager.policy import Retention
from holdfast.manager.resume import newest_resumable
from holdfast.manager.retention import Retainer
from holdfast.saving.save import Saved, save_in
from holdfast.state.objects import StateTree
from holdfast.storage.memory import MemoryStore
from holdfast.storage.store import FolderStore
from interleavings import Actor, Ran, interleavings

NAME = "c"

MANY = pytest.mark.slow, pytest.mark.timeout(3000)

SWITCHES = pytest.mark.parametrize("switches", [2, pytest.param(3, marks=MANY)])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Turn logging off: thousands of runs would log."""
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    yield
    logging.disable(logging.NOTSET)


def state_of(value: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((50,), float(value))}, "value": value}


def save(value: int, store: FolderStore, *, overwrite: bool = False, name: str = NAME) -> Saved:
    """Save as `holdfast.save` does."""
    return save_in(Catalog(store), name, state_of(value), ranks=Solo(), overwrite=overwrite)


def save_step(step: int, store: FolderStore, *, value: int | None = None) -> Saved:
    """Save a step as a manager does."""
    leaves = StateTree(state_of(step if value is None else value)).flatten()
    return save_leaves(Catalog(store), step_name(step), leaves, Solo(), step=step, kind="full")


def held_in(store: MemoryStore, name: str = NAME) -> int:
    """Read every byte of a checkpoint, check that all is of one state, and return the value of that
    state."""
    checkpoint = Checkpoint(Source(store, name, open_manifest(store, name)))
    value: int = checkpoint.value("value")
    assert torch.equal(checkpoint.read("model.w"), torch.full((50,), float(value)))
    return value


def leftovers(store: MemoryStore) -> list[str]:
    return [name for name in store.list() if hidden_folder_of(name.rstrip("/"))]


def ran_in(
    one: Actor,
    other: Actor,
    switches: int,
    before: Callable[[FolderStore], object] = lambda _: None,
) -> Iterator[Ran[MemoryStore]]:
    """Run two actors in every order; in some of them the two meet."""
    count = 0
    for ran in interleavings(before, one, other, switches_max=switches):
        count += 1
        yield ran
    assert count > 20


def check(ran: Ran[Any], condition: object) -> None:
    """Assert, with the order in the message."""
    assert condition, str(ran)


@SWITCHES
def test_of_two_saves_to_one_path_one_wins_and_the_other_raises(switches: int) -> None:
    """G16. Method: two saves to a free name."""
    for ran in ran_in(partial(save, 1), partial(save, 2), switches):
        kinds = sorted(type(outcome).__name__ for outcome in ran.outcomes)
        check(ran, kinds == ["ExistsError", "Saved"])
        winner = next(n for n, outcome in enumerate(ran.outcomes, 1) if isinstance(outcome, Saved))
        check(ran, held_in(ran.store) == winner)
        check(ran, ran.store.list() == [f"{NAME}/"])


@SWITCHES
def test_of_two_saves_that_replace_one_checkpoint_each_reports_what_it_did(switches: int) -> None:
    """G16. Method: two saves that overwrite the same checkpoint. Both may win, one after the other.
    A save that raises has replaced nothing, and the result is a winner's, never the old
    checkpoint."""
    one, other = (partial(save, value, overwrite=True) for value in (1, 2))
    for ran in ran_in(one, other, switches, partial(save, 9)):
        won = [n for n, outcome in enumerate(ran.outcomes, 1) if isinstance(outcome, Saved)]
        lost = [outcome for outcome in ran.outcomes if not isinstance(outcome, Saved)]
        check(ran, won)
        check(ran, all(isinstance(outcome, ExistsError) for outcome in lost))
        check(ran, held_in(ran.store) in won)
        check(ran, ran.store.list() == [f"{NAME}/"])


@SWITCHES
def test_a_save_without_overwrite_never_replaces_one_that_overwrites(switches: int) -> None:
    """G16. Method: one save overwrites the checkpoint, the other may not: it always raises."""
    one, other = partial(save, 1, overwrite=True), partial(save, 2)
    for ran in ran_in(one, other, switches, partial(save, 9)):
        check(ran, isinstance(ran.outcomes[0], Saved))
        check(ran, isinstance(ran.outcomes[1], ExistsError))
        check(ran, held_in(ran.store) == 1)
        check(ran, ran.store.list() == [f"{NAME}/"])


def dirty(store: FolderStore) -> None:
    """Make the leftovers of killed processes: an attempt, an unfinished deletion, a replaced
    checkpoint."""
    for step in (1, 2, 3):
        save_step(step, store)
    store.rename("step-1", ".attempt-c-00000001")
    store.rename("step-2", ".replaced-step-2-00000002")
    store.rename("step-3", ".removing-step-3-00000003")


def clean_up(store: FolderStore) -> list[str]:
    return execute(store, plan_cleanup(store.list()))


@SWITCHES
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_cleanup_during_a_save_spares_its_attempt(overwrite: bool, switches: int) -> None:
    """G16. Method: a save, new or replacing, during the cleanup of a start, in a folder that killed
    processes left. The save always succeeds; everything else is cleaned up."""

    def before(store: FolderStore) -> None:
        dirty(store)
        if overwrite:
            save(9, store)

    one = partial(save, 1, overwrite=overwrite)
    for ran in ran_in(one, clean_up, switches, before):
        check(ran, isinstance(ran.outcomes[0], Saved))
        check(ran, ran.outcomes[1] == [])
        check(ran, held_in(ran.store) == 1)
        check(ran, held_in(ran.store, "step-2") == 2)
        check(ran, clean_up(ran.store) == [])
        check(ran, leftovers(ran.store) == [])


STEPS = (2, 3, 4)


def keep_two(store: FolderStore) -> None:
    """Apply retention as a run that keeps two does after a save."""
    retainer = Retainer(Catalog(store), Retention(latest_k=2))
    retainer.saved(STEPS[-1])
    retainer.wait()


def save_steps(store: FolderStore) -> None:
    for step in STEPS:
        save_step(step, store)


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("step-2", 1),
        ("step-9", 1),
        (NAME, 1),
        pytest.param("step-2", 2, marks=MANY),
        pytest.param("step-9", 2, marks=MANY),
        pytest.param(NAME, 2, marks=MANY),
        pytest.param("step-2", 3, marks=MANY),
    ],
)
def test_retention_during_a_save_leaves_complete_checkpoints(name: str, switches: int) -> None:
    """G5, G16. Method: a save that replaces a step which retention is about to delete, of a new
    step, and of another name. Kept steps are unchanged. The save is complete, or was deleted by the
    rule after it was published, or was refused while the old step was deleted."""
    one = partial(save, 7, overwrite=True, name=name)
    for ran in ran_in(one, keep_two, switches, save_steps):
        steps = {step: held_in(ran.store, step_name(step)) for step in Catalog(ran.store).steps()}
        check(ran, {3: 3, 4: 4}.items() <= steps.items())
        if name == "step-2":
            check(ran, isinstance(ran.outcomes[0], Saved | ExistsError))
            there = 7 if isinstance(ran.outcomes[0], Saved) else 2
            check(ran, steps.get(2, there) == there)
        else:
            check(ran, isinstance(ran.outcomes[0], Saved))
            check(ran, held_in(ran.store, name) == 7)
        check(ran, clean_up(ran.store) == [])
        check(ran, leftovers(ran.store) == [])


def load(store: FolderStore) -> int:
    """Load as `holdfast.load` does."""
    state = state_of(0)

    def read(opened: Opened) -> int:
        load_tree(opened.source(store), StateTree(state), ranks=Solo())
        value: int = state["value"]
        assert torch.equal(state["model"]["w"], torch.full((50,), float(value))), "a mix"
        return value

    return read_on_all(Solo(), store, lambda: open_in(store, NAME), read)


@SWITCHES
def test_a_load_during_a_replacing_save_gives_the_old_or_the_new_checkpoint(switches: int) -> None:
    """G2, G16. Method: a load during a save that replaces the checkpoint. It never fails, and never
    gives a mix."""
    for ran in ran_in(partial(save, 1, overwrite=True), load, switches, partial(save, 9)):
        check(ran, isinstance(ran.outcomes[0], Saved))
        check(ran, ran.outcomes[1] in (1, 9))
        check(ran, held_in(ran.store) == 1)


def resume(store: FolderStore) -> tuple[int | None, list[str]]:
    """Find the newest step as a resume does."""
    found, refused = newest_resumable(Catalog(store), None)
    return None if found is None else found.step, refused


@pytest.mark.parametrize("switches", [1, pytest.param(2, marks=MANY)])
def test_a_resume_beside_a_run_that_saves_and_deletes_finds_the_newest_step(switches: int) -> None:
    """G4. Method: the newest step is saved again, and older ones are deleted, during the search;
    none is passed over."""

    def run(store: FolderStore) -> None:
        save_step(STEPS[-1], store, value=8)
        keep_two(store)

    for ran in ran_in(run, resume, switches, save_steps):
        check(ran, ran.outcomes[1] == (STEPS[-1], []))


def start(store: FolderStore) -> str:
    """Do what a manager does before it loads, and close it."""
    holding = Lifetime()
    with holding:
        config = CheckpointConfig(enable=True)
        catalog = Catalog(store)
        holding.take(catalog, HFFormat(RunContext(catalog, config, Solo()), None))
        store.make_folder("at-work")
        found, _ = newest_resumable(catalog, None)
        store.remove("at-work")
    return f"step {found.step}" if found is not None else "nothing"


@SWITCHES
def test_of_two_starts_one_locks_the_folder(switches: int) -> None:
    """G16. Method: two managers start in a folder that killed runs left. While one is at work, the
    other is not. The refused one raises, and the other finds the newest step."""
    for ran in ran_in(start, start, switches, dirty):
        check(ran, "step 2" in ran.outcomes)
        lost = [outcome for outcome in ran.outcomes if outcome != "step 2"]
        check(ran, all(isinstance(outcome, ExistsError) for outcome in lost))
        check(ran, leftovers(ran.store) == [])
        check(ran, ran.store.holder(LOCK) is None)


@SWITCHES
def test_a_step_saved_by_a_run_and_by_save_is_complete(switches: int) -> None:
    """G16. Method: a run saves a step under the name to which `holdfast.save` saves. A checkpoint
    that appears meanwhile is never replaced."""
    one, other = partial(save_step, 5), partial(save, 6, name="step-5")
    for ran in ran_in(one, other, switches):
        kinds = sorted(type(outcome).__name__ for outcome in ran.outcomes)
        if kinds == ["Saved", "Saved"]:
            # The checkpoint existed before the run began, which saves this step again.
            check(ran, held_in(ran.store, "step-5") == 5)
            continue
        check(ran, kinds == ["ExistsError", "Saved"])
        check(ran, held_in(ran.store, "step-5") == (5 if isinstance(ran.outcomes[0], Saved) else 6))


WISHES = {
    "dcp": ConvertOptions(to="dcp"),
    "hf": ConvertOptions(to="hf", max_shard_bytes=20_000),
    "torch": ConvertOptions(to="torch"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = {**LLAMA, "num_hidden_layers": 1}
    return save_folder(tmp_path_factory.mktemp("hf") / "hf", small, hf_tensors(small))


def conversion(source: Path, options: ConvertOptions) -> Actor:
    """Convert to the name `step-0` of a store."""
    planned = plan(str(source), options)

    def convert(store: FolderStore) -> int:
        file = options.to == "torch"
        place = target_in(store, "step-0", overwrite=options.overwrite, file=file)
        values = values_of(planned)
        return convert_to(place, planned, values).num_tensors

    return convert


def contents(store: MemoryStore, to: str) -> dict[str, bytes]:
    """Return the files of a converted checkpoint, except the indices, which contain the time."""
    if to == "torch":
        return {"": store.read("step-0", 0, 1 << 30)}
    files = [file for file in store.list("step-0") if not file.startswith((".meta", "manifest"))]
    return {file: store.read(f"step-0/{file}", 0, 1 << 30) for file in files}


@pytest.mark.parametrize("to", WISHES)
def test_a_start_during_a_conversion_spares_its_attempt(to: str, source: Path) -> None:
    """G14, G16. Method: each format, to the folder of a run that starts; one switch, since a
    conversion has a hundred operations. Both succeed, and the attempt of a killed conversion is
    deleted or continued."""
    convert = conversion(source, WISHES[to])
    alone = MemoryStore()
    convert(alone)
    wanted = contents(alone, to)

    def before(store: FolderStore) -> None:
        dirty(store)
        store.rename(".attempt-c-00000001", ".attempt-step-0-00000001")

    for ran in ran_in(convert, start, 1, before):
        check(ran, ran.outcomes[1] == "step 2")
        if isinstance(ran.outcomes[0], ExistsError):
            # The start held the attempt of the killed conversion at that moment.
            _, first_turn = next(groupby(ran.trace, key=itemgetter(0)))
            check(ran, [*first_turn][-1] == "1: hold .attempt-step-0-00000001")
            convert(ran.store)
        else:
            check(ran, isinstance(ran.outcomes[0], int))
        check(ran, contents(ran.store, to) == wanted)
        check(ran, clean_up(ran.store) == [])
        check(ran, leftovers(ran.store) == [])


@pytest.mark.parametrize("to", WISHES)
def test_of_two_conversions_to_one_path_one_wins(to: str, source: Path) -> None:
    """G14, G16. Method: each format, twice to one name, one switch."""
    convert = conversion(source, WISHES[to])
    alone = MemoryStore()
    convert(alone)
    wanted = contents(alone, to)
    for ran in ran_in(convert, convert, 1):
        kinds = sorted(type(outcome).__name__ for outcome in ran.outcomes)
        check(ran, kinds == ["ExistsError", "int"])
        check(ran, contents(ran.store, to) == wanted)
        check(ran, leftovers(ran.store) == [])
