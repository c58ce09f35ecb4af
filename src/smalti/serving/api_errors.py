"""What goes wrong, in OpenAI's words: one error object, its status, and whether asking again can help."""

import difflib
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from smalti.errors import UserError
from smalti.serving.messages import Failed, FailureCode
from smalti.serving.service import QueueFull, Unavailable

_log = logging.getLogger(__name__)
_LONGEST_MESSAGE = 1000
# What exactly went wrong may tell of other requests and of the machine: it is for the log.
_OUR_MISTAKE = "the server made a mistake; its log tells which"
_CLIENT_GONE = 499  # nginx's number for a client that closed the connection

# Failures of a picture: the status, and after how many seconds the same request may fare better (None: never).
_FAILURES: dict[FailureCode, tuple[int, float | None]] = {
    "invalid_request": (400, None),
    "cancelled": (_CLIENT_GONE, None),
    "deadline_exceeded": (504, None),
    "not_finite": (500, None),
    "out_of_memory": (503, 5.0),
    "quarantined": (500, None),
    "worker_lost": (503, 2.0),
    "shutting_down": (503, 5.0),
    "internal_error": (500, None),
}


class ApiError(HTTPException):
    """An answer that is an error. retry_after: seconds after which to ask again; None where that cannot help.

    param: the field at fault. code: what programs go by.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message, self.code, self.param, self.retry_after = message, code, param, retry_after

    def body(self) -> dict[str, Any]:
        """{"error": {...}} as OpenAI's clients read it."""
        message, param = sendable(self.message, _LONGEST_MESSAGE), self.param and sendable(self.param, 100)
        return {"error": {"message": message, "type": error_type(self.status_code), "param": param, "code": self.code}}


def sendable(text: str, longest: int) -> str:
    """A caller's text, cut, and without halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= longest else f"{text[:longest]} ..."


def error_type(status: int) -> str:
    """OpenAI's class of an error."""
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


class ErrorResponse(Response):
    """An error object, whose code the log tells."""

    def __init__(self, error: ApiError, headers: Mapping[str, str]) -> None:
        super().__init__(json.dumps(error.body()), error.status_code, headers, "application/json")
        self.code = error.code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        scope.setdefault("state", {})["error_code"] = self.code
        await super().__call__(scope, receive, send)


def error_response(error: ApiError) -> Response:
    """The answer, with its x-should-retry and retry-after headers."""
    headers = dict(error.headers or {}) | {"x-should-retry": "false" if error.retry_after is None else "true"}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(math.ceil(error.retry_after), 1))
    return ErrorResponse(error, headers)


def invalid(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    """A 400 for a field."""
    return ApiError(400, message, code=code, param=param)


def of_failure(failed: Failed) -> ApiError:
    """What a picture's failure answers a request with."""
    status, retry_after = _FAILURES[failed.code]
    message = failed.message
    if failed.code == "internal_error":
        _log.error("picture %d: %s", failed.number, message)
        message = _OUR_MISTAKE
    return ApiError(status, message, code=failed.code, param=failed.param, retry_after=retry_after)


def of_unavailable(error: Unavailable) -> ApiError:
    """429 for a full queue, 503 for a server that starts or ends."""
    status = 429 if isinstance(error, QueueFull) else 503
    return ApiError(status, str(error), code=error.code, retry_after=error.retry_after)


def of_user_error(error: UserError) -> ApiError:
    """400; a message of the house begins with its field, as in "n=11 must lie in 1 .. 10"."""
    named = re.match(r"(?:unknown )?([a-z_]+)(?:=|:| ')", str(error))
    return invalid(str(error), named[1] if named else None)


def of_status(status: int, headers: Mapping[str, str] | None = None, detail: str = "") -> ApiError:
    """The error of an HTTP status that routing and parsing give."""
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else f"status {status}"
    code = phrase.lower().replace(" ", "_").replace("-", "_")
    return ApiError(status, detail or phrase, code=code, headers=headers)


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 for the first field that pydantic refuses, saying how many more there are."""
    first = errors[0]
    kind, context = first["type"], first.get("ctx", {})
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = context.get("field") or ".".join(place) or None
    others = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if kind == "json_invalid":
        return invalid(f"the body is not JSON: {context.get('error')} at character {place[-1]}", None, "invalid_json")
    if "field" in context:
        return invalid(first["msg"] + others, param, kind)
    if param is None:
        return invalid("the body must be a JSON object, sent with content-type: application/json", None, "invalid_body")
    if kind == "missing":
        return invalid(f"{param} is missing{others}", param, "missing_required_parameter")
    given = f"{param}={first['input']!r}"
    given = given if len(given) <= 100 else f"{given[:100]}..."
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return invalid(f"{given}: {message}{others}", param)


def near_names(name: str, known: Iterable[str]) -> str:
    """Which names are near and what exists, for a field that does not."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return (f"did you mean {' or '.join(near)}? " if near else "") + f"known: {', '.join(known)}"


def of_exception(error: Exception) -> ApiError:
    """The answer to any exception of an endpoint."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return of_validation(error.errors())
        case Unavailable():
            return of_unavailable(error)
        case UserError():
            return of_user_error(error)
        case StarletteHTTPException():
            return of_status(error.status_code, error.headers, error.detail)
    # No retry: what a program got wrong once it gets wrong again.
    return ApiError(500, _OUR_MISTAKE, code="internal_error")


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of the app's endpoints with OpenAI's error object."""

    async def answer(request: Request, error: Exception) -> Response:
        return error_response(of_exception(error))

    for kind in (ApiError, RequestValidationError, StarletteHTTPException, Unavailable, UserError):
        app.add_exception_handler(kind, answer)
