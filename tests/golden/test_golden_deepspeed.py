"""Checkpoints of DeepSpeed's ZeRO, written once by `write_by_deepspeed.py`, are joined."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import holdfast
from holdfast.catalog.verify import VerifyTarget, verify
from holdfast.convert.convert import convert
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.errors import FormatError, NotFoundError
from holdfast.storage.local import LocalStore

HERE = Path(__file__).parent
ZERO = sorted(path.name for path in HERE.glob("zero-*"))


def copied(name: str, folder: Path) -> Path:
    """Copy a checkpoint without the whole tensors, which would be read in its place."""
    shutil.copytree(HERE / name, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_every_stage_is_included() -> None:
    assert ZERO == ["zero-1", "zero-2", "zero-3"]


@pytest.mark.parametrize("name", ZERO)
def test_zero_is_joined_as_deepspeed_does(name: str, tmp_path: Path) -> None:
    """G10. Method: the folder of the run, of two ranks, against the tensors that `zero_to_fp32.py`
    joins: parameters, buffers, shared and frozen parameters. The checkpoint verifies."""
    source = copied(name, tmp_path / "run")
    planned = plan(str(source), ConvertOptions(to="dcp"))
    convert(planned, str(tmp_path / "step-0"))
    checkpoint, expected = (
        holdfast.open(tmp_path / "step-0"),
        load_file(HERE / name / "fp32.safetensors"),
    )
    assert {*checkpoint.tensors} == {*expected}
    for tensor, whole in expected.items():
        assert torch.equal(checkpoint.read(tensor), whole), tensor
    report = verify(VerifyTarget(LocalStore(tmp_path), "run"))
    assert (report.format, report.good) == ("zero", True)
    assert any("float32 copies" in note for note in planned.notes)


@pytest.mark.parametrize("name", ZERO)
def test_zero_without_the_files_of_a_rank_is_refused(name: str, tmp_path: Path) -> None:
    """G8. Method: without one rank's part; with the parts of a rank of tensor parallelism; with a
    `latest` that names another folder."""
    source = copied(name, tmp_path / "run")
    part = source / "global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    part.rename(part.with_name("zero_pp_rank_0_mp_rank_01_optim_states.pt"))
    with pytest.raises(FormatError, match="tensor or pipeline parallelism") as refused:
        plan(str(source), ConvertOptions(to="dcp"))
    assert "ds_to_universal" in str(refused.value.hint)
    part.with_name("zero_pp_rank_0_mp_rank_01_optim_states.pt").unlink()
    with pytest.raises(FormatError, match="2 ranks wrote it, files of 1 are there"):
        plan(str(source), ConvertOptions(to="dcp"))
    (source / "latest").write_text("global_step9")
    with pytest.raises(NotFoundError, match="names `global_step9`, which is not in it"):
        plan(str(source), ConvertOptions(to="dcp"))
