"""Conversions that are killed, and the second run, which continues them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_folders import LLAMA, hf_tensors, save_folder
from holdfast.cli.convert import run
from holdfast.convert.convert import ConvertResult, convert
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.errors import ExistsError, StorageError
from holdfast.storage.local import LocalStore

FORMS: dict[str, ConvertOptions] = {
    "dcp": ConvertOptions(to="dcp"),
    "hf": ConvertOptions(to="hf", max_shard_bytes=20_000),
    "torch": ConvertOptions(to="torch", dtype="bfloat16"),
}

KILLED = """
import os, signal, sys
from holdfast.convert.convert import convert
from holdfast.convert.plan import ConvertOptions, plan
source, target, options, left = *sys.argv[1:3], eval(sys.argv[3]), int(sys.argv[4])
def advance(_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
convert(plan(source, options), target, advance)
"""
"""Dies when so many blocks have been handed over for writing."""

LATER = ("created", "timings", "checksum")
"""What a manifest says of when it was made, and its own checksum, which covers that."""


def killed(source: Path, target: Path, options: ConvertOptions, num_blocks: int) -> None:
    """Convert in a new process, which dies by SIGKILL; the target does not exist."""
    arguments = [str(source), str(target), repr(options), str(num_blocks)]
    ran = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert ran.returncode == -9
    assert [path.name[:9] for path in target.parent.iterdir()] == [".attempt-"]


def converted(source: Path, target: Path, options: ConvertOptions) -> ConvertResult:
    return convert(plan(str(source), options), str(target))


def contents(target: Path) -> dict[str, object]:
    """Return every byte of a target, except the time and the duration of its save."""
    if target.is_file():
        return {"": target.read_bytes()}
    found: dict[str, object] = {path.name: path.read_bytes() for path in target.iterdir()}
    if "manifest.json" in found:
        said = json.loads((target / "manifest.json").read_text())
        found["manifest.json"] = {k: v for k, v in said.items() if k not in LATER}
    return found


@pytest.mark.parametrize("to", FORMS)
def test_a_second_run_continues_and_ends_with_the_same_bytes(to: str, tmp_path: Path) -> None:
    """G14. Method: SIGKILL after a random number of blocks, up to twice, for each format. The
    result equals an uninterrupted conversion byte for byte, and no byte was written twice."""
    source, options = save_folder(tmp_path / "source", LLAMA, hf_tensors(LLAMA)), FORMS[to]
    whole = converted(source, tmp_path / "whole/step-1", options)
    assert whole.kept_bytes == 0
    num_blocks = len(plan(str(source), options).outputs)
    chance = random.Random(to)
    for case in range(3):
        target = tmp_path / f"case-{case}" / "step-1"
        points = sorted(chance.sample(range(3, num_blocks), 1 + case % 2))
        for point in points:
            killed(source, target, options, point)
        done = converted(source, target, options)
        assert contents(target) == contents(tmp_path / "whole/step-1")
        assert [path.name for path in target.parent.iterdir()] == ["step-1"]
        if to == "hf":
            # Files are completed one after the other; a step this small is written at once.
            assert done.kept_bytes > 0
        assert done.kept_bytes < whole.nbytes


@pytest.mark.parametrize("to", FORMS)
def test_only_results_of_the_same_source_and_conversion_are_reused(to: str, tmp_path: Path) -> None:
    """G14. Method: after the kill, another source of the same sizes, or a conversion to another
    dtype or format at the same path. The result equals a conversion from nothing."""
    tensors, options = hf_tensors(LLAMA), FORMS[to]
    source = save_folder(tmp_path / "source", LLAMA, tensors)
    other = save_folder(tmp_path / "other", LLAMA, {n: t + 1 for n, t in tensors.items()})
    killed(source, tmp_path / "one/step-1", options, 15)
    os.rename(source, tmp_path / "gone")  # noqa: PTH104
    os.rename(other, source)  # noqa: PTH104
    converted(source, tmp_path / "one/step-1", options)
    converted(source, tmp_path / "fresh/step-1", options)
    assert contents(tmp_path / "one/step-1") == contents(tmp_path / "fresh/step-1")
    for kind, next_wishes in FORMS.items():
        target = tmp_path / kind / "step-1"
        killed(source, target, options, 15)
        converted(source, target, next_wishes)
        converted(source, tmp_path / f"{kind}-fresh/step-1", next_wishes)
        assert contents(target) == contents(tmp_path / f"{kind}-fresh/step-1")
        assert [path.name for path in target.parent.iterdir()] == ["step-1"]


def test_large_files_are_resumed_block_by_block(tmp_path: Path) -> None:
    """G14. Method: a file large enough for direct writes; most of its blocks are kept, and blocks
    damaged after the kill are written again."""
    large = {**LLAMA, "vocab_size": 200_000, "hidden_size": 64}
    source = save_folder(tmp_path / "source", large, hf_tensors(large))
    options = ConvertOptions(to="dcp")
    converted(source, tmp_path / "whole/step-1", options)
    killed(source, tmp_path / "one/step-1", options, 22)
    file = next((tmp_path / "one").glob("*/*.distcp"))
    with file.open("r+b") as opened:
        opened.seek(10_000_000)
        opened.write(b"damage")
    done = converted(source, tmp_path / "one/step-1", options)
    assert contents(tmp_path / "one/step-1") == contents(tmp_path / "whole/step-1")
    assert 20_000_000 < done.kept_bytes < done.nbytes - (4 << 20)


def test_two_conversions_to_one_place_do_not_interfere(tmp_path: Path) -> None:
    """G14. Method: a conversion during another one to the same path is refused, and the attempt of
    the other is kept."""
    source = save_folder(tmp_path / "source", LLAMA, hf_tensors(LLAMA))
    killed(source, tmp_path / "one/step-1", FORMS["hf"], 15)
    attempt = next((tmp_path / "one").iterdir())
    before = {path.name: path.read_bytes() for path in attempt.iterdir()}
    with (
        LocalStore(tmp_path / "one").hold(attempt.name) as held,
        pytest.raises(ExistsError, match="being written by another conversion"),
    ):
        assert held
        converted(source, tmp_path / "one/step-1", FORMS["hf"])
    assert {path.name: path.read_bytes() for path in attempt.iterdir()} == before


def test_an_interrupted_conversion_is_resumed_and_a_failed_one_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G14. Method: Ctrl-C, and an error, after fifteen blocks; the second run reports the bytes it
    has kept."""
    source = save_folder(tmp_path / "source", LLAMA, hf_tensors(LLAMA))
    target, options = tmp_path / "one/step-1", FORMS["hf"]
    for kind in (StorageError("the disk is gone"), KeyboardInterrupt()):
        blocks = iter(range(15))

        def advance(_: int, blocks: Iterator[int] = blocks, kind: BaseException = kind) -> None:
            if next(blocks, None) is None:
                raise kind

        with pytest.raises(type(kind)):
            convert(plan(str(source), options), str(target), advance)
        left = [path.name[:9] for path in target.parent.iterdir()]
        assert left == ([".attempt-"] if isinstance(kind, KeyboardInterrupt) else [])
    assert run([str(source), str(target), "--to", "hf", "--max-shard-size", "20KB"]) == 0
    assert "of it already" in capsys.readouterr().out
    assert [path.name for path in target.parent.iterdir()] == ["step-1"]
