"""Who may ask: API keys, whose share of the server a key takes, rates, and which pages may make a browser ask.

Keys are held as SHA-256 digests and compared in constant time; neither a key nor a prompt is ever logged from here.
"""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from smalti.errors import UserError
from smalti.serving.api_errors import ApiError, error_response

KEYS_VARIABLE = "SMALTI_API_KEYS"
_SHORTEST_KEY = 16
# Pictures that were asked for as URLs are fetched by browsers, which send no key: their ids cannot be guessed.
_OPEN_PATHS = ("/livez", "/readyz", "/metrics", "/openapi.json", "/docs", "/v1/files/")


@dataclass(frozen=True)
class ApiKey:
    """A key's digest, and whose it is. weight: of the tenant's share of the server."""

    tenant: str
    digest: bytes = field(repr=False)
    weight: float = 1.0


@dataclass(frozen=True)
class Caller:
    """Who asks, as the other parts see it. tenant: "" on a server without keys."""

    tenant: str = ""
    weight: float = 1.0
    request_id: str = ""


def caller_of(request: HTTPConnection) -> Caller:
    """Who sent this request; request_id is the one in the answer's x-request-id header."""
    state = request.scope.get("state", {})
    key: ApiKey | None = state.get("api_key")
    request_id = str(state.get("request_id", ""))
    return Caller(request_id=request_id) if key is None else Caller(key.tenant, key.weight, request_id)


def digest(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def parse_keys(text: str, source: str) -> tuple[ApiKey, ...]:
    """Keys from lines of KEY TENANT [WEIGHT]; # begins a comment. source: what messages call the text.

    Raises UserError naming the line, never the key.
    """
    keys: list[ApiKey] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{source}, line {number}"
        if len(words) not in (2, 3):
            raise UserError(f"{where}: has {len(words)} words, needed are KEY TENANT [WEIGHT]")
        if len(words[0]) < _SHORTEST_KEY:
            raise UserError(f"{where}: the key has {len(words[0])} characters, needed are at least {_SHORTEST_KEY}")
        key = ApiKey(words[1], digest(words[0]), _weight(words[2:], where))
        if any(key.digest == other.digest for other in keys):
            raise UserError(f"{where}: the key is there twice")
        keys.append(key)
    return tuple(keys)


def _weight(words: Sequence[str], where: str) -> float:
    try:
        weight = float(words[0]) if words else 1.0
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(f"{where}: weight={words[0]} must be a number above 0")
    return weight


def read_keys(path: str | Path | None, environment: Mapping[str, str]) -> tuple[ApiKey, ...]:
    """The keys of a file, or else of the variable SMALTI_API_KEYS (lines, or ; between them); () without both.

    Raises UserError for a file that cannot be read, holds no key or a wrong line.
    """
    if path is None:
        return parse_keys(environment.get(KEYS_VARIABLE, "").replace(";", "\n"), KEYS_VARIABLE)
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"keys file {path} cannot be read: {error}") from None
    keys = parse_keys(text, f"keys file {path}")
    if not keys:
        raise UserError(f"keys file {path} holds no key: write lines of KEY TENANT [WEIGHT]")
    return keys


def find_key(given: str, keys: Sequence[ApiKey]) -> ApiKey | None:
    """The key that was given, or None; the time taken does not depend on which, or on how much of one is right."""
    asked, found = digest(given), None
    for key in keys:
        if hmac.compare_digest(asked, key.digest):
            found = key
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address or name."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class RateLimits:
    """Requests that may be sent with a key in a moving window, such as "60/minute"."""

    def __init__(self, rate: str) -> None:
        self.rate = checked_rate(rate)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    async def seconds_to_wait(self, key: ApiKey | None) -> float:
        """0 where a request with this key may pass, which counts it; else when the next one may."""
        name = "" if key is None else key.digest.hex()
        if await self._limiter.hit(self.rate, name):
            return 0.0
        window = await self._limiter.get_window_stats(self.rate, name)
        return max(window.reset_time - time.time(), 0.001)


def checked_rate(rate: str) -> RateLimitItem:
    """A rate as `limits` reads it. Raises UserError."""
    try:
        return parse(rate)
    except ValueError:
        raise UserError(f'rate_limit={rate!r} is not a rate: write one such as "60/minute" or "5/second"') from None


class Gate:
    """ASGI middleware that lets through who may ask; puts the caller's key into the request's state.

    keys: none = all may ask. hosts: names under which the server answers, () = any. origins: pages of other hosts that
    may make a browser ask.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[ApiKey] = (),
        limits: RateLimits | None = None,
        hosts: Sequence[str] = (),
        origins: Sequence[str] = (),
    ) -> None:
        self.app, self.keys, self.limits, self.hosts, self.origins = app, keys, limits, hosts, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with 400, 401, 403 or 429."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        try:
            await self._check(scope)
        except ApiError as error:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await error_response(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def _check(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        self._check_host(headers)
        changes = scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if changes:
            self._check_origin(headers)
        key = None
        if self.keys and not any(path == p or (p.endswith("/") and path.startswith(p)) for p in _OPEN_PATHS):
            key = self._key(headers, browsers=not path.startswith("/v1/"))
            scope.setdefault("state", {})["api_key"] = key
        if self.limits is not None and changes and path.startswith("/v1/"):
            wait = await self.limits.seconds_to_wait(key)
            if wait:
                message = f"more than {self.limits.rate} requests: ask again in {math.ceil(wait)} s"
                raise ApiError(429, message, code="rate_limit_exceeded", retry_after=wait)

    def _check_host(self, headers: Headers) -> None:
        # A page can give its own name this machine's address (DNS rebinding): the name it asks for gives it away.
        if self.hosts and urlsplit("//" + headers.get("host", "")).hostname not in self.hosts:
            raise ApiError(400, "the Host header names another server than this one", param="host", code="wrong_host")

    def _check_origin(self, headers: Headers) -> None:
        # Browsers let any page send forms to this machine, and tell whose page it was.
        origin = headers.get("origin")
        if origin is None or origin in self.origins or "*" in self.origins:
            return
        if urlsplit(origin).netloc != headers.get("host"):
            message = "pages of other hosts may not ask: name them in cors_origins"
            raise ApiError(403, message, param="origin", code="wrong_origin")

    def _key(self, headers: Headers, *, browsers: bool) -> ApiKey:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = None
        if scheme.lower() == "bearer":
            key = find_key(given.strip(), self.keys)
        elif scheme.lower() == "basic" and browsers:
            key = find_key(_password(given), self.keys)
        if key is not None:
            return key
        if scheme:
            message = "this API key is not known here"
        else:
            message = "no API key was given: send the header Authorization: Bearer KEY"
        challenge = 'Basic realm="smalti: any name, an API key as password"' if browsers else "Bearer"
        raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": challenge})


def _password(basic: str) -> str:
    try:
        return base64.b64decode(basic, validate=True).decode("utf-8", "surrogateescape").partition(":")[2]
    except binascii.Error:
        return ""
