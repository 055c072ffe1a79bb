"""Decide which requests may read from the server, by host name, method and token."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Collection, Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, quote, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from holdfast.dashboard.page import framed

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action {forms}; frame-ancestors 'none'"
)

HEADERS = {
    "Content-Security-Policy": POLICY.format(forms="'none'"),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}

ASKING = (
    "<h1>This server asks for a token</h1>"
    "<p>It is in the output of <code>holdfast serve</code>.</p>"
    '<form method="get"><p><input type="password" name="token" autocomplete="current-password" '
    'aria-label="Token" required autofocus> <button>Open</button></p></form>'
)
"""Page for browsers without the token."""


class Guard:
    """Middleware that checks host name, method and token of requests, and adds headers to answers.

    The check of the host name prevents DNS rebinding, in which the web page of an attacker lets its
    own host name resolve to this machine, and then reads the answers.

    Programs send the token as `Authorization: Bearer TOKEN`. A browser that opens `?token=TOKEN`
    gets a cookie, and is redirected to the same path without the token.
    """

    def __init__(self, app: ASGIApp, names: Collection[str], token: str | None) -> None:
        """`names`: host names of this server. `token`: None if requests need no token."""
        self._app, self._names = app, names
        self._token = None if token is None else token.encode()
        # A browser sends a cookie to all ports of a host. The name depends on the token, so that
        # two servers on one host do not replace each other's cookies.
        self._cookie = "" if token is None else _derived(token, "cookie value")
        self._cookie_name = "" if token is None else f"holdfast-{_derived(token, 'name')[:8]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        app = self._refusal(scope) or self._app
        await app(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        """Return the answer to a request that may not reach the application; None if it may."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not is_own(host, self._names):
            text = f"not a name of this server: {host[:200]}\n--allow-host NAME admits one\n"
            return PlainTextResponse(text, status_code=421)
        if scope["method"] not in ("GET", "HEAD"):
            allowed = {"Allow": "GET, HEAD"}
            return PlainTextResponse("this server only reads\n", status_code=405, headers=allowed)
        return None if self._token is None else self._without_token(scope, headers)

    def _without_token(self, scope: Scope, headers: Mapping[str, str]) -> Response | None:
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_token(credentials.strip()):
            return None
        if self._has_cookie(headers.get("cookie", "")):
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in query if name == "token"]
        if len(given) == 1 and self._is_token(given[0]):
            return self._with_cookie(scope["path"], [q for q in query if q[0] != "token"])
        if "text/html" not in headers.get("accept", ""):
            text = "the token is missing or wrong: send `Authorization: Bearer TOKEN`\n"
            answer: Response = PlainTextResponse(text, status_code=401)
        else:
            answer = Response(framed("Holdfast", ASKING), 401, media_type="text/html")
            answer.headers["Content-Security-Policy"] = POLICY.format(forms="'self'")
        answer.headers["WWW-Authenticate"] = "Bearer"
        return answer

    def _with_cookie(self, path: str, query: list[tuple[str, str]]) -> Response:
        """Return an answer that sets the cookie and sends the browser to `path`."""
        # Browsers would take a path such as `//name` or `/\name` for the name of another host.
        target = "/" + quote(path.lstrip("/")) + (f"?{urlencode(query)}" if query else "")
        answer = Response(status_code=303, headers={"Location": target})
        answer.set_cookie(self._cookie_name, self._cookie, httponly=True, samesite="lax")
        return answer

    def _is_token(self, text: str) -> bool:
        assert self._token is not None
        return hmac.compare_digest(text.encode(errors="replace"), self._token)

    def _has_cookie(self, text: str) -> bool:
        try:
            found = SimpleCookie(text).get(self._cookie_name)
        except CookieError:
            return False
        return found is not None and hmac.compare_digest(
            found.value.encode(errors="replace"), self._cookie.encode()
        )


def _derived(token: str, purpose: str) -> str:
    return hmac.new(token.encode(), purpose.encode(), "sha256").hexdigest()


def is_own(host: str, names: Collection[str]) -> bool:
    """Whether the `Host` of a request is one of these names, or an IP address.

    An IP address is safe, since DNS rebinding needs a name.

    >>> [is_own(host, {"localhost"}) for host in ("127.0.0.1:8420", "[::1]", "evil.example")]
    [True, True, False]
    """
    name, colon, port = host.rpartition(":")
    if not colon or not port.isdecimal() or (":" in name and not name.endswith("]")):
        name = host
    name = name.removeprefix("[").removesuffix("]").lower().rstrip(".")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in names
    return True
