"""The benchmark of object stores, with a small state and moto's server."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from benchmarks import objects, s3_server
from benchmarks.object_systems import SYSTEMS
from benchmarks.states import small_tensors


def test_the_benchmark_of_object_stores_starts_a_server_and_writes_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: one round of a small state, in this process, of the systems that need obstore alone.
    The page has both targets and a row for each system."""
    for name in (*s3_server.environment(0), "HOLDFAST_BENCH_BUCKET"):
        monkeypatch.setenv(name, "")  # Restored afterwards.
        monkeypatch.delenv(name)
    monkeypatch.setattr("shutil.which", lambda _: None)  # Without SeaweedFS.
    monkeypatch.setattr(objects, "silence_warnings", lambda: None)
    monkeypatch.setattr(objects, "llama_like", lambda _: small_tensors(300))
    monkeypatch.setattr(objects, "measure_in_child", lambda work, *arguments: work(*arguments))
    few = {name: SYSTEMS[name] for name in (objects.PLAIN, objects.OURS)}
    monkeypatch.setattr(objects, "SYSTEMS", few)
    options = ["--gb", "0.001", "--rounds", "1", "--folder", str(tmp_path / "server")]
    monkeypatch.setattr(sys, "argv", ["objects", *options, "--out", str(tmp_path / "out")])
    objects.main()
    page = (tmp_path / "out/objects.md").read_text()
    for wanted in ("| Saves: against the plain transfer |", "| Loads: extra memory |", "moto"):
        assert wanted in page
    assert page.count("\n| holdfast |") == page.count("\n| plain obstore |") == 2
