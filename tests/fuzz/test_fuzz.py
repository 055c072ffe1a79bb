"""Random and coverage-guided inputs for every parser."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from fuzz.fuzz_parsers import TARGETS, attempt, seeds

FUZZER = Path(__file__).parent / "fuzz_parsers.py"
INPUTS = 4000
SECONDS = 60


def mutated(data: bytes, others: list[bytes], random: Random) -> bytes:
    """Apply one to five changes: bytes, runs of bytes, lengths as in headers, parts of other
    inputs."""
    made = bytearray(data)
    for _ in range(random.randint(1, 5)):
        at = random.randrange(len(made) + 1)
        stop = min(len(made), at + random.choice((1, 2, 4, 8, 40)))
        kind = random.randrange(6)
        if kind == 0 and at < len(made):
            made[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            made[at:stop] = random.randbytes(stop - at)
        elif kind == 2:
            del made[at:stop]
        elif kind == 3:
            made[at:at] = made[at:stop] * random.choice((1, 2, 50))
        elif kind == 4:
            edge = random.choice((0, 1, 255, 2**15, 2**31 - 1, 2**32 - 1, 2**62, 2**64 - 1))
            nbytes = random.choice((1, 2, 4, 8))
            made[at : at + nbytes] = (edge % 2 ** (8 * nbytes)).to_bytes(nbytes, "little")
        else:
            other = random.choice(others)
            start = random.randrange(len(other))
            made[at:stop] = other[start : start + random.randint(1, 60)]
    return bytes(made)


@pytest.mark.parametrize("target", TARGETS)
def test_a_changed_file_is_read_or_refused(target: str) -> None:
    """G8. Method: real inputs, which are read; then random changes to them, from a fixed seed. No
    other errors, time or memory than allowed."""
    originals, random = seeds(target), Random(target)
    assert {attempt(target, seed) for seed in originals} == {"read"}
    outcomes = Counter(
        attempt(target, mutated(random.choice(originals), originals, random)) for _ in range(INPUTS)
    )
    assert outcomes["refused"] > INPUTS // 20


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="pip install atheris")
@pytest.mark.parametrize("target", TARGETS)
def test_coverage_guided_fuzzing_finds_no_other_error(target: str, tmp_path: Path) -> None:
    """G8. Method: atheris, a minute for each parser, from the same inputs."""
    command = [sys.executable, str(FUZZER), target, str(tmp_path / "corpus")]
    options = [f"-max_total_time={SECONDS}", "-print_final_stats=1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [*command, *options], cwd=tmp_path, env=environment, text=True, capture_output=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "stat::number_of_executed_units" in ran.stderr
