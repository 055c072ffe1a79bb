"""The page about all runs: twenty runs of all states, in a browser and without one."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import holdfast.dashboard.discovery as discovery
import holdfast.dashboard.watch as watch
from asking import ask
from browser import CHROMIUM, Browser
from fleets import (
    GOOD,
    NUM_RUNS,
    add_checkpoint,
    add_fleet,
    add_run,
    add_trainer_run,
    read_often,
    remove_run,
    served,
    wait_for,
    watched,
    write_metrics,
)
from holdfast.dashboard.condition import STATES, Condition, Limits, condition_of
from holdfast.dashboard.discovery import FoundRuns, find_runs
from holdfast.dashboard.figures import curve, figures_of
from holdfast.dashboard.history import History, HistoryReader
from holdfast.dashboard.runs_page import runs_page, short_names, sparkline
from holdfast.dashboard.watch import Fleet, WatchedFolder
from holdfast.dashboard.web import app_of
from holdfast.storage.local import LocalStore

HOUR = 3600.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read often, so that no test waits."""
    read_often(monkeypatch)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folder of twenty runs."""
    root = tmp_path / "runs"
    root.mkdir()
    add_fleet(root, time.time())
    return root


def states(fleet: Fleet, limits: Limits | None = None) -> dict[str, str]:
    """Return the state of each run by its name."""
    now = datetime.now(UTC)
    names = short_names([run.folder for run in fleet.runs.values()])
    return {
        names[run.folder]: condition_of(run, now, limits or Limits()).state
        for run in fleet.runs.values()
    }


EXPECTED = {
    **dict.fromkeys(GOOD, "good"),
    **dict.fromkeys(("trainer-mistral-lora", "vit-h-14-bf16", "scratch-run-3"), "good"),
    **dict.fromkeys(("qwen3-14b-dpo", "gemma3-12b-cpt", "toy-ablation-07"), "damaged"),
    **dict.fromkeys(("moe-64x1b-c", "t5-xl-summaries"), "stale"),
    "llama3-8b-restart": "never saved",
    "mamba2-3b": "saving",
    "llama3-1b-final": "finished",
}
"""State of each of the twenty runs."""


def test_every_state_is_told_from_the_others(root: Path) -> None:
    """Method: twenty runs below one folder. Then one is deleted, one moved, one replaced by a file
    and one added, while they are watched."""
    with watched(root) as fleet:
        assert states(fleet) == EXPECTED
        remove_run(root)
        (root / "vit-l-16-aug/checkpoint").rename(root / "moved")
        (root / "whisper-small-de").rename(root.parent / "elsewhere")
        (root / "whisper-small-de/checkpoint").mkdir(parents=True)
        (root / "whisper-small-de/checkpoint/step-500").write_text("a file")
        (root / "moe-8x7b-a").rename(root.parent / "replaced")
        (root / "moe-8x7b-a").mkdir()
        (root / "moe-8x7b-a/checkpoint").write_text("a file")
        add_run(root / "new", now=time.time(), age_s=10)
        changed = dict.fromkeys(("scratch-run-3", "vit-l-16-aug", "whisper-small-de"), "gone")
        changed |= {"moe-8x7b-a": "unreadable", "moved": "good", "new": "good"}
        wait_for(lambda: states(fleet), EXPECTED | changed)


def test_a_run_that_has_not_saved_shows_how_far_it_is(root: Path) -> None:
    """Method: metrics beside a folder with a lock and no checkpoint."""
    run = WatchedFolder(str(root / "llama3-8b-restart/checkpoint"))
    run.wait_for_first()
    run.stop()
    figures = run.latest.figures
    assert figures.newest is None
    assert figures.last is not None
    assert (figures.last.step, figures.losses[-1]) == (330, (330, 7.7))
    _, content = runs_page({0: run}, datetime.now(UTC), Limits())
    assert "reached 330" in content
    assert "never saved" in content


def test_the_age_is_compared_with_the_interval_of_the_run(tmp_path: Path) -> None:
    """Method: a run that saves every half hour, looked at later and later, with other limits."""
    now = time.time()
    run = WatchedFolder(str(add_run(tmp_path / "run", now=now, age_s=0.1, interval_s=1800)))
    run.wait_for_first()
    run.stop()
    figures = run.latest.figures
    assert figures.interval_s == pytest.approx(1800, abs=2)
    assert figures.save_rate == pytest.approx(1.3e9)
    assert figures.save_bytes == 7_100_000_000

    def state(later_s: float, limits: Limits) -> str:
        # The folder counts as read just now.
        run.latest = dataclasses.replace(run.latest, time=now + later_s)
        return condition_of(run, datetime.fromtimestamp(now + later_s, UTC), limits).state

    for later_s, limits, expected in (
        (1.5 * HOUR - 60, Limits(), "good"),
        (1.5 * HOUR + 60, Limits(), "stale"),
        (1.5 * HOUR + 60, Limits(stale_intervals=4), "good"),
        (HOUR, Limits(max_age_s=HOUR - 60), "stale"),
    ):
        assert state(later_s, limits) == expected


def test_a_folder_that_hangs_is_unreadable(tmp_path: Path) -> None:
    """Method: the clock passes, and the folder is not read again."""
    run = WatchedFolder(str(add_run(tmp_path / "run", now=time.time(), age_s=5)))
    run.wait_for_first()
    run.stop()
    condition = condition_of(run, datetime.now(UTC) + timedelta(minutes=5), Limits())
    assert condition.state == "unreadable"
    assert "the folder hangs" in condition.notes[0]


def test_a_resume_is_a_verification(tmp_path: Path) -> None:
    """Method: a run with a load of its newest step in the metrics, and one without."""
    folder = str(add_run(tmp_path / "run", now=time.time(), age_s=5))
    history = HistoryReader(folder).read()
    assert figures_of(history).checked_at is None
    load = dataclasses.replace(history.saves[-1], step=12_500)
    reports = [*history.reports, dataclasses.replace(history.reports[-1], loads=(load,))]
    again = figures_of(dataclasses.replace(history, reports=reports))
    assert again.checked_at == history.reports[-1].time


def test_transformers_checkpoints_have_losses_and_an_end(tmp_path: Path) -> None:
    """Method: sealed checkpoints of a Trainer that continues, and of one that has ended; then a
    log that is no JSON."""
    now = time.time()
    running = HistoryReader(str(add_trainer_run(tmp_path / "a", now=now))).read()
    ended = HistoryReader(str(add_trainer_run(tmp_path / "b", now=now, is_finished=True))).read()
    assert figures_of(running).losses[-1][0] == 1500
    assert [figures_of(one).is_finished for one in (running, ended)] == [False, True]
    log = add_trainer_run(tmp_path / "c", now=now) / "checkpoint-1500/trainer_state.json"
    log.write_bytes(b"{" + b" " * (log.stat().st_size - 1))
    assert figures_of(HistoryReader(str(tmp_path / "c")).read()).losses == []


def test_the_curve_follows_the_run_after_a_resume(tmp_path: Path) -> None:
    """Method: steps that occur again, losses that are not finite, and very many lines."""
    history = HistoryReader(str(add_run(tmp_path / "run", now=time.time(), age_s=5))).read()
    row = history.reports[0]

    def losses(pairs: list[tuple[int, float]]) -> list[tuple[int, float]]:
        reports = [dataclasses.replace(row, step=step, loss=loss) for step, loss in pairs]
        return [*figures_of(History("", (), reports)).losses]

    assert losses([(1, 9.0), (2, 8.0), (3, 7.0), (2, 6.0)]) == [(1, 9.0), (2, 6.0)]
    many = losses([(step, float(step)) for step in range(5000)])
    assert len(many) == 400
    assert len(curve(many, 60)) <= 60
    assert curve([(1, math.nan), (2, math.inf), (3, 2.0)], 60) == [2.0]
    assert sparkline([(1, math.nan), (2, 1.0)]) == ""
    assert "nan" not in sparkline([(1, 1.0), (2, math.nan), (3, 1.0)])


def test_runs_are_found_below_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Method: runs at several levels, hidden folders, folders within runs, links within and out of
    the folder, and too many folders."""
    now = time.time()
    for name in ("a", "b/c", "b/c/checkpoint/hf", ".hidden", "1/2/3/4/5"):
        add_checkpoint(tmp_path / "runs" / name / "checkpoint", 5, created=now)
    add_checkpoint(tmp_path / "elsewhere", 5, created=now)
    (tmp_path / "runs/out").symlink_to(tmp_path / "elsewhere")
    found = find_runs(str(tmp_path / "runs"))
    assert found.is_complete
    assert [*found.folders] == [f"{tmp_path}/runs/{name}/checkpoint" for name in ("a", "b/c")]
    assert find_runs(str(tmp_path / "runs/a")).folders == [f"{tmp_path}/runs/a/checkpoint"]
    assert find_runs(str(tmp_path / "none")).folders == []
    monkeypatch.setattr(discovery, "FOLDERS_MAX", 3)
    assert not find_runs(str(tmp_path / "runs")).is_complete
    with watched(tmp_path / "runs") as fleet:
        page = ask(app_of(fleet, {"localhost"}, Limits(), None), "/").body
    assert "Only a part of" in page


