"""Nested state as flat entries with stock DCP's names, and the structure they do not express."""

from __future__ import annotations

import copy
import enum
import warnings
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

import holdfast
from holdfast.errors import FormatError, HoldfastError, MismatchError, UsageError
from holdfast.format.structure import check_node
from holdfast.state.objects import StateTree
from holdfast.state.same import differences, same
from holdfast.state.tree import Leaf
from kept import Kept

KEYS = st.sampled_from(["a", "b", "a.b", "0", "", "weight", "exp_avg"]) | st.integers(0, 2)
LEAVES = st.builds(lambda: torch.zeros(1)) | st.none() | st.integers() | st.text(max_size=3)
STATES = st.dictionaries(
    KEYS,
    st.recursive(
        LEAVES,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(KEYS, inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
        ),
        max_leaves=12,
    ),
    max_size=4,
)


def spelled_alike(value: Any) -> bool:
    """Return whether two keys of a dict that is split into entries have the same text."""
    if isinstance(value, dict):
        alike = len({*map(str, value)}) < len(value)
        return alike or any(map(spelled_alike, value.values()))
    return isinstance(value, list) and any(map(spelled_alike, value))


@given(STATES)
def test_names_paths_and_leaves_equal_those_of_stock_dcp(state: dict[Any, Any]) -> None:
    """G10. Method: stock's own `flatten_state_dict` on generated state: lists, tuples, dicts with
    dotted and numeric keys, empty ones. If stock refuses two entries of one name, so do we; and we
    refuse `0` beside `"0"`, which stock cannot tell apart in a load."""
    if spelled_alike(state):
        with pytest.raises(UsageError, match=r"same text|two entries"):
            StateTree(state).flatten()
        return
    try:
        expected, paths = flatten_state_dict(state)
    except ValueError:
        with pytest.raises(UsageError, match="two entries have the name"):
            StateTree(state).flatten()
        return
    found = StateTree(state).flatten().leaves
    assert [*found] == [*expected]
    for name, leaf in found.items():
        assert leaf.value is expected[name]
        assert leaf.path == paths[name]


def test_two_entries_of_one_name_are_refused_with_both_paths() -> None:
    """G6. Method: a dotted key beside a dict."""
    with pytest.raises(UsageError, match=r"`a\.b`") as refused:
        StateTree({"a.b": 1, "a": {"b": 2}}).flatten()
    assert "('a.b',)" in refused.value.what
    assert "('a', 'b')" in refused.value.what


def test_a_leaf_is_the_same_object() -> None:
    """Method: identity; no tensor is copied."""
    tensor = torch.zeros(3)
    leaf = StateTree({"w": tensor}).flatten().leaves["w"]
    assert isinstance(leaf, Leaf)
    assert leaf.value is tensor


def test_structure_is_stored_only_if_names_do_not_express_it() -> None:
    """Method: dicts of tensors, as in models, need none; types, order and empty containers do."""
    told = {"model": {"w": torch.ones(1), "b": [torch.ones(1), {"x": torch.ones(1)}]}, "step": 3}
    assert StateTree(told).flatten().structure == {}
    found = StateTree(
        {"o": OrderedDict(b=1, a=2), "k": {1: torch.ones(1)}, "e": {"x": {}}}
    ).flatten()
    assert found.structure == {
        ("o",): {"OrderedDict": {"b": None, "a": None}},
        ("k",): {"dict": [["1", None]]},
        ("e",): {"dict": {"x": {"dict": {}}}},
    }


WHOLE: dict[str, Any] = {
    "int keys": {0: torch.ones(2), 10: {"x": 1}, -1: None},
    "mixed keys": {1: "a", "b": 2, None: 3, (1, "x"): 4, 2.5: 5, b"k": 6, False: 7},
    "ordered": OrderedDict([("z", 1), ("a", torch.ones(1)), ("m", OrderedDict())]),
    "counter": Counter({3: 2, "a": 1}),
    "defaultdict": defaultdict(list, {3: [1], "t": [torch.ones(2)]}),
    "empties": {"a": {}, "b": [], "c": (), "d": [{}], "e": [[]], "f": {"g": {"h": {}}}},
    "tuples": (1, (torch.ones(2), [torch.zeros(1)]), {"k": (2, 3)}),
    "rows": [{"i": n, "x": torch.full((n,), float(n))} for n in range(4)],
    "numpy": {
        "array": np.arange(6, dtype=np.uint16).reshape(2, 3),
        "strided": np.arange(6)[::2],
        "zero": np.array(3.5),
        "scalars": [np.float32(0.1), np.int64(-3), np.bool_(1), 7],
        "deep": {"t": (np.float64(2.5), [np.uint8(3)], {1: np.float32(4)})},
        "list": [np.ones(2), torch.ones(2)],
    },
    "numbers": [-0.0, float("nan"), float("inf"), 2**70, -(2**63), 1j, True, None],
    "bytes and text": {
        "b": b"\x00\xff",
        "none": [b"", (b"", 1)],
        "e": b"",
        "s": "ümlaut",
        "set": {1, 2},
        "r": "a\nb",
    },
    "torch values": {"dtype": torch.float16, "size": torch.Size([1, 2])},
    "dtypes": [
        torch.ones(2, dtype=dtype)
        for dtype in (torch.bool, torch.uint8, torch.bfloat16, torch.complex64, torch.float8_e4m3fn)
    ],
    "no elements": {"a": torch.ones(0, 3), "b": torch.ones(())},
}


