"""Write plans: each element once, evenly divided, and every conflict between ranks reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import MismatchError
from holdfast.format.region import Region, first_overlap
from holdfast.planning.write_plan import (
    STRETCH_BYTES_MIN,
    GlobalPlan,
    LocalPlan,
    LocalPlans,
    LocalTensor,
    known_plans,
    merge_local_plans,
    neighbor_plans_of,
    plan,
)
from holdfast.state.shard import Mesh, MeshPlacement, ShardSpec, pieces_of

ITEM = 4  # float32


def local_plan_of(tensors: Mapping[str, tuple[tuple[int, ...], MeshPlacement | None]]) -> LocalPlan:
    return LocalPlan(
        {
            name: LocalTensor("float32", shape, (name,), placement)
            for name, (shape, placement) in tensors.items()
        }
    )


def planned(local_plans: Sequence[LocalPlans]) -> GlobalPlan:
    return plan(merge_local_plans(local_plans))


def written(whole: GlobalPlan, rank: int) -> list[tuple[str, Region]]:
    return [(chunks.name, r) for chunks in whole.tensors for r in chunks.regions_of(rank)]


def nbytes_of(whole: GlobalPlan, rank: int) -> int:
    return sum(region.num_elements * ITEM for _, region in written(whole, rank))


@st.composite
def placements_on(draw: st.DrawFn, mesh: Mesh, num_dims: int) -> MeshPlacement:
    """Any placement on a mesh: replicated, sharded, sharded in strides, on any axes and dims."""
    shards = []
    for _ in mesh.shape:
        dim, num_strides = draw(st.integers(0, num_dims - 1)), draw(st.integers(1, 3))
        shards.append(draw(st.sampled_from([None, ShardSpec(dim), ShardSpec(dim, num_strides)])))
    return MeshPlacement(mesh, tuple(shards))


@st.composite
def jobs(draw: st.DrawFn) -> list[dict[str, LocalPlan]]:
    """Pipeline stages with a mesh each: tensors with any placement, tensors of every rank, tensors
    of one rank, and values, in two components."""
    mesh_shape = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    num_stages, size = draw(st.integers(1, 2)), prod(mesh_shape)
    local_plans: list[dict[str, LocalPlan]] = [
        {component: LocalPlan() for component in ("layers", "optimizer")}
        for _ in range(size * num_stages)
    ]
    for stage in range(num_stages):
        ranks = tuple(range(stage * size, (stage + 1) * size))
        mesh = Mesh(mesh_shape, ranks)
        for number in range(draw(st.integers(0, 5))):
            shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
            component = draw(st.sampled_from(["layers", "optimizer"]))
            shared = draw(st.booleans())
            name = f"{component}.{number}" if shared else f"{component}.{stage}.{number}"
            placement = None if shared else draw(placements_on(mesh, len(shape)))
            tensor = LocalTensor(
                "float32", (7, 2) if shared else shape, (component, name), placement
            )
            for rank in ranks:
                local_plans[rank][component].tensors[name] = tensor
    for rank, components in enumerate(local_plans):
        components["optimizer"].values["lr"] = ("optimizer", "lr")
        components["rng"] = LocalPlan(values={f"rank_{rank}": ("rng", f"rank_{rank}")})
    # Equal local plans are one object, as after a gather.
    distinct = [local_plan for components in local_plans for local_plan in components.values()]
    return [
        {
            component: next(o for o in distinct if o == local_plan)
            for component, local_plan in components.items()
        }
        for components in local_plans
    ]


@given(jobs())
def test_every_element_is_written_once_by_a_rank_that_holds_it(
    job: list[dict[str, LocalPlan]],
) -> None:
    """G6. Method: each written region is inside of one that its rank holds by its coordinates in
    the mesh. No two overlap, and together they cover all tensors."""
    whole = planned(job)
    regions: dict[str, list[Region]] = {}
    for rank in range(len(job)):
        for name, region in written(whole, rank):
            tensor = next(o.tensors[name] for o in job[rank].values() if name in o.tensors)
            assert any((region & held) == region for held in held_by(tensor, rank))
            regions.setdefault(name, []).append(region)
    for components in job:
        for local_plan in components.values():
            for name, tensor in local_plan.tensors.items():
                assert first_overlap(regions[name]) is None
                assert sum(r.num_elements for r in regions[name]) == prod(tensor.shape)


def held_by(tensor: LocalTensor, rank: int) -> list[Region]:
    if tensor.placement is None:
        return [Region.whole(tensor.shape)]
    mesh = tensor.placement.mesh
    coordinate = [*product(*map(range, mesh.shape))][mesh.ranks.index(rank)]
    return [p.region for p in pieces_of(tensor.shape, tensor.placement.splits_at(coordinate))]


@given(jobs())
def test_a_rank_plans_its_own_names_from_its_neighbor_plans(
    job: list[dict[str, LocalPlan]],
) -> None:
    """G9. Method: each rank's plan from its neighbor plans has the same regions, in the same order,
    and the same values as the plan from all local plans."""
    all_plans = merge_local_plans(job)
    whole, size = plan(all_plans), len(job)
    for rank, neighbors in enumerate(neighbor_plans_of(all_plans, size)):
        own = plan(known_plans(neighbors, job[rank], size))
        assert written(own, rank) == written(whole, rank)
        mine, all_ = ([n for n, (r, _) in p.values.items() if r == rank] for p in (own, whole))
        assert mine == all_


def test_plans_that_all_ranks_or_only_one_rank_have_are_not_sent() -> None:
    """Method: 64 ranks of one mesh, each with a value of its own; no rank is sent a local plan."""
    mesh = MeshPlacement(Mesh((64,), tuple(range(64))), (ShardSpec(0),))
    layers = local_plan_of({"w": ((128, 2), mesh)})
    job = [
        {"layers": layers, "rng": LocalPlan(values={str(r): ("rng", str(r))})} for r in range(64)
    ]
    for rank, neighbors in enumerate(neighbor_plans_of(merge_local_plans(job), 64)):
        assert {component: [*map(tuple, known)] for component, known in neighbors.items()} == {
            "rng": [([rank], None)]
        }


@pytest.mark.parametrize("num_tensors", [1, 3, 16, 1000])
def test_replicated_tensors_are_divided_between_ranks_by_bytes(num_tensors: int) -> None:
    """Method: tensors of all sizes on four ranks; no rank writes more than its quarter and one row,
    and few tensors are divided."""
    generator = np.random.default_rng(num_tensors)
    heights = generator.integers(1, 20_000_000 // num_tensors, num_tensors).tolist()
    local_plan = local_plan_of({f"t{i}": ((height, 16), None) for i, height in enumerate(heights)})
    whole = planned([{"layers": local_plan}] * 4)
    loads = [nbytes_of(whole, rank) for rank in range(4)]
    total = sum(heights) * 16 * ITEM
    assert sum(loads) == total
    assert max(loads) <= total / 4 + 2 * 16 * ITEM
    assert sum(len(chunks.rank) for chunks in whole.tensors) <= num_tensors + 3


def test_few_replicated_bytes_are_not_divided() -> None:
    """Method: many tensors that together are smaller than a stretch."""
    local_plan = local_plan_of(
        {f"t{i}": ((STRETCH_BYTES_MIN // ITEM // 11,), None) for i in range(10)}
    )
    whole = planned([{"layers": local_plan}] * 8)
    assert [len(written(whole, rank)) for rank in range(8)] == [10, *[0] * 7]


def test_a_replicated_shard_is_divided_between_its_replicas() -> None:
    """Method: two replicas of four shards; each rank writes half of its shard's bytes."""
    ranks = tuple(range(8))
    hybrid = MeshPlacement(Mesh((2, 4), ranks), (None, ShardSpec(0)))
    tensors: dict[str, tuple[tuple[int, ...], MeshPlacement | None]] = {
        f"t{i}": ((1 << 10, 1 << 10), hybrid) for i in range(9)
    }
    whole = planned([{"layers": local_plan_of(tensors)}] * 8)
    assert [nbytes_of(whole, r) for r in ranks] == [9 << 19] * 8


