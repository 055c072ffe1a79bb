"""Two at one store at once, in every order of their operations up to a bound. After each order one
has won and was told so, whoever lost was told so, and what is there loads.

The bound is two changes of turn before one of the two has come to its end: that is every place in
the one at which any stretch of the other can lie, from its beginning or from its middle on. `--all`
takes three where that is minutes, not hours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.catalog.catalog import Catalog, open_manifest
from holdfast.catalog.cleanup import execute, plan_cleanup
from holdfast.catalog.source import Source
from holdfast.comm import Solo
from holdfast.convert.convert import convert_to, values_of
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.convert.target import target_in
from holdfast.errors import ExistsError
from holdfast.format.names import LOCK, aside_of, step_name
from holdfast.loading.checkpoint import Checkpoint
from holdfast.loading.load import load_tree
from holdfast.loading.opening import read_in
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.holding import Holding
from holdfast.manager.hub import Hub
from holdfast.manager.policy import Retention
from holdfast.manager.resume import newest_resumable
from holdfast.manager.retention import Retainer
from holdfast.saving.planner import Planner
from holdfast.saving.save import Saved, save_in, save_leaves
from holdfast.state.objects import StateTree
from holdfast.state.tree import flatten
from holdfast.storage.memory import MemoryStore
from holdfast.storage.store import AmendableStore
from holdfast.testing.interleavings import Actor, Ran, interleavings
from hub_folders import LLAMA, hub_tensors, save_folder

NAME = "c"

MANY = pytest.mark.slow, pytest.mark.timeout(3000)

SWITCHES = pytest.mark.parametrize("switches", [2, pytest.param(3, marks=MANY)])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Thousands of runs say what they do."""
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    yield
    logging.disable(logging.NOTSET)


def state_of(value: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((50,), float(value))}, "value": value}


def save(value: int, store: AmendableStore, *, overwrite: bool = False, name: str = NAME) -> Saved:
    """What `holdfast.save` does."""
    return save_in(Catalog(store), name, state_of(value), ranks=Solo(), overwrite=overwrite)


def save_step(step: int, store: AmendableStore, *, value: int | None = None) -> Saved:
    """What a manager does to save a step."""
    return save_leaves(
        Catalog(store),
        step_name(step),
        flatten(state_of(step if value is None else value)),
        ranks=Solo(),
        planner=Planner(Solo()),
        step=step,
        kind="full",
    )


def held_in(store: MemoryStore, name: str = NAME) -> int:
    """The value whose state a checkpoint holds, every byte of it read and of one state."""
    checkpoint = Checkpoint(Source(store, name, open_manifest(store, name)))
    value: int = checkpoint.value("value")
    assert torch.equal(checkpoint.read("model.w"), torch.full((50,), float(value)))
    return value


def leftovers(store: MemoryStore) -> list[str]:
    return [name for name in store.list() if aside_of(name.rstrip("/"))]


def ran_in(
    one: Actor,
    other: Actor,
    switches: int,
    before: Callable[[AmendableStore], object] = lambda _: None,
) -> Iterator[Ran]:
    """Every order, of which there are some in which the two meet."""
    count = 0
    for ran in interleavings(before, one, other, switches_max=switches):
        count += 1
        yield ran
    assert count > 20


def check(ran: Ran, condition: object) -> None:
    """An assertion that says which order it was."""
    assert condition, str(ran)


@SWITCHES
def test_of_two_saves_of_one_path_one_wins_and_the_other_is_told(switches: int) -> None:
    """G16. Method: two saves to a name that is free."""
    for ran in ran_in(partial(save, 1), partial(save, 2), switches):
        kinds = sorted(type(outcome).__name__ for outcome in ran.outcomes)
        check(ran, kinds == ["ExistsError", "Saved"])
        winner = next(n for n, outcome in enumerate(ran.outcomes, 1) if isinstance(outcome, Saved))
        check(ran, held_in(ran.store) == winner)
        check(ran, ran.store.list() == [f"{NAME}/"])


@SWITCHES
def test_of_two_that_replace_one_checkpoint_each_is_told_what_it_did(switches: int) -> None:
    """G16. Method: two saves that overwrite the same one. Both may win, one after the other; who
    is told that it lost has replaced nothing; what is there is of a winner, never the old one."""
    one, other = (partial(save, value, overwrite=True) for value in (1, 2))
    for ran in ran_in(one, other, switches, partial(save, 9)):
        won = [n for n, outcome in enumerate(ran.outcomes, 1) if isinstance(outcome, Saved)]
        lost = [outcome for outcome in ran.outcomes if not isinstance(outcome, Saved)]
        check(ran, won)
        check(ran, all(isinstance(outcome, ExistsError) for outcome in lost))
        check(ran, held_in(ran.store) in won)
        check(ran, ran.store.list() == [f"{NAME}/"])


