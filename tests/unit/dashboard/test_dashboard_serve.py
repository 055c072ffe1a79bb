"""`holdfast serve`: answers, refusals, and survival of bad clients and bad folders."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from browser import CHROMIUM, Browser
from checkpoints import copy_step, save_step
from holdfast.cli.main import main
from runs import kill_all, start

SCRIPT = "import sys\nfrom holdfast.cli.main import main\n"
END = "status = main()\nassert 'torch' not in sys.modules\nsys.exit(status)"


@dataclass(frozen=True, slots=True)
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    port: int

    def get(self, path: str, **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers
        finally:
            connection.close()

    def json(self, path: str) -> Any:
        return json.loads(self.get(path)[1])

    def wait_for(self, path: str, status: int, *, timeout_s: float = 30) -> Any:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = self.get(path)
            if found[0] == status:
                return json.loads(found[1])
            time.sleep(0.05)
        raise TimeoutError(f"{path} does not answer {status}: {found}")

    def raw(self, request: bytes) -> bytes:
        """Send a request with `Connection: close`; returns the answer."""
        request = request.removesuffix(b"\r\n") + b"Connection: close\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as client:
            try:
                client.sendall(request)
                return b"".join(iter(lambda: client.recv(1 << 16), b""))
            except ConnectionError:
                return b""  # The server closed before all was sent.


@contextmanager
def serving(*arguments: str | Path, setting: str = "") -> Iterator[Server]:
    words = [sys.executable, "-c", f"{SCRIPT}{setting}\n{END}", "serve", "--port", "0"]
    process = subprocess.Popen(
        [*words, *map(str, arguments)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        said = process.stdout.readline()
        assert said.startswith("serving"), process.stderr.read()
        yield Server(process, int(said.rpartition(":")[2]))
    finally:
        process.kill()
        process.wait(20)
        process.stdout.close()
        process.stderr.close()


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three checkpoints, one of them damaged, beside a secret."""
    home = tmp_path_factory.mktemp("home")
    folder = save_step(home / "outputs/checkpoint", 10).parent
    for step in (20, 30):
        copy_step(folder / "step-10", step)
    (folder / "step-30/__1_0.distcp").unlink()
    (home / "secret").write_text("hidden from all")
    return folder


@pytest.fixture(scope="module")
def served(steps: Path) -> Iterator[Server]:
    with serving(steps, steps.parent / "none", "--max-age", "3600") as server:
        yield server


def test_the_server_answers_with_page_json_and_health(served: Server, steps: Path) -> None:
    """Method: every path of the server; two folders, one of them missing."""
    status, page, headers = served.get("/runs/0")
    assert status == 200
    assert b"3 checkpoints, 1 damaged, a resume takes step 20" in page
    assert served.get("/runs/0", **{"If-None-Match": headers["ETag"]})[:2] == (304, b"")
    assert b"a resume takes step 20" in served.get("/")[1]
    first, second = served.json("/api/runs")["runs"]
    assert (first["resume"], first["damaged"], first["problem"]) == (20, 1, None)
    assert "nothing at" in second["problem"]
    whole = served.json("/api/runs/0")
    assert [row["step"] for row in whole["checkpoints"]] == [10, 20, 30]
    assert whole["saves"][0]["stages"]["write"]["slowest"] in (0, 1)
    status, health, _ = served.get("/healthz")
    assert (status, [*json.loads(health)["problems"]]) == (503, [str(steps.parent / "none")])


def test_metrics_follow_the_conventions_of_prometheus(tmp_path: Path) -> None:
    """Method: a run of three steps with one failed save, read by the parser of the client library:
    units and `_total` at the end of names, help texts, values."""
    folder = save_step(tmp_path / "outputs/checkpoint", 2).parent
    stage = {"least": 0.5, "median": 1.0, "most": 2.0, "slowest": 1}
    save = {"step": 2, "nbytes": 100, "seconds": 2.5, "stages": {"write": stage}}
    row = {"loss": 1.0, "tokens_per_s": 9.0, "save_blocked_s": 0.0}
    rows: list[dict[str, Any]] = [{**row, "step": step, "time": 100.0 + step} for step in (1, 2, 3)]
    rows[2] |= {"saves": [save], "failed_saves": 1, "save_blocked_s": 0.25}
    log = folder.parent / "metrics.jsonl"
    log.write_text("".join(json.dumps(one) + "\n" for one in rows))
    with serving(folder, "--max-age", "1000") as server:
        assert server.get("/healthz")[0] == 200
        _, text, headers = server.get("/metrics")
        assert headers["Content-Type"].startswith("text/plain; version=")
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        assert family.documentation
        for sample in family.samples:
            assert sample.labels["folder"] == str(folder)
            assert sample.name.endswith("_total") == (family.type == "counter")
            found[sample.name.removeprefix("holdfast_")] = sample.value
    assert found["newest_good_step"] == 2
    assert 0 <= found["newest_good_age_seconds"] < 600
    assert (found["saves_total"], found["failed_saves_total"]) == (1, 1)
    assert (found["saved_bytes_total"], found["save_seconds_total"]) == (100, 2.5)
    assert (found["save_blocked_seconds_total"], found["save_stage_seconds_total"]) == (0.25, 2.0)
    assert found["checkpoint_bytes"] > 2e6