def test_a_value_is_written_by_the_first_rank_that_has_it() -> None:
    """Method: one value that all ranks have, one that only rank 1 has."""
    both = LocalPlan(values={"a": ("a",)})
    whole = planned([{"x": both}, {"x": both, "y": LocalPlan(values={"b": ("b",)})}])
    assert whole.values == {"a": (0, ("a",)), "b": (1, ("b",))}


def refused(*local_plans: LocalPlan) -> str:
    with pytest.raises(MismatchError) as error:
        planned([{"x": local_plan} for local_plan in local_plans])
    return error.value.what


def test_every_conflict_between_ranks_is_listed() -> None:
    """G6. Method: a shape, a dtype, a hole, an overlap and a kind, all wrong in one plan."""
    rows = MeshPlacement(Mesh((3,), (0, 1, 2)), (ShardSpec(0),))
    first = local_plan_of(
        {"shape": ((4, 1), None), "dtype": ((4, 1), None), "hole": ((6, 1), rows)}
        | {"twice": ((4, 1), None), "kind": ((4, 1), None)}
    )
    second = local_plan_of(
        {"shape": ((5, 1), None), "hole": ((6, 1), rows)} | {"twice": ((4, 1), rows)}
    )
    second.tensors["dtype"] = LocalTensor("float64", (4, 1), ("dtype",))
    second.values["kind"] = ("kind",)
    message = refused(first, second, LocalPlan(values={"kind": ("kind",)}))
    for name in ("shape", "dtype", "hole", "twice", "kind"):
        assert f"`{name}`" in message
    assert "float64 [4, 1] on rank 1" in message
    assert "the ranks hold 4 of 4" not in message