@pytest.mark.parametrize("state", WHOLE.values(), ids=WHOLE)
def test_the_state_of_an_object_is_restored_exactly(state: Any, tmp_path: Path) -> None:
    """G15. Method: types of containers, keys and numbers, order, every bit; loaded into a fresh
    object; alone, and inside another state; saved in the background too."""
    holdfast.save(tmp_path / "one", {"a": Kept(state), "b": Kept({"deep": [state]})})
    one, two = Kept(), Kept()
    holdfast.load(tmp_path / "one", {"a": one, "b": two})
    assert [*differences(state, one.state)] == []
    assert same({"deep": [state]}, two.state)
    if isinstance(state, dict):
        assert list(state) == list(one.state), "order"
    holdfast.testing.round_trip({"model": torch.nn.Linear(1, 1), "a": Kept(state)})


@pytest.mark.parametrize("state", WHOLE.values(), ids=WHOLE)
def test_plain_state_is_restored_exactly(state: Any, tmp_path: Path) -> None:
    """G15. Method: without an object; loaded into a state with the same keys, and an empty one."""
    holdfast.save(tmp_path / "one", {"a": state})
    for target in ({"a": copy.deepcopy(state)}, {"a": None}):
        holdfast.load(tmp_path / "one", target)
        assert [*differences(state, target["a"])] == []


def test_plain_state_is_replaced_by_the_saved_state(tmp_path: Path) -> None:
    """G15. Method: lists that grew and shrank, None that became a dict, a dict that was empty,
    numbers, texts; dicts of tensors are filled in place."""
    saved = {
        "rows": [{"i": 1, "x": torch.ones(2)}, {"i": 2, "x": torch.ones(3)}],
        "fewer": [1],
        "last": {"epoch": 4, 3: "x"},
        "history": {"loss": [0.5, np.float32(0.25)]},
        "tensors": {"a": torch.ones(2), "b": [torch.ones(1)]},
        "number": np.int64(7),
        "gone": None,
    }
    holdfast.save(tmp_path / "one", saved)
    tensor = torch.zeros(2)
    target: dict[str, Any] = {
        "rows": [],
        "fewer": [1, 2, {"a": 3}],
        "last": None,
        "history": {},
        "tensors": {"a": tensor, "b": [torch.zeros(1)]},
        "number": 0,
        "gone": {"was": 1},
    }
    holdfast.load(tmp_path / "one", target)
    assert [*differences(saved, target)] == []
    assert target["tensors"]["a"] is tensor, "in place"


class Colour(enum.Enum):
    """A value of no Python type."""

    RED = 1


class MyDict(dict[str, int]):
    """A custom dict class."""


class MyTensor(torch.Tensor):
    """A custom tensor class that does not expose its elements."""


Point = namedtuple("Point", "x y")


def nested(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=layout)


REFUSED: dict[str, Any] = {
    "enum": ({"a": [1, Colour.RED]}, r"`state\.a\[1\]` is a .*Colour"),
    "deque": ({"d": deque([1])}, r"`state\.d` is a collections\.deque"),
    "named tuple": ({"p": Point(1, 2)}, r"`state\.p` is a .*Point"),
    "a dict of its own": ({"m": MyDict(a=1)}, r"`state\.m` is a .*MyDict"),
    "path": ({"p": (1, {"x": Path("/")})}, r"`state\.p\[1\]\['x'\]` is a pathlib"),
    "function": ({"f": len}, r"`state\.f` is a builtin_function"),
    "a key of its own": ({Colour.RED: 1}, r"has the key <Colour\.RED"),
    "a default of its own": ({"d": defaultdict(Kept)}, r"defaultdict of Kept"),
    "alike": ({1: 2, "1": 3}, r"two keys of `state` have the same text"),
    "numpy text": ({"a": np.array(["x"])}, r"`state\.a` is a numpy array of <U1"),
    "numpy time": ({"a": [np.datetime64("2020-01-01")]}, r"`state\.a\[0\]` is a numpy\.datetime64"),
    "tensor class": ({"t": torch.ones(1).as_subclass(MyTensor)}, r"`state\.t` is a .*MyTensor"),
    "sparse": ({"t": torch.eye(2).to_sparse()}, r"`state\.t`"),
    "nested": ({"t": nested(torch.strided)}, r"`state\.t` is a nested tensor"),
    "jagged": ({"t": nested(torch.jagged)}, r"`state\.t`"),
    "half a character": ({"\ud800": torch.ones(1)}, r"holds half of a character"),
    "meta": ({"t": torch.ones(1, device="meta")}, r"`state\.t`"),
}


