"""The OpenAPI document: what FastAPI makes of the endpoints, with every error that can come in place of its own 422."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from smalti.serving.answers import MEDIA_TYPES
from smalti.serving.schemas import CompletedEvent, EditRequest, ErrorBody, PartialImageEvent

_REF = "#/components/schemas/{model}"
_TEXT = {"schema": {"type": "string"}}
_BINARY = {"schema": {"type": "string", "format": "binary"}}

_EVENT_MODELS = (PartialImageEvent, CompletedEvent, ErrorBody)
# An event of a stream, as OpenAPI 3.2, section 4.14.4, writes it.
_EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"type": "string"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"anyOf": [{"$ref": _REF.format(model=model.__name__)} for model in _EVENT_MODELS]},
        },
    },
}

_ERRORS = {
    "400": "The request is wrong; `param` names the field.",
    "401": "The API key is missing or unknown.",
    "403": "A page of another host may not ask.",
    "404": "There is no such thing.",
    "413": "The body is too large.",
    "429": "The queue is full, or the key's rate is used up.",
    "499": "The pictures were cancelled, as when the client closes the connection.",
    "500": "A mistake of the server's, or a picture that came out as NaN.",
    "503": "No worker is ready, or the server shuts down.",
    "504": "The pictures were not done by the deadline.",
}
_EVERYWHERE = ("400", "500")
_IN_API = ("400", "401", "403", "404", "413", "429", "500", "503")

Answers = dict[int | str, dict[str, Any]]

DRAWING_ANSWERS: Answers = {
    200: {
        "description": "The pictures. With `stream` they come as server-sent events instead: previews, then pictures, "
        "each event named by its data's `type`; or `error`, with an error object.",
        "content": {"text/event-stream": {"itemSchema": _EVENT}},
    },
    **{status: {"description": _ERRORS[str(status)], "model": ErrorBody} for status in (499, 504)},
}
FILE_ANSWERS: Answers = {
    200: {"description": "The picture.", "content": {media_type: _BINARY for media_type in MEDIA_TYPES.values()}}
}
METRICS_ANSWERS: Answers = {200: {"description": "Prometheus's text format.", "content": {"text/plain": _TEXT}}}
NOT_READY_ANSWERS: Answers = {503: {"description": _ERRORS["503"], "model": ErrorBody}}


def edit_body() -> dict[str, Any]:
    """The form of POST /v1/images/edits: EditRequest's fields, of which a form can leave out but not send null."""
    schema = EditRequest.model_json_schema(ref_template=_REF)
    for field in schema["properties"].values():
        _without_null(field)
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def _without_null(schema: dict[str, Any]) -> None:
    """Forms, headers and queries have no null: what is optional there is left out."""
    others = [option for option in schema.get("anyOf", []) if option != {"type": "null"}]
    if len(others) == 1:
        del schema["anyOf"]
        schema |= others[0]
    if schema.get("default", 0) is None:
        del schema["default"]


def install_openapi(app: FastAPI, *, keys: bool) -> None:
    """Make the app's document tell all answers. keys: whether it says that an API key is needed."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            app.openapi_schema = _completed(made, keys)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _completed(document: dict[str, Any], keys: bool) -> dict[str, Any]:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    models = [(model, "serialization") for model in _EVENT_MODELS]
    schemas |= models_json_schema(models, ref_template=_REF)[1]["$defs"]  # type: ignore[arg-type]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        in_api = path.startswith("/v1/")
        for operation in operations.values():
            for parameter in operation.get("parameters", []):
                _without_null(parameter["schema"])
            answers = operation["responses"]
            answers.pop("422", None)
            for status in _IN_API if in_api else _EVERYWHERE:
                answers.setdefault(status, _error(status))
            for status, answer in answers.items():
                answer["headers"] = _headers(status) | answer.get("headers", {})
            if keys and in_api and not path.startswith("/v1/files/"):
                operation["security"] = [{"key": []}]
    return document


def _error(status: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": _REF.format(model=ErrorBody.__name__)}}}
    return {"description": _ERRORS[status], "content": content}


def _headers(status: str) -> dict[str, Any]:
    told = {
        "x-request-id": {
            "required": True,
            "description": "Names this request in the log.",
            "schema": {"type": "string"},
        }
    }
    if status >= "400":
        retry = {"type": "string", "enum": ["true", "false"]}
        told["x-should-retry"] = {"required": True, "description": "Whether asking again may help.", "schema": retry}
    if status in ("429", "503"):
        seconds = {"type": "integer", "minimum": 1}
        told["retry-after"] = {"required": True, "description": "Seconds until then.", "schema": seconds}
    return told
