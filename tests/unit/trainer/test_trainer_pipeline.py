"""Division of the layers into pipeline stages."""

from __future__ import annotations

import pytest

from holdfast.trainer.config import ParallelismConfig
from holdfast.trainer.pipeline import stages_of_rank


@pytest.mark.parametrize("schedule", ["1F1B", "GPipe", "Interleaved1F1B"])
@pytest.mark.parametrize(("num_layers", "degree"), [(6, 1), (4, 2), (7, 3), (126, 8)])
def test_stages_divide_the_layers_evenly_and_in_order(
    schedule: str, num_layers: int, degree: int
) -> None:
    """Method: the stages of all ranks in order; their lengths differ by one at most."""
    config = ParallelismConfig(pipeline_parallel_degree=degree, pipeline_parallel_schedule=schedule)
    by_rank = [stages_of_rank(num_layers, config, index, degree) for index in range(degree)]
    turns = range(len(by_rank[0]))
    assert len(turns) == (2 if degree > 1 and schedule == "Interleaved1F1B" else 1)
    stages = [by_rank[index][turn] for turn in turns for index in range(degree)]
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    lengths = [len(stage) for stage in stages]
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1