def test_numbers_of_runs_stay(tmp_path: Path) -> None:
    """Method: a folder that does not exist yet, then holds runs; a folder given twice."""
    now = time.time()
    single = add_run(tmp_path / "single", now=now, age_s=5)
    with watched(tmp_path / "later", single, single) as fleet:
        assert states(fleet) == {"later": "never saved", "single": "good"}
        assert not fleet.is_single
        # Appears whole: a search in the middle would number the folder above the run.
        add_run(tmp_path / "made/x", now=now, age_s=5)
        (tmp_path / "made").rename(tmp_path / "later")
        # 0 becomes a folder above runs. 2 is the same as 1.
        wait_for(lambda: [*fleet.runs], [1, 3])
        assert fleet.runs[3].folder == f"{tmp_path}/later/x/checkpoint"


@pytest.mark.parametrize("late", [0, 1])
def test_numbers_do_not_depend_on_which_search_ends_first(
    late: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: a folder above runs, one of its runs, and that again. One search waits for the
    other."""
    run = str(add_run(tmp_path / "run", now=time.time(), age_s=5))
    given = [str(tmp_path), run, run]
    ended = threading.Event()

    def ordered(path: str) -> FoundRuns:
        if path == given[late]:
            ended.wait(0.5)
        else:
            ended.set()
        return find_runs(path)

    monkeypatch.setattr(watch, "find_runs", ordered)
    with watched(*given) as fleet:
        wait_for(lambda: {number: run.folder for number, run in fleet.runs.items()}, {1: run})


def test_a_search_that_ends_after_the_stop_watches_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: a search that hangs until the fleet has stopped, as on a mount that is away."""
    add_run(tmp_path / "run", now=time.time(), age_s=5)
    may_end, others = threading.Event(), set(threading.enumerate())

    def late(path: str) -> FoundRuns:
        may_end.wait()
        return find_runs(path)

    monkeypatch.setattr(watch, "find_runs", late)
    monkeypatch.setattr(watch, "FIRST_READ_S", 0.1)
    fleet = Fleet([str(tmp_path)])
    searches = [t for t in set(threading.enumerate()) - others if t.name == "holdfast-search"]
    fleet.stop()
    may_end.set()
    for search in searches:
        search.join(30)
    wait_for(lambda: set(threading.enumerate()) - others, set())


def test_a_request_reads_no_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Method: once all runs are read, every operation of the store fails. All paths still answer,
    and ten requests for the table make it once."""
    others = set(threading.enumerate())
    with watched(root) as fleet:
        app = app_of(fleet, {"localhost"}, Limits(), None)
    wait_for(
        lambda: [t for t in set(threading.enumerate()) - others if t.name.startswith("holdfast-")],
        [],
    )
    made = []

    def counted(*given: object, **named: object) -> tuple[str, str]:
        made.append(given)
        return runs_page(*given, **named)  # type: ignore[arg-type]

    def failing(*_: object) -> object:
        raise AssertionError("a request reads")

    monkeypatch.setattr("holdfast.dashboard.web.runs_page", counted)
    monkeypatch.setattr("holdfast.dashboard.web.PAGE_S", 60.0)
    for name in ("read", "open", "list", "size", "stamp"):
        monkeypatch.setattr(LocalStore, name, failing)
    for _ in range(10):
        assert ask(app, "/").body.count("<tr id=") == NUM_RUNS
    assert len(made) == 1
    for path in ("/runs/1", "/api/runs", "/api/runs/1", "/metrics"):
        assert ask(app, path).status == 200


def test_an_unchanged_run_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: count how often the figures are computed while a folder is read many times."""
    computed = []

    def counted(history: History) -> object:
        # Threads of earlier tests may still read their folders.
        if str(tmp_path) in history.where:
            computed.append(history)
        return figures_of(history)

    monkeypatch.setattr(watch, "figures_of", counted)
    folder = add_run(tmp_path / "run", now=time.time(), age_s=5)
    run = WatchedFolder(str(folder))
    run.wait_for_first()
    first = run.latest.time
    wait_for(lambda: run.latest.time > first + 0.5, True)
    assert len(computed) == 1
    add_checkpoint(folder, 20_000, created=time.time())
    wait_for(lambda: len(computed), 2)
    run.stop()


def test_an_error_of_one_run_does_not_break_the_page(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: errors that nobody expects: from the figures of one run, and from the row of
    another."""

    def failing(history: History) -> object:
        if "moe-8x7b-a" in history.where:
            raise ZeroDivisionError("an error of the test")
        return figures_of(history)

    def failing_row(run: WatchedFolder, now: datetime, limits: Limits) -> Condition:
        if "moe-8x7b-b" in run.folder:
            raise RuntimeError("another error")
        return condition_of(run, now, limits)

    monkeypatch.setattr(watch, "figures_of", failing)
    with watched(root) as fleet:
        assert states(fleet) == EXPECTED | {"moe-8x7b-a": "unreadable"}
        for module in ("runs_page", "digest"):
            monkeypatch.setattr(f"holdfast.dashboard.{module}.condition_of", failing_row)
        app = app_of(fleet, {"localhost"}, Limits(), None)
        page, metrics = ask(app, "/").body, ask(app, "/metrics").body
    assert page.count("<tr id=") == NUM_RUNS
    assert page.count('class="is-unreadable"') == 2
    assert "ZeroDivisionError: an error of the test" in page
    assert "RuntimeError: another error" in page
    assert metrics.count("holdfast_up{") == NUM_RUNS


ODD: tuple[object, ...] = (
    0,
    -1,
    1 << 63,
    10**400,
    math.nan,
    math.inf,
    -math.inf,
    1e308,
    5e-324,
    True,
    None,
    "1",
    [],
)
"""Values of a log that no run writes."""


def test_a_log_with_any_values_is_shown(tmp_path: Path) -> None:
    """Method: each field of a line, of a save and of a stage gets each odd value. Every path
    answers, with a number for each metric."""
    now = time.time()
    folder = add_run(tmp_path / "odd", now=now, age_s=5)
    add_run(tmp_path / "good", now=now, age_s=5)
    lines = (folder.parent / "metrics.jsonl").read_text().splitlines()
    whole = json.loads(next(line for line in reversed(lines) if '"saves"' in line))
    (save,) = whole["saves"]
    stage = save["stages"]["write"]
    odd = [whole | {key: value} for key in whole for value in ODD]
    odd += [whole | {"saves": [save | {key: value}]} for key in save for value in ODD]
    for value in ODD:
        for key in stage:
            stages = {"write": stage | {key: value}, "\ud800": stage}
            odd.append(whole | {"saves": [save | {"stages": stages}]})
    write_metrics(folder.parent, [json.loads(line) for line in lines] + odd)
    with watched(tmp_path) as fleet:
        assert states(fleet) == {"odd": "good", "good": "good"}
        app = app_of(fleet, {"localhost"}, Limits(), None)
        for path in ("/", "/runs/1", "/runs/2", "/api/runs", "/api/runs/1", "/api/runs/2"):
            assert ask(app, path).status == 200
        text = ask(app, "/metrics").body
    found = [sample for one in text_string_to_metric_families(text) for sample in one.samples]
    assert {sample.labels["folder"] for sample in found} == {
        f"{tmp_path}/{name}/checkpoint" for name in ("odd", "good")
    }


def test_metrics_have_the_figures_of_the_table(root: Path) -> None:
    """Method: read the metrics of twenty runs by the parser of the client library."""
    with watched(root) as fleet:
        text = ask(app_of(fleet, {"localhost"}, Limits(), None), "/metrics").body
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = Path(sample.labels["folder"]).parent.name
            found[name, f"{sample.name}{sample.labels.get('state', '')}"] = sample.value
    for state in STATES:
        is_so = float(state == "stale")
        assert found["moe-64x1b-c", f"holdfast_run_state{state}"] == is_so
    assert found["moe-64x1b-c", "holdfast_save_interval_seconds"] == pytest.approx(1800, abs=2)
    assert found["moe-64x1b-c", "holdfast_save_rate_bytes_per_second"] == pytest.approx(1.3e9)
    assert 0 < found["moe-64x1b-c", "holdfast_save_blocked_ratio"] < 0.01
    assert math.isnan(found["vit-h-14-bf16", "holdfast_loss"])


SHOWN = "[...document.querySelectorAll('.runs tbody tr')]"
NAMES = f"{SHOWN}.map(row => row.querySelector('a').innerText)"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_sorts_and_updates_the_table(root: Path, tmp_path: Path) -> None:
    """Method: a wall screen shows all runs at once, the worst first. A click sorts without a
    reload. When a run vanishes and another saves, the table shows it and keeps order and place. A
    laptop, a tablet, a phone and dark colours follow."""
    with served(root) as url, Browser(tmp_path / "profile") as browser:
        browser.appear(1920, 1080)
        browser.open(url)
        browser.wait_for("whisper-small-de")
        assert browser.run(f"{SHOWN}.length") == NUM_RUNS
        assert browser.run(NAMES)[0] == "gemma3-12b-cpt"
        assert browser.run("document.documentElement.scrollHeight") <= 1080
        assert browser.run("document.querySelectorAll('.curve').length") == NUM_RUNS
        assert browser.run("getComputedStyle(document.querySelector('.chip')).backgroundColor") == (
            "rgb(192, 43, 43)"
        ), "damaged is red"
        browser.picture(tmp_path / "wall.png")
        _check_order(browser)
        for width in (1280, 768):
            browser.appear(width)
            assert browser.run("document.documentElement.scrollWidth") == width
        browser.appear(390, 844, dark=True)
        browser.run("window.opened = 'once'; scrollTo(0, 1500)")
        remove_run(root)
        add_checkpoint(root / "moe-64x1b-c/checkpoint", 20_000, created=time.time())
        assert "20,000" in browser.wait_for("gone")
        assert browser.run("[window.opened, scrollY]") == ["once", 1500]
        assert browser.run("location.hash") == "#age:descending"
        assert browser.run("document.documentElement.scrollWidth") == 390
        browser.picture(tmp_path / "phone.png")
        browser.run(f"{SHOWN}[0].querySelector('a').click()")
        browser.wait_for("Checkpoints")
        browser.wait_for("All runs")
    with Image.open(tmp_path / "phone.png") as image:
        assert image.convert("RGB").getpixel((2, 2)) == (20, 23, 27)


def _check_order(browser: Browser) -> None:
    """Click on a heading three times: descending, ascending, the worst first."""
    button = "document.querySelector('th.age button').click()"
    browser.run(button)
    oldest = browser.run(NAMES)
    assert oldest[:3] == ["llama3-1b-final", "t5-xl-summaries", "moe-64x1b-c"]
    assert {*oldest[-2:]} == {"llama3-8b-restart", "toy-ablation-07"}, "without an age: last"
    browser.run(button)
    assert browser.run(NAMES)[:18] == oldest[17::-1]
    browser.run(button)
    assert browser.run(NAMES)[0] == "gemma3-12b-cpt"
    browser.run(button)