@SWITCHES
def test_a_save_beside_one_that_replaces_never_takes_its_place(switches: int) -> None:
    """G16. Method: one overwrites what is there, the other does not: that one is always told."""
    one, other = partial(save, 1, overwrite=True), partial(save, 2)
    for ran in ran_in(one, other, switches, partial(save, 9)):
        check(ran, isinstance(ran.outcomes[0], Saved))
        check(ran, isinstance(ran.outcomes[1], ExistsError))
        check(ran, held_in(ran.store) == 1)
        check(ran, ran.store.list() == [f"{NAME}/"])


def dirty(store: AmendableStore) -> None:
    """What killed processes leave: an attempt, half a removal, a step that stands aside."""
    for step in (1, 2, 3):
        save_step(step, store)
    store.rename("step-1", ".attempt-c-00000001")
    store.rename("step-2", ".replaced-step-2-00000002")
    store.rename("step-3", ".removing-step-3-00000003")


def clean_up(store: AmendableStore) -> list[str]:
    return execute(store, plan_cleanup(store.list()))


@SWITCHES
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_clean_up_beside_a_save_leaves_its_attempt(overwrite: bool, switches: int) -> None:
    """G16. Method: a save, new or in place of one, beside the sweep of a start, with what killed
    processes left there. The save always comes to its end; all else is cleaned up."""

    def before(store: AmendableStore) -> None:
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


def keep_two(store: AmendableStore) -> None:
    """What follows a save in a run that keeps two."""
    retainer = Retainer(Catalog(store), Retention(latest_k=2))
    retainer.saved(STEPS[-1])
    retainer.wait()


def save_steps(store: AmendableStore) -> None:
    for step in STEPS:
        save_step(step, store)


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("step-2", 2),
        ("step-9", 1),
        (NAME, 1),
        pytest.param("step-9", 2, marks=MANY),
        pytest.param(NAME, 2, marks=MANY),
        pytest.param("step-2", 3, marks=MANY),
    ],
)
def test_retention_beside_a_save_leaves_whole_steps(name: str, switches: int) -> None:
    """G5, G16. Method: a save in place of a step that retention is about to remove, of a new step,
    and of another name. Those that retention keeps stay as they were; the save is whole, or was
    removed by the rule after it was published, or was refused while the old one was removed."""
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


def load(store: AmendableStore) -> int:
    """What `holdfast.load` does."""
    state = state_of(0)

    def read(source: Source) -> int:
        load_tree(source, StateTree(state), ranks=Solo())
        value: int = state["value"]
        assert torch.equal(state["model"]["w"], torch.full((50,), float(value))), "a mix"
        return value

    return read_in(store, NAME, Solo(), read)


@SWITCHES
def test_a_reader_beside_one_that_replaces_finds_the_old_or_the_new(switches: int) -> None:
    """G2, G16. Method: a load beside a save in place of what it loads. It never fails, and never
    gives a mix."""
    for ran in ran_in(partial(save, 1, overwrite=True), load, switches, partial(save, 9)):
        check(ran, isinstance(ran.outcomes[0], Saved))
        check(ran, ran.outcomes[1] in (1, 9))
        check(ran, held_in(ran.store) == 1)


def resume(store: AmendableStore) -> tuple[int | None, list[str]]:
    """What a reader of a run's folder does to find the newest step."""
    found, refused = newest_resumable(Catalog(store), None)
    return None if found is None else found.step, refused


@pytest.mark.parametrize("switches", [1, pytest.param(2, marks=MANY)])
def test_a_reader_beside_a_run_that_saves_and_removes_finds_a_step(switches: int) -> None:
    """G4. Method: the newest step is saved again, and older ones are removed, under a reader; it
    passes over none."""

    def run(store: AmendableStore) -> None:
        save_step(STEPS[-1], store, value=8)
        keep_two(store)

    for ran in ran_in(run, resume, switches, save_steps):
        check(ran, ran.outcomes[1] == (STEPS[-1], []))


