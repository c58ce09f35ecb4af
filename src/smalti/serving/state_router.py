"""GET /v1/state: the service at this moment as JSON, and the way back. It is what `smalti top` reads."""

from typing import TYPE_CHECKING

import msgspec

from smalti.serving.service import PictureService, ServiceState

if TYPE_CHECKING:
    from fastapi import APIRouter


def state_router(service: PictureService) -> "APIRouter":
    """The route, to be mounted by create_app(routers=...)."""
    from fastapi import APIRouter
    from starlette.responses import Response

    router = APIRouter(prefix="/v1", tags=["state"])

    # The schema in the OpenAPI document is open: msgspec, not pydantic, writes the answer.
    @router.get("/state", response_model=dict)
    async def state() -> Response:
        """The server's workers, queue and throughput."""
        return Response(msgspec.json.encode(service.state()), media_type="application/json")

    return router


def read_state(body: bytes) -> ServiceState:
    """The state of an answer's body. Raises ValueError where it is none."""
    return msgspec.json.decode(body, type=ServiceState)
