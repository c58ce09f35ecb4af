"""What every request passes: an id, a bound on its body, an answer whatever happens, and one line in the log."""

import logging
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smalti.serving.access import caller_of
from smalti.serving.api_errors import ApiError, error_response, of_exception

_log = logging.getLogger(__name__)
_access_log = logging.getLogger("smalti.serving.access")

RequestObserver = Callable[[str, str, int, float], None]


class RequestFrame:
    """ASGI middleware, the outermost: gives each request an id and a line in the log `smalti.serving.access`.

    observe(method, route, status, seconds) is called for each. A line has no query, key or prompt, and the route in
    place of the path, since a path may hold what only its caller should know.
    """

    def __init__(self, app: ASGIApp, observe: RequestObserver) -> None:
        self.app, self.observe = app, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        request_id = f"req_{secrets.token_hex(16)}"
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            _log.exception("request_id=%s", request_id)
            if not status:
                await error_response(of_exception(error))(scope, receive, send_with_id)
        finally:
            seconds, route = time.perf_counter() - began, _route(scope)
            self.observe(scope["method"], route, status, seconds)
            fields = {
                "request_id": request_id,
                "tenant": caller_of(HTTPConnection(scope)).tenant,
                "method": scope["method"],
                "route": route,
                "status": status,
                "code": scope["state"].get("error_code", ""),
                "seconds": round(seconds, 4),
            }
            _access_log.info(" ".join(f"{name}={value}" for name, value in fields.items()), extra=fields)


def _route(scope: Scope) -> str:
    """The template of a request's path, as in /v1/models/{id}, so that there are few of them."""
    return str(getattr(scope.get("route"), "path", "unmatched"))


class BodyLimit:
    """ASGI middleware that refuses bodies of more bytes than a limit, by their header or as soon as they have come.

    Starlette's own answers in plain text, and has one limit for files and for JSON.
    """

    def __init__(self, app: ASGIApp, with_files: int, without_files: int) -> None:
        self.app, self.with_files, self.without_files = app, with_files, without_files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with 413."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, received = Headers(scope=scope), 0
        has_files = headers.get("content-type", "").startswith("multipart/")
        limit = self.with_files if has_files else self.without_files
        too_large = ApiError(413, f"the body has more than {limit} bytes", code="body_too_large")
        if int(headers.get("content-length", 0)) > limit:
            await error_response(too_large)(scope, receive, send)
            return

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise too_large
            return message

        await self.app(scope, receive_counted, send)
