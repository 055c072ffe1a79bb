"""The page of results says which targets are met, and leaves no result out."""

from __future__ import annotations

import subprocess
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from benchmarks.disk import cool_cache, resident_share, warm_cache
from benchmarks.meter import Figure, run_rounds
from benchmarks.peers import unchecked
from benchmarks.report import write_report
from benchmarks.results import Section, save_section
from benchmarks.targets import TARGETS

import holdfast


def section(name: str, **seconds: list[float]) -> Section:
    """Section of systems that took these seconds in each round."""
    figures: dict[str, list[Figure]] = {
        system: [{"seconds": s, "cpu_s": s, "extra_mib": 0.0, "read_mb": 0.0} for s in taken]
        for system, taken in seconds.items()
    }
    return Section(name, name, "Invented.", figures, {"nbytes": 1.0}, "no machine")


def rows(page: Path) -> dict[str, list[str]]:
    """Rows of the summary, by figure."""
    lines = (page / "README.md").read_text().splitlines()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    return {figure: rest for figure, *rest in cells if len(rest) == 3}


def test_a_target_is_met_by_the_median_of_the_ratios_round_by_round(tmp_path: Path) -> None:
    """Method: everything is slow in one of three rounds; its ratios equal those of the others."""
    found = section("saving", raw=[1.0, 3.0, 1.0], holdfast=[1.05, 3.3, 1.05], dcp=[2.0, 6.0, 2.0])
    save_section(found, tmp_path, add=False)
    write_report(tmp_path)
    summary = rows(tmp_path)
    met = {figure: cells[2] for figure, cells in summary.items()}
    assert met["save, 1 process: against a raw write"] == "met"
    assert met["save, 1 process: faster than `dcp.save`"] == "**missed**"
    assert "1.05 (1.05 to 1.10)" in summary["save, 1 process: against a raw write"][1]
    assert met["save, 1 process: faster than torch_checkpointing"] == "-"
    assert len(summary) == len(TARGETS) + 1, "every figure, and the head"


def test_the_best_of_several_is_what_counts(tmp_path: Path) -> None:
    """Method: a raw read past the page cache that is faster than one through it."""
    found = section("cold", **{"holdfast": [1.0], "raw": [2.0], "raw, direct": [0.5]})
    save_section(found, tmp_path, add=False)
    write_report(tmp_path)
    assert rows(tmp_path)["load, cold, 1 process: against a raw read"][1:] == [
        "2.00 (2.00 to 2.00) times (raw, direct)",
        "**missed**",
    ]


def test_rounds_are_added_to_those_of_the_same_machine_alone(tmp_path: Path) -> None:
    """Method: the same section twice, then one of another machine."""
    save_section(section("listing", raw=[1.0]), tmp_path, add=False)
    save_section(section("listing", raw=[2.0, 3.0]), tmp_path, add=True)
    write_report(tmp_path)
    assert "Rounds: 3." in (tmp_path / "README.md").read_text()
    other = Section("listing", "listing", "", {"raw": []}, {"nbytes": 1.0}, "another")
    with pytest.raises(AssertionError):
        save_section(other, tmp_path, add=True)


def test_plots_are_xml_and_as_long_as_their_values(tmp_path: Path) -> None:
    """Method: widths of the bars of a drawn section."""
    save_section(section("cold", raw=[1.0], holdfast=[2.0]), tmp_path, add=False)
    write_report(tmp_path)
    drawn = (
        ET.parse(tmp_path / "cold-seconds.svg").getroot().iter("{http://www.w3.org/2000/svg}rect")
    )
    first, second = (float(bar.attrib["width"]) for bar in drawn)
    assert second == pytest.approx(2 * first, rel=0.01)


def test_no_system_always_runs_after_the_same_other_one() -> None:
    """Method: the predecessor of each system in ten rounds of three systems."""
    order: list[str] = []

    def run(name: str) -> Figure:
        order.append(name)
        return {}

    counted = run_rounds({n: lambda n=n: run(n) for n in "abc"}, 10)  # type: ignore[misc]
    assert [len(figures) for figures in counted.values()] == [10] * 3
    before = set(pairwise(order))
    assert {(a, b) for a in "abc" for b in "abc" if a != b} <= before


def test_a_cold_load_has_no_page_in_the_cache_and_a_warm_load_has_all(tmp_path: Path) -> None:
    """Method: `mincore` on files of a disk, since those of a tmpfs are always in memory."""
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    warm_cache(tmp_path)
    assert resident_share(tmp_path) == 1
    if "tmpfs" not in subprocess.check_output(["stat", "-f", "-c", "%T", tmp_path], text=True):
        cool_cache(tmp_path)
        assert resident_share(tmp_path) == 0
        warm_cache(tmp_path)
        assert resident_share(tmp_path) == 1


def test_unchecked_neither_computes_nor_verifies_checksums(tmp_path: Path) -> None:
    """Method: a load that verifies refuses a checkpoint saved without checksums; a load that does
    not verify accepts a flipped bit."""
    state, target = {"w": torch.ones(1 << 18)}, {"w": torch.zeros(1 << 18)}
    with unchecked():
        holdfast.save(tmp_path / "step", state)
        holdfast.load(tmp_path / "step", target)
    assert torch.equal(state["w"], target["w"])
    with pytest.raises(holdfast.DamagedError):
        holdfast.load(tmp_path / "step", target)