def test_a_run_is_unhealthy_if_its_newest_checkpoint_is_too_old(steps: Path) -> None:
    """Method: with `--max-age` of a millisecond, and without."""
    with serving(steps, "--max-age", "0.001") as server:
        status, said, _ = server.get("/healthz")
        assert status == 503
        assert "the limit is" in json.loads(said)["problems"][str(steps)]
    with serving(steps) as server:
        assert server.get("/healthz")[0] == 200


PATHS = (
    "/../secret",
    "/%2e%2e/secret",
    "/%2e%2e%2fsecret",
    "/..%5csecret",
    "/runs/../../secret",
    "/runs/0/../../../secret",
    "/runs/0%2f..%2f..%2fsecret",
    "/%252e%252e%252fsecret",
    "/..%c0%afsecret",
    "//secret",
    "/runs/%00",
    "/runs/-1",
    "/runs/0x0",
    "/runs/9" + "9" * 5000,
    "/runs/step-10/manifest.json",
    "/static/..%2f..%2fsecret",
    "http://evil.example/secret",
)


@pytest.mark.parametrize("path", PATHS)
def test_no_request_names_a_path(served: Server, path: str) -> None:
    """G8. Method: path traversal in every spelling, sent unchanged."""
    said = served.raw(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert said.split(b" ")[1] in (b"404", b"400", b"421")
    assert b"hidden" not in said


REQUESTS = (
    *(f"{m} / HTTP/1.1\r\nHost: localhost\r\n\r\n" for m in ("POST", "DELETE", "OPTIONS", "X")),
    "TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: 127.0.0.1.evil.example:80\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    "GET / HTTP/1.0\r\n\r\n",
    "GET / HTTP/1.1\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: localhost\r\nX: " + "y" * 2_000_000 + "\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: localhost\r\n" + "X: y\r\n" * 300_000 + "\r\n",
    "GET /" + "a" * 2_000_000 + " HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "\x16\x03\x01\x00\xa5\x01\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
    "CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example\r\n\r\n",
)


@pytest.mark.parametrize("request_", REQUESTS, ids=range(len(REQUESTS)))
def test_other_methods_hosts_and_malformed_requests_are_refused(
    served: Server, request_: str
) -> None:
    """G8. Method: other methods, other hosts, endless headers, and no HTTP at all. The server
    writes no traceback, and answers the next request."""
    said = served.raw(request_.encode("latin-1"))
    assert not said or said.split(b" ")[1] in (b"400", b"404", b"405", b"421")
    assert b"Traceback" not in said
    assert served.get("/api/runs")[0] == 200


def test_headers_forbid_browsers_to_load_anything_from_elsewhere(served: Server) -> None:
    """Method: the headers of a page, an error and the metrics."""
    for path in ("/", "/none", "/metrics"):
        headers = served.get(path)[2]
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Access-Control-Allow-Origin"] is None
        assert headers["Server"] is None


def test_slow_clients_are_dropped(steps: Path) -> None:
    """Method: many clients send half a request. Others are answered at once; the oldest slow
    clients lose their connections, and in time all do."""
    setting = "import holdfast.dashboard.web as web\nweb.IDLE_S, web.CONNECTIONS_MAX = 3.0, 20"
    with serving(steps, setting=setting) as server, ExitStack() as stack:
        clients = []
        for _ in range(40):
            client = socket.create_connection(("127.0.0.1", server.port), timeout=20)
            clients.append(stack.enter_context(client))
            client.sendall(b"GET / HTTP/1.1\r\nHost: localh")
        started = time.monotonic()
        assert server.get("/healthz")[0] == 200
        assert time.monotonic() - started < 2
        for client in clients:
            with pytest.raises(ConnectionError):
                assert client.recv(1) == b""
                raise ConnectionResetError
        assert server.get("/healthz")[0] == 200


def test_names_in_a_folder_are_escaped_and_its_links_are_not_followed(
    steps: Path, tmp_path: Path
) -> None:
    """G8. Method: markup in the names of a folder and an attempt, names that are no valid UTF-8,
    and links to a secret in place of a mark, metrics, a checkpoint and a data file."""
    secret = steps.parent.parent / "secret"
    folder = shutil.copytree(steps, tmp_path / "<script>alert(1)</script>/checkpoint")
    (folder / ".attempt-<img src=x onerror=alert(1)>-0123abcd").mkdir()
    (folder / os.fsdecode(b".attempt-\xff\xfe-0123abcd")).mkdir()
    (folder / ".damaged-step-10").symlink_to(secret)
    (folder.parent / "metrics.jsonl").symlink_to(secret)
    (folder / "step-40").symlink_to(secret.parent)
    (folder / "step-20/__1_0.distcp").unlink()
    (folder / "step-20/__1_0.distcp").symlink_to(secret)
    with serving(folder) as server:
        for path in ("/", "/runs/0", "/api/runs", "/api/runs/0", "/metrics", "/healthz"):
            status, said, _ = server.get(path)
            assert status == (503 if path == "/healthz" else 200), said
            assert b"hidden" not in said
            assert b"<script>alert" not in said or path.startswith(("/api", "/metrics", "/healthz"))
            assert b"<img" not in said or path.startswith("/api")
        rows = server.json("/api/runs/0")["checkpoints"]
    assert "a link to elsewhere" in rows[0]["problem"]
    assert "a link to a place outside" in rows[1]["problem"]
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0


def test_a_folder_that_fails_and_recovers_stops_no_other(steps: Path, tmp_path: Path) -> None:
    """Method: the folder is moved away, replaced by a file, and moved back; the other folder is
    served all the time."""
    folder = shutil.copytree(steps, tmp_path / "checkpoint")
    setting = "import holdfast.dashboard.watch as watch\nwatch.READ_S = 0.05"
    with serving(folder, steps, setting=setting) as server:
        assert server.get("/healthz")[0] == 200
        folder.rename(tmp_path / "away")
        assert "nothing at" in server.wait_for("/healthz", 503)["problems"][str(folder)]
        folder.write_text("a file")
        assert server.get("/runs/0")[0] == 200
        assert b"a resume takes step 20" in server.get("/runs/1")[1]
        folder.unlink()
        (tmp_path / "away").rename(folder)
        server.wait_for("/healthz", 200)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_server_ends_with_a_last_line(steps: Path, number: signal.Signals) -> None:
    """Method: send a signal while a client holds a connection open. The server listens beyond this
    machine: with the token that it prints, and once with `--open`."""
    is_open = number is signal.SIGTERM
    options = ["--host", "0.0.0.0"]
    if is_open:
        options.append("--open")
    with (
        serving(steps, *options) as server,
        socket.create_connection(("127.0.0.1", server.port)),
    ):
        assert server.process.stdout is not None
        token = "" if is_open else server.process.stdout.readline().strip().rpartition("=")[2]
        assert server.get("/")[0] == (200 if is_open else 401)
        assert server.get("/", Authorization=f"Bearer {token}")[0] == 200
        server.process.send_signal(number)
        said, wrong = server.process.communicate(timeout=20)
    assert (server.process.returncode, wrong) == (0, "")
    assert said == f"stopped by {number.name}: 2 requests answered\n"


def test_wrong_arguments_and_missing_packages_are_errors(
    steps: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: no folder, a URL of no bucket, an invalid port and one in use, an invalid age, a
    missing package."""
    folder = str(steps)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, status in (
            ([], 2),
            (["memory://bucket/run"], 2),
            ([folder, "--port", "70000"], 2),
            ([folder, "--max-age", "nan"], 2),
            ([folder, "--host", "192.0.2.1"], 9),
            ([folder, "--port", port], 5),
        ):
            assert main(["serve", *arguments]) == status
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "holdfast.dashboard.web", raising=False)
    assert main(["serve", folder]) == 2
    said = capsys.readouterr().err
    for line in ("needs a folder", "is a URL", "pip install 'holdfast[serve]'", "--port 0 takes"):
        assert line in said


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_an_open_page_shows_new_saves_and_new_damage(tmp_path: Path) -> None:
    """Method: open a page before the first checkpoint; a real run of two ranks saves, then a file
    is deleted. The page shows both without being loaded again."""
    folder = tmp_path / "outputs/checkpoint"
    with serving(folder) as server, Browser(tmp_path / "profile", width=390, dark=True) as browser:
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.wait_for("nothing at")
        browser.run("window.opened = 'once'")
        run = start("--training.steps", "20", "--checkpoint.interval", "10", ranks=2, cwd=tmp_path)
        try:
            browser.wait_for("a resume takes step 10")
            shown = browser.wait_for("a resume takes step 20")
        finally:
            kill_all(run)
        assert "Blocked by each save" in shown
        (folder / "step-20/__1_0.distcp").unlink()
        assert "a resume takes step 10" in browser.wait_for("`__1_0.distcp` is missing")
        assert browser.run("window.opened") == "once"
        assert browser.run("document.documentElement.scrollWidth") == 390
        browser.picture(tmp_path / "page.png")
        server.process.kill()
        browser.run("document.querySelector('h1').id = 'asked'")
        deadline = time.monotonic() + 20
        while not browser.run("document.body.classList.contains('lost')"):
            assert time.monotonic() < deadline, "the page does not say that the server is gone"
            time.sleep(0.1)
    with Image.open(tmp_path / "page.png") as image:
        picture = image.convert("RGB")
    assert picture.getpixel((2, 2)) == (20, 23, 27)
    assert (110, 163, 247) in {colour for _, colour in picture.getcolors(1 << 24) or []}