@pytest.mark.parametrize(("state", "said"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("mode", ["save", "disabled", "async", "async_with_pinned_mem"])
def test_state_that_could_not_be_restored_is_refused_by_name(
    state: Any, said: str, mode: str, tmp_path: Path
) -> None:
    """G15. Method: in every mode, before a byte is written."""
    with pytest.raises(UsageError, match=said) as refused:
        holdfast.testing.round_trip(
            {"model": torch.nn.Linear(1, 1), "state": Kept(state)},
            fresh={"model": torch.nn.Linear(1, 1), "state": Kept()},
            modes=(mode,),
        )
    assert "unexpected" not in str(refused.value)
    assert refused.value.hint
    with pytest.raises(UsageError):
        holdfast.save(tmp_path / "one", {"state": Kept(state)})
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_state_that_contains_itself_is_refused(tmp_path: Path) -> None:
    """G15. Method: a dict and a list; the error comes at a bounded depth."""
    endless: dict[str, Any] = {"x": torch.ones(1)}
    endless["me"] = endless
    members: list[Any] = [torch.ones(1)]
    members.append(members)
    for state in (endless, members):
        with pytest.raises(UsageError, match=r"contains itself|levels deep"):
            holdfast.save(tmp_path / "one", {"a": state})


def test_an_error_of_an_objects_own_load_is_shown(tmp_path: Path) -> None:
    """G15. Method: its own error; the message contains the name and the text of that error."""

    class Picky(Kept):
        def load_state_dict(self, state_dict: Any) -> None:
            raise KeyError(f"no {state_dict}")

    holdfast.save(tmp_path / "one", {"a": Kept({"x": 1})})
    with pytest.raises(HoldfastError, match=r"`a` could not be loaded: .*KeyError") as refused:
        holdfast.load(tmp_path / "one", {"a": Picky()})
    assert "Picky" in str(refused.value)


def test_new_tensors_of_a_custom_class_need_a_class_declared_safe(
    tmp_path: Path,
) -> None:
    """G8, G15. Method: a checkpoint must not choose which code runs: the class must be one that the
    process has declared safe, or that of the tensor to be filled."""
    with pytest.raises(UsageError, match=r"add_safe_globals\(\[Scaled\]\)"):
        holdfast.save(tmp_path / "no", {"a": Kept({"t": scaled(1.0)})})
    holdfast.save(tmp_path / "in place", {"t": scaled(3.0)})
    target = {"t": scaled(0.0)}
    holdfast.load(tmp_path / "in place", target)
    assert target["t"].scale == 3.0
    with torch.serialization.safe_globals([Scaled]):
        holdfast.save(tmp_path / "yes", {"a": Kept({"t": scaled(5.0)})})
        one = Kept()
        holdfast.load(tmp_path / "yes", {"a": one})
        assert type(one.state["t"]) is Scaled
        assert one.state["t"].scale == 5.0
    with pytest.raises(HoldfastError, match="not declared"):
        holdfast.load(tmp_path / "yes", {"a": Kept()})


class Scaled(torch.Tensor):
    """Stores its elements as integers and a factor."""

    data8: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self.data8, self.scale = data, scale

    def __tensor_flatten__(self) -> Any:
        return ["data8", "scale"], {"bits": 8}

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, _: Any, __: Any, ___: Any) -> Scaled:
        return cls(inner["data8"], inner["scale"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def plain(one: Any) -> Any:
            return one.data8.float() * one.scale if isinstance(one, Scaled) else one

        return func(*map(plain, args), **{k: plain(v) for k, v in (kwargs or {}).items()})


def scaled(factor: float) -> Scaled:
    return Scaled(torch.arange(4, dtype=torch.int8), torch.tensor(factor))


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_a_buffer_of_a_tensor_class_is_restored_in_every_mode(mode: Any, tmp_path: Path) -> None:
    """G15. Method: changed after the save returned; compared by class and elements."""

    def made(factor: float) -> torch.nn.Module:
        model = torch.nn.Linear(2, 2)
        model.register_buffer("table", scaled(factor))
        return model

    config = holdfast.CheckpointConfig(enable=True, interval=1, async_mode=mode, stop_signals=())
    one, two = made(3.0), made(0.0)
    with holdfast.CheckpointManager(tmp_path, model=one, config=config) as manager:
        manager.save(1)
        manager.wait_for_staging()
        one.get_buffer("table").scale.fill_(9.0)  # type: ignore[attr-defined]
    with holdfast.CheckpointManager(tmp_path, model=two, config=config) as manager:
        manager.load()
    table: Any = two.get_buffer("table")
    assert type(table) is Scaled
    assert table.scale == 3.0


@pytest.mark.parametrize("context", ["meta", "default dtype", "inference", "no_grad"])
def test_contexts_of_the_caller_change_nothing(context: str, tmp_path: Path) -> None:
    """G15. Method: saved and loaded inside each context; the state can be trained afterwards."""
    contexts: dict[str, Any] = {
        "meta": lambda: torch.device("meta"),
        "inference": torch.inference_mode,
        "no_grad": torch.no_grad,
        "default dtype": torch.no_grad,
    }
    entered = contexts[context]()
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    fresh = torch.nn.Linear(2, 2)
    again = torch.optim.AdamW(fresh.parameters())
    before = torch.get_default_dtype()
    state = {"model": model, "optimizer": optimizer, "a": Kept({"x": [torch.ones(2), 1.5]})}
    kept = Kept()
    try:
        if context == "default dtype":
            torch.set_default_dtype(torch.float64)
        with entered:
            holdfast.save(tmp_path / "one", state)
            holdfast.load(tmp_path / "one", {"model": fresh, "optimizer": again, "a": kept})
            read = holdfast.open(tmp_path / "one").read("model.weight")
    finally:
        torch.set_default_dtype(before)
    assert same(optimizer.state_dict(), again.state_dict())
    assert same(kept.state, {"x": [torch.ones(2), 1.5]})
    assert torch.equal(read, model.weight)
    loss: Any = fresh(torch.ones(1, 2)).sum()
    loss.backward()
    again.step()


@pytest.mark.parametrize(
    "node",
    [
        3,
        [],
        {},
        {"set": []},
        {"dict": [["[1]", None]]},
        {"dict": [["1", None], ["1", None]]},
        {"dict": [[1, None]]},
        {"list": {"a": None}},
        {"defaultdict": {}, "default": "exec"},
        {"types": [[["0"], "object_"]]},
        {"tensor": {"like": 3}},
        {"subclass": {"class": "x", "inner": {}, "size": ["a"], "stride": []}},
        {"dict": [["__import__('os')", None]]},
        {"dict": [["(" * 300, None]]},
    ],
)
def test_an_invalid_structure_is_refused(node: Any) -> None:
    """G8. Method: structures that a stranger's manifest may contain; none of it is run."""
    with pytest.raises((ValueError, LookupError, TypeError)):
        check_node(node)


def test_a_structure_with_too_many_levels_is_refused() -> None:
    """G8. Method: lists inside lists."""
    node: Any = None
    for _ in range(500):
        node = {"list": [node]}
    with pytest.raises(ValueError, match="levels"):
        check_node(node)


def test_a_structure_without_its_entries_is_refused(tmp_path: Path) -> None:
    """G8. Method: a manifest whose structure names an entry that it lacks."""
    from dataclasses import replace

    holdfast.save(tmp_path / "one", {"a": Kept([{"x": torch.ones(1)}])})
    manifest = holdfast.open(tmp_path / "one").manifest
    wrong = replace(manifest, structure={("a",): {"list": [None, None]}})
    with pytest.raises(FormatError, match="no such entry"):
        StateTree({"a": Kept()}).match(wrong)


def test_loading_into_an_expanded_tensor_is_refused(tmp_path: Path) -> None:
    """G6. Method: a tensor whose elements share memory is refused; one with one element is not."""
    holdfast.save(tmp_path / "one", {"x": torch.arange(3.0), "y": torch.ones(1, 2)})
    with pytest.raises(MismatchError, match="`x` is an expanded tensor"):
        holdfast.load(tmp_path / "one", {"x": torch.zeros(1).expand(3), "y": torch.zeros(1, 2)})
    state = {"x": torch.zeros(3), "y": torch.zeros(1, 2).as_strided((1, 2), (0, 1))}
    holdfast.load(tmp_path / "one", state)
    assert state["y"].tolist() == [[1, 1]]
