"""`holdfast serve` beyond loopback: the token."""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp

from asking import ask
from holdfast.cli.main import main
from holdfast.cli.serve import ServeArguments, token_of
from holdfast.dashboard.condition import Limits
from holdfast.dashboard.watch import Fleet
from holdfast.dashboard.web import app_of
from holdfast.errors import UsageError

TOKEN = "correct-horse-battery"
PATHS = (
    "/",
    "/runs",
    "/runs/0",
    "/api/runs",
    "/api/runs/0",
    "/metrics",
    "/healthz",
    "/runs.js",
    "/live.js",
    "/none",
)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> ASGIApp:
    folder = str(tmp_path_factory.mktemp("runs") / "secret-name")
    return app_of(Fleet([folder]), {"localhost"}, Limits(), TOKEN)


WRONG: tuple[dict[str, str], ...] = (
    {},
    {"authorization": "Bearer"},
    {"authorization": f"Basic {TOKEN}"},
    {"authorization": f"Bearer {TOKEN}x"},
    {"authorization": f"Bearer {TOKEN[:-1]}"},
    {"authorization": "Bearer \xff\xfe"},
    {"cookie": TOKEN},
    {"cookie": f"holdfast={TOKEN}"},
)


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_read_without_the_token(app: ASGIApp, path: str) -> None:
    """G8. Method: every path, without a token and with wrong ones, in the header, the cookie and
    the address; then with the right one."""
    for headers in WRONG:
        answer = ask(app, path, **headers)
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "secret-name" not in answer.body
    for query in ("token=", f"token={TOKEN}x", f"token={TOKEN}&token={TOKEN}", f"Token={TOKEN}"):
        assert ask(app, f"{path}?{query}").status == 401
    status = ask(app, path, authorization=f"Bearer {TOKEN}").status
    assert status == {"/none": 404, "/healthz": 503}.get(path, 200)


def test_a_browser_gets_a_cookie_for_the_token_in_the_address(app: ASGIApp) -> None:
    """Method: a browser without the token gets a form; its address leads to the same path without
    the token, with a cookie that no script can read and other sites cannot use."""
    asked = ask(app, "/runs", accept="text/html,*/*")
    assert asked.status == 401
    assert 'name="token"' in asked.body
    assert "form-action 'self'" in asked.headers["content-security-policy"]
    answer = ask(app, f"/runs?a=1&token={TOKEN}")
    assert (answer.status, answer.headers["location"]) == (303, "/runs?a=1")
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=lax", "Path=/"} <= {*cookie.split("; ")}
    assert TOKEN not in cookie
    pair = cookie.partition(";")[0]
    assert ask(app, "/runs", cookie=f"other=1; {pair}").status == 200
    assert ask(app, "/runs", cookie=pair[:-1]).status == 401
    assert ask(app, "/runs", host="evil.example", cookie=pair).status == 421


@pytest.mark.parametrize("path", ["//evil.example/", "/\\evil.example", "/\r\nX: y"])
def test_the_way_to_the_cookie_leads_to_no_other_site(app: ASGIApp, path: str) -> None:
    """Method: paths that browsers take for another host, and a line break."""
    target = ask(app, f"{path}?token={TOKEN}").headers["location"]
    assert target.startswith("/")
    assert target[1] not in "/\\"
    assert "\n" not in target


def test_tokens_are_compared_in_constant_time(
    app: ASGIApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: count the calls of `hmac.compare_digest`."""
    compared = []
    original = hmac.compare_digest

    def counting(one: Any, other: Any) -> bool:
        compared.append((one, other))
        return original(one, other)

    monkeypatch.setattr("holdfast.dashboard.access.hmac.compare_digest", counting)
    ask(app, "/", authorization="Bearer guess")
    ask(app, "/?token=guess")
    assert compared == [(b"guess", TOKEN.encode())] * 2


def test_a_token_is_asked_for_beyond_loopback() -> None:
    """Method: addresses of this machine and of others, `--open`, the environment variable, and
    contradictions."""

    def token(host: str, *, is_open: bool = False, **environment: str) -> str | None:
        options = ServeArguments(folders=("runs",), host=host, open=is_open)
        return token_of(options, environment)

    for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost"):
        assert token(host) is None
    for host in ("0.0.0.0", "::", "192.168.1.2", "node-1", "localhost.example"):
        made = token(host)
        assert made is not None
        assert len(made) == 32
        assert made != token(host)
        assert token(host, is_open=True) is None
    assert token("127.0.0.1", HOLDFAST_SERVE_TOKEN=TOKEN) == TOKEN
    with pytest.raises(UsageError, match="at least 16"):
        token("0.0.0.0", HOLDFAST_SERVE_TOKEN="short")
    with pytest.raises(UsageError, match="--open"):
        token("0.0.0.0", is_open=True, HOLDFAST_SERVE_TOKEN=TOKEN)


def test_a_contradiction_is_an_error_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: a token that is too short, in the environment."""
    monkeypatch.setenv("HOLDFAST_SERVE_TOKEN", "short")
    assert main(["serve", str(tmp_path)]) == 2
    assert "hint: openssl rand" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--stale-intervals", "0"]) == 2