def test_a_missing_shard_is_reported() -> None:
    """G6. Method: three ranks in the mesh, two of which hold the tensor."""
    rows = MeshPlacement(Mesh((3,), (0, 1, 2)), (ShardSpec(0),))
    assert "hold 4 of 6 elements" in refused(*[local_plan_of({"w": ((6,), rows)})] * 2, LocalPlan())


@pytest.mark.parametrize("value_first", [True, False])
@pytest.mark.parametrize("alias", [True, False])
def test_a_name_that_is_a_tensor_on_one_rank_and_a_value_on_another_is_refused(
    value_first: bool, alias: bool
) -> None:
    """G6. Method: in both orders, and with a tensor that is tied to another. The checkpoint would
    have two entries of one name."""
    tensor = local_plan_of({"first": ((4, 1), None)})
    if alias:
        tensor.aliases["a"] = ("first", ("a",))
    else:
        tensor.tensors["a"] = tensor.tensors["first"]
    value = LocalPlan(values={"a": ("a",)})
    message = refused(*([value, tensor] if value_first else [tensor, value]))
    assert "`a` is a tensor on one rank, a value on" in message


def tied(second: bool, placement: MeshPlacement) -> LocalPlan:
    """`a`, and `b` either tied to it or a tensor of its own."""
    local_plan = local_plan_of(
        {"a": ((1, 4), placement), **({} if second else {"b": ((1, 4), placement)})}
    )
    if second:
        local_plan.aliases["b"] = ("a", ("b",))
    return local_plan


@pytest.mark.parametrize("empty_first", [True, False])
def test_a_rank_without_elements_does_not_decide_whether_tensors_are_tied(
    empty_first: bool,
) -> None:
    """G6. Method: tied weights sharded over more ranks than they have rows. Ranks without a row
    have no memory that shows the tie, so the others decide, and no rank writes `b`."""
    ranks = (1, 0) if empty_first else (0, 1)
    placement = MeshPlacement(Mesh((2,), ranks), (ShardSpec(0),))
    local_plans = [tied(True, placement), tied(False, placement)]
    whole = planned(
        [{"x": local_plan} for local_plan in (local_plans[::-1] if empty_first else local_plans)]
    )
    assert [chunks.name for chunks in whole.tensors] == ["a"]
    assert whole.aliases == {"b": ("a", ("b",))}


def test_tensors_tied_on_one_rank_only_are_refused() -> None:
    """G6. Method: tied on one rank, two tensors on another; either choice would lose elements."""
    columns = MeshPlacement(Mesh((2,), (0, 1)), (ShardSpec(1),))
    message = refused(tied(True, columns), tied(False, columns))
    assert "`b` is tied to `a` on rank 0, a tensor of its own on rank 1" in message
