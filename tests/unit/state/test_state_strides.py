"""Order of elements in memory: slots lie like their parameters, and rebuilt tensors as saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast.errors import MismatchError, UsageError
from holdfast.state.strides import order_in, order_of, overlaps_itself

OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.AdamW, {"fused": True, "amsgrad": True}),
    (torch.optim.AdamW, {"foreach": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    (torch.optim.Adagrad, {"fused": True}),
]


def channels_last() -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = nn.Conv2d(3, 4, 3)
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def transposed() -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(5, 3)
    linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
    return linear


def step(module: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in module.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.grad = torch.empty_like(parameter).copy_(drawn)
    optimizer.step()


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
@pytest.mark.parametrize("build", [channels_last, transposed])
def test_a_resume_is_exact_if_parameters_are_not_row_major(
    build: Any, cls: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    """G9, G15. Method: fused kernels go through a parameter and its slots in the order of memory.
    Three steps, a save, a load into a fresh module, and three more steps, beside the run that goes
    on."""
    module = build()
    optimizer = cls(module.parameters(), **options)
    for number in range(3):
        step(module, optimizer, number)
    holdfast.save(tmp_path / "one", {"model": module, "optimizer": optimizer})
    fresh = build()
    resumed = cls(fresh.parameters(), **options)
    holdfast.load(tmp_path / "one", {"model": fresh, "optimizer": resumed})
    for slot, value in optimizer.state[module.weight].items():
        if value.dim():
            assert resumed.state[fresh.weight][slot].stride() == module.weight.stride(), slot
    for number in range(3, 6):
        step(module, optimizer, number)
        step(fresh, resumed, number)
    assert torch.equal(module.weight, fresh.weight)
    assert torch.equal(module.bias, fresh.bias)


def test_tensors_that_a_load_makes_lie_in_memory_as_they_were_saved(tmp_path: Path) -> None:
    """Method: the state of an optimizer as a plain dict, of a run that has made no step yet; and a
    list of another length. Stock DCP still reads the checkpoint."""
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    matrix = torch.randn(3, 4).t()
    saved = {"optimizer": {"state": {0: {"exp_avg": image}}}, "all": [matrix, image[:, ::2]]}
    holdfast.save(tmp_path / "one", saved)
    state: dict[str, Any] = {"optimizer": {"state": {}}, "all": []}
    holdfast.load(tmp_path / "one", state)
    found = state["optimizer"]["state"][0]["exp_avg"], *state["all"]
    assert [one.stride() for one in found[:2]] == [image.stride(), matrix.stride()]
    assert all(map(torch.equal, found, (image, matrix, image[:, ::2])))
    assert found[2].is_contiguous(), "it has gaps in memory, so it is row-major"


def test_the_order_of_a_file_must_be_one_of_all_dims() -> None:
    """Method: orders that a forged manifest may have."""
    assert order_in({"order": "2 0 1"}, 3) == (2, 0, 1)
    for text in ("0 0 1", "0 1", "0 1 2 3", "a b c", "-1 0 1", ""):
        assert order_in({"order": text}, 3) == (0, 1, 2)


def test_overlaps_are_found_by_the_places_of_all_elements() -> None:
    """Method: each view of a few elements, compared with the set of its offsets."""
    base = torch.zeros(64)
    for sizes in [(2, 3), (3, 2), (1, 4), (4, 4)]:
        for strides in [(a, b) for a in range(6) for b in range(6)]:
            view = base.as_strided(sizes, strides)
            places = {
                i * strides[0] + j * strides[1] for i in range(sizes[0]) for j in range(sizes[1])
            }
            assert overlaps_itself(view) == (len(places) < view.numel()), (sizes, strides)
    assert order_of(base.as_strided((2, 3), (1, 2))) == (1, 0)


def test_a_load_into_overlapping_elements_is_refused(tmp_path: Path) -> None:
    """G6. Method: windows of a tensor, whose elements share memory without a stride of 0."""
    holdfast.save(tmp_path / "one", {"v": torch.arange(9.0).view(3, 3)})
    state = {"v": torch.zeros(5).unfold(0, 3, 1)}
    with pytest.raises(MismatchError, match="`v` is an expanded tensor, or another whose elements"):
        holdfast.load(tmp_path / "one", state)
    assert not state["v"].any()


def test_a_module_that_a_resume_could_not_fill_is_not_saved(tmp_path: Path) -> None:
    """G6. Method: an expanded buffer; then its copy."""
    module = nn.Linear(2, 2)
    module.register_buffer("scale", torch.ones(1).expand(4))
    with pytest.raises(UsageError, match=r"`m\.scale` is an expanded tensor"):
        holdfast.save(tmp_path / "one", {"m": module})
    assert not (tmp_path / "one").exists()
    module.scale = torch.ones(1).expand(4).clone()
    holdfast.save(tmp_path / "one", {"m": module})
    holdfast.load(tmp_path / "one", {"m": module})


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", ["csr", "csc", "bsr", "coo"])
def test_sparse_tensors_are_refused_by_name(layout: str, tmp_path: Path) -> None:
    """G15. Method: a sparse tensor in a dict, and as a buffer."""
    dense: Any = torch.eye(4)
    sparse = {
        "csr": dense.to_sparse_csr,
        "csc": dense.to_sparse_csc,
        "bsr": lambda: dense.to_sparse_bsr((2, 2)),
        "coo": dense.to_sparse_coo,
    }[layout]()
    module = nn.Linear(2, 2)
    module.register_buffer("s", sparse)
    for state in ({"x": {"s": sparse}}, {"x": module}):
        with pytest.raises(UsageError, match=r"`x\.s` is a torch\.sparse_\w+ tensor"):
            holdfast.save(tmp_path / "one", state)