def start(store: AmendableStore) -> str:
    """What a manager does before it loads, and until it is closed."""
    holding = Holding()
    with holding:
        config = CheckpointConfig(enable=True)
        catalog = Catalog(store)
        holding.take(catalog, Hub(None, config, catalog, Solo(), []))
        store.make_folder("at-work")
        found, _ = newest_resumable(catalog, None)
        store.remove("at-work")
    return f"step {found.step}" if found is not None else "nothing"


@SWITCHES
def test_of_two_starts_at_once_one_holds_the_folder(switches: int) -> None:
    """G16. Method: two managers begin in a folder with what killed runs left; while one of them is
    at work, the other never is. Whoever is refused is told so; whoever is not finds the newest."""
    for ran in ran_in(start, start, switches, dirty):
        check(ran, "step 2" in ran.outcomes)
        lost = [outcome for outcome in ran.outcomes if outcome != "step 2"]
        check(ran, all(isinstance(outcome, ExistsError) for outcome in lost))
        check(ran, leftovers(ran.store) == [])
        check(ran, ran.store.holder(LOCK) is None)


@SWITCHES
def test_a_step_saved_by_two_at_once_is_of_one_of_them(switches: int) -> None:
    """G16. Method: a run saves a step under the number that `holdfast.save` gives its own; what
    appears meanwhile is never replaced."""
    one, other = partial(save_step, 5), partial(save, 6, name="step-5")
    for ran in ran_in(one, other, switches):
        kinds = sorted(type(outcome).__name__ for outcome in ran.outcomes)
        if kinds == ["Saved", "Saved"]:
            # The run began when the other one was there already, and saves its step again.
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
    return save_folder(tmp_path_factory.mktemp("hub") / "hub", small, hub_tensors(small))


def conversion(source: Path, options: ConvertOptions) -> Actor:
    """What `convert` does, to the name `step-0` of a store."""
    planned = plan(str(source), options)

    def convert(store: AmendableStore) -> int:
        file = options.to == "torch"
        place = target_in(store, "step-0", overwrite=options.overwrite, file=file)
        values = values_of(planned)
        return convert_to(place, planned, values).num_tensors

    return convert


def contents(store: MemoryStore, to: str) -> dict[str, bytes]:
    """The target of a conversion, but for its indices, which tell when it was made."""
    if to == "torch":
        return {"": store.read("step-0", 0, 1 << 30)}
    files = [file for file in store.list("step-0") if not file.startswith((".meta", "manifest"))]
    return {file: store.read(f"step-0/{file}", 0, 1 << 30) for file in files}


@pytest.mark.parametrize("to", WISHES)
def test_a_start_beside_a_conversion_leaves_its_attempt(to: str, source: Path) -> None:
    """G14, G16. Method: each format, to the folder of a run that starts; one change of turn, since
    a conversion has a hundred operations. Both come to their end, and what a killed conversion
    left is gone, or was gone on with."""
    convert = conversion(source, WISHES[to])
    alone = MemoryStore()
    convert(alone)
    wanted = contents(alone, to)

    def before(store: AmendableStore) -> None:
        dirty(store)
        store.rename(".attempt-c-00000001", ".attempt-step-0-00000001")

    for ran in ran_in(convert, start, 1, before):
        check(ran, ran.outcomes[1] == "step 2")
        if isinstance(ran.outcomes[0], ExistsError):
            # It met what a killed one left in the moment in which the start took hold of that.
            check(ran, ran.trace[ran.order.lengths[0] - 1] == "1: hold .attempt-step-0-00000001")
            convert(ran.store)
        else:
            check(ran, isinstance(ran.outcomes[0], int))
        check(ran, contents(ran.store, to) == wanted)
        check(ran, clean_up(ran.store) == [])
        check(ran, leftovers(ran.store) == [])


@pytest.mark.parametrize("to", WISHES)
def test_of_two_conversions_to_one_place_one_wins(to: str, source: Path) -> None:
    """G14, G16. Method: each format, twice to one name, one change of turn."""
    convert = conversion(source, WISHES[to])
    alone = MemoryStore()
    convert(alone)
    wanted = contents(alone, to)
    for ran in ran_in(convert, convert, 1):
        kinds = sorted(type(outcome).__name__ for outcome in ran.outcomes)
        check(ran, kinds == ["ExistsError", "int"])
        check(ran, contents(ran.store, to) == wanted)
        check(ran, leftovers(ran.store) == [])
