"""Which blocks go to which stage of a pipeline."""

from __future__ import annotations

import pytest

from holdfast.trainer.config import ParallelismConfig
from holdfast.trainer.pipeline import stages_of_rank


@pytest.mark.parametrize("schedule", ["1F1B", "GPipe", "Interleaved1F1B"])
@pytest.mark.parametrize(("num_layers", "degree"), [(6, 1), (4, 2), (7, 3), (126, 8)])
def test_every_block_is_in_one_stage_and_stages_follow_one_another(
    schedule: str, num_layers: int, degree: int
) -> None:
    """Method: all ranks' parts in the order of their stages; lengths differ by one at most."""
    config = ParallelismConfig(pipeline_parallel_degree=degree, pipeline_parallel_schedule=schedule)
    held = [stages_of_rank(num_layers, config, index, degree) for index in range(degree)]
    turns = range(len(held[0]))
    assert len(turns) == (2 if degree > 1 and schedule == "Interleaved1F1B" else 1)
    stages = [held[index][turn] for turn in turns for index in range(degree)]
    assert [layer for part in stages for layer in part.layers] == list(range(num_layers))
    lengths = [len(part.layers) for part in stages]
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1
    assert [part.first for part in stages] == [True, *(False for _ in stages[1:])]
    assert [part.last for part in stages] == [*(False for _ in stages[1:]), True]
