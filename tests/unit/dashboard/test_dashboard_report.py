"""`holdfast report`: a self-contained page, for folders of any content."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from browser import CHROMIUM, QUIET
from checkpoints import copy_step, save_step
from holdfast.catalog.listing import CheckpointRow
from holdfast.cli.main import main
from holdfast.dashboard.chart import POINTS_MAX, Point, bars, dots, line
from holdfast.dashboard.history import HistoryReader
from holdfast.dashboard.page import page
from holdfast.timing import times_of

NOW = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps that was killed once, with four checkpoints, one of them damaged."""
    home = tmp_path_factory.mktemp("run")
    folder = home / "outputs/checkpoint"
    save_step(folder, 10)
    for step in (20, 30, 40):
        copy_step(folder / "step-10", step)
    (folder / "step-30/__1_0.distcp").unlink()
    (folder / ".pinned-step-10").touch()
    (folder / ".attempt-step-50-0123abcd").mkdir()
    rows = [row(step, 1000.0 + step) for step in range(1, 26)]
    rows += [row(step, 2000.0 + step) for step in range(21, 41)]
    rows[3]["saves"] = [dataclasses.asdict(times_of(3, 900, [{"write": 0.3, "commit": 9.0}]))]
    rows[25]["loads"] = [dataclasses.asdict(times_of(20, 800, [{"plan": 0.1, "read": 0.6}]))]
    rows += [{**rows[-1], "failed_saves": 2}]
    lines = [json.dumps(one) for one in rows]
    (home / "outputs/metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 41, "lo')
    return home


def row(step: int, time: float) -> dict[str, Any]:
    """Returns a line of a run that saves after each tenth step, with rank 3 the slowest."""
    seconds = [{"plan": 0.1, "write": 1.0 + (rank == 3)} for rank in range(4)]
    saves = [times_of(step - 1, 1000, seconds)] if step % 10 == 1 and step > 1 else []
    return {
        "step": step,
        "loss": 5 / step,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "time": time,
        "tokens_per_s": 100.0 + step,
        "save_blocked_s": 0.5 if step % 10 == 1 else 0.0,
        "saves": [dataclasses.asdict(times) for times in saves],
    }


class Checked(HTMLParser):
    """Fails on tags that are not closed in order; collects text, attributes and tags."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.attributes, self.tags = "", list[tuple[str, str]](), set[str]()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_the_run_and_loads_nothing(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: parse the file that the command writes: numbers of the run, every checkpoint, and no
    tag or attribute that loads or runs anything."""
    out = tmp_path / "page.html"
    assert main(["report", str(saved / "outputs/checkpoint"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    text = out.read_text()
    found = Checked(text)
    for said in ("4 checkpoints, 1 damaged, a resume takes step 40", "Throughput", "step reached"):
        assert said in found.text
    assert "`__1_0.distcp` is missing" in found.text
    assert "rank 3 was the slowest in 3 of 5" in found.text, "of 40 only its manifest has timings"
    assert "step 20: plan 0.10 s (rank 0), read 0.60 s (rank 0)" in found.text, "the resume"
    assert "step 3: removed" in found.text
    assert "1 removed since" in found.text
    assert "resumedfrom 201 time, last in 0.7 s" in found.text
    assert "saves failed2" in found.text, "two records of one step count once"
    assert "step 20: plan 0.10 s (rank 0), write 2.00 s (rank 3)" in found.text
    assert "pinned" in found.text
    assert ".attempt-step-50-0123abcd" in found.text
    assert "step 30: damaged" in found.text, "its dot in the chart of steps over time"
    assert found.tags.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert not re.search(r"(?:src|href)=|url\(|@import", text)
    for svg in re.findall(r"<svg.*?</svg>", text):
        ElementTree.fromstring(svg)


def test_the_share_of_time_blocked_by_saves_counts_only_running_time(saved: Path) -> None:
    """Method: two processes of one run, with 43 seconds between their records, 1.5 of them blocked.
    The time between the two processes does not count; steps that were done twice count once."""
    history = HistoryReader(str(saved / "outputs/checkpoint")).read()
    assert len(history.reports) == 46
    assert [report.step for report in history.current] == list(range(1, 41))
    assert history.current[20].time == 2021.0
    assert "3.5%" in page(history, NOW)
    assert "1.5 s of training" in page(history, NOW)


def test_unchanged_checkpoints_and_metrics_are_not_read_again(saved: Path, tmp_path: Path) -> None:
    """Method: read a folder twice. Rows of unchanged checkpoints are the same objects; a deleted
    file, a new mark and new lines are noticed, and half a line is not read."""
    home = shutil.copytree(saved, tmp_path / "run")
    folder, log = home / "outputs/checkpoint", home / "outputs/metrics.jsonl"
    reader = HistoryReader(str(folder))
    before = reader.read()
    (folder / "step-20/__1_0.distcp").unlink()
    (folder / ".damaged-step-40").write_text("a block")
    with log.open("a") as file:
        file.write("\n" + json.dumps(row(42, 2042.0)) + "\n" + json.dumps(row(43, 2043.0))[:40])
    after = reader.read()
    assert [r.state for r in after.rows[:4]] == ["good", "damaged", "damaged", "damaged"]
    assert after.rows[0].files is before.rows[0].files
    assert [report.step for report in after.reports[-2:]] == [40, 42]
    assert after.reports[0] is before.reports[0]
    log.write_text(json.dumps(row(1, 5.0)))
    assert [report.time for report in reader.read().reports] == [5.0], "another run's"


def test_a_folder_without_metrics_has_a_page(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: no metrics file; then a missing folder; then a target that cannot be written."""
    folder = shutil.copytree(saved / "outputs/checkpoint", tmp_path / "steps")
    assert "Throughput" not in page(HistoryReader(str(folder)).read(), NOW)
    assert main(["report", str(tmp_path / "missing")]) == 4
    assert main(["report", str(folder), "--out", str(tmp_path / "no/such/page.html")]) == 9
    assert "cannot write" in capsys.readouterr().err


NO_SAVES: list[Any] = [[{}], [1], [{"step": 1, "seconds": 1, "stages": {}}], [{"stages": []}]]
INVALID_LINES = (
    *(json.dumps({**row(3, 1003.0), "saves": saves}) for saves in NO_SAVES),
    "",
    "{",
    "[]",
    "{}",
    '{"step": "1"}',
    '{"step": 1e999}',
    "\x00",
    "[" * 100_000,
)


@pytest.mark.parametrize("line", INVALID_LINES)
def test_invalid_lines_of_metrics_are_skipped(saved: Path, tmp_path: Path, line: str) -> None:
    """Method: an invalid line between valid ones; losses of NaN are not drawn."""
    folder = shutil.copytree(saved / "outputs/checkpoint", tmp_path / "outputs/checkpoint")
    good = [json.dumps({**row(step, 1000.0 + step), "loss": math.nan}) for step in (1, 2)]
    (tmp_path / "outputs/metrics.jsonl").write_text("\n".join([good[0], line, good[1]]))
    history = HistoryReader(str(folder)).read()
    assert [report.step for report in history.reports] == [1, 2]
    assert "<h2>Loss</h2>" not in page(history, NOW)
    assert "<h2>Throughput</h2>" in page(history, NOW)


def test_markup_in_names_is_escaped(saved: Path) -> None:
    """G8. Method: markup in the path, a problem, a layout and the names of files."""
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    history = HistoryReader(str(saved / "outputs/checkpoint")).read()
    rows = [
        CheckpointRow(evil, 7, "damaged", problem=evil),
        CheckpointRow(
            "step-8", 8, "good", "full", nbytes=5, created="", layout={evil: 1}, files={evil: 3}
        ),
    ]
    made = dataclasses.replace(history, where=evil, rows=rows)
    found = Checked(page(made, NOW))
    assert found.tags.isdisjoint({"script", "img"})
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert found.text.count("<script>") >= 4


numbers = st.floats(allow_nan=True, allow_infinity=True, width=32)


@given(st.lists(st.tuples(numbers, numbers), max_size=30), st.integers(1, 40))
def test_any_numbers_make_a_chart_within_its_bounds(
    values: list[tuple[float, float]], times: int
) -> None:
    """Method: any points, also very many. Every chart is well-formed XML within its bounds, and
    draws neither NaN nor infinity."""
    points = [Point(x, y, f"<{x}>") for x, y in values] * times
    for text in (
        line(points, spell=str),
        bars(points, spell=str, spell_x=str),
        dots(points[:5], behind=points, spell=str, spell_x=str),
    ):
        if not text:
            assert not [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
            continue
        root = ElementTree.fromstring(text)
        assert sum(one.tag == "circle" for one in root.iter()) <= POINTS_MAX + 5
        across = [
            float((one.get("d") or "").split()[1].partition("H")[0]) for one in root.iter("path")
        ]
        assert (max(across), min(across)) == (156.0, 10.0), "lines at both ends of the drawing"
        for one in root.iter("circle"):
            assert 0 <= float(one.get("cx", "")) <= 440
            assert 0 <= float(one.get("cy", "")) <= 180


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False)])
def test_a_browser_shows_the_page_in_light_and_dark_and_on_a_phone(
    saved: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    """Method: a screenshot by headless Chromium: the background is light or dark, the colours of
    the charts occur, and the margins are empty."""
    out = tmp_path / "page.html"
    main(["report", str(saved / "outputs/checkpoint"), "--out", str(out)])
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    subprocess.run(
        [
            str(CHROMIUM),
            *QUIET,
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},1600",
            *scheme,
            f"--screenshot={tmp_path / 'page.png'}",
            out.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    with Image.open(tmp_path / "page.png") as image:
        picture = image.convert("RGB")
    ground = picture.getpixel((2, 2))
    assert ground == ((20, 23, 27) if dark else (246, 247, 249))
    margin = [picture.getpixel((x, y)) for x in (1, width - 2) for y in range(picture.height)]
    assert set(margin) == {ground}
    found = {colour for _, colour in picture.getcolors(1 << 24) or []}
    assert ((110, 163, 247) if dark else (37, 99, 201)) in found, "no chart is drawn"
    assert len(found) > 50
