"""From what tickets end with to the answers of the HTTP API."""

import base64
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from smalti.serving.messages import Finished, ModelCard, OutputFormat, PictureOrder, Preview
from smalti.serving.orders import told_quality
from smalti.serving.schemas import (
    CompletedEvent,
    DrawnImage,
    ImagesResponse,
    InputTokens,
    ModelObject,
    PartialImageEvent,
    PictureRequest,
    Usage,
)
from smalti.serving.service import Ticket

MEDIA_TYPES: dict[OutputFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


@dataclass(frozen=True)
class Drawing:
    """A request that was accepted: its orders and their tickets, in the same order."""

    request: PictureRequest
    orders: Sequence[PictureOrder]
    tickets: Sequence[Ticket]

    @property
    def card(self) -> ModelCard:
        """The version that draws it."""
        return self.tickets[0].card


def images_response(drawing: Drawing, finished: Sequence[Finished], to_url: Callable[[bytes], str]) -> ImagesResponse:
    """The whole answer. to_url: keeps a picture and tells where."""
    as_url = drawing.request.response_format == "url"
    data = [
        DrawnImage(url=to_url(end.image), seed=order.seed)
        if as_url
        else DrawnImage(b64_json=_base64(end.image), seed=order.seed)
        for order, end in zip(drawing.orders, finished, strict=True)
    ]
    return ImagesResponse(
        created=int(time.time()),
        model=drawing.card.key,
        data=data,
        output_format=drawing.orders[0].output_format,
        quality=told_quality(drawing.request.quality),
        size=f"{finished[0].width}x{finished[0].height}",
        usage=_usage(drawing, finished),
    )


def event_text(
    drawing: Drawing, kind: Literal["generation", "edit"]
) -> Callable[[int, Preview | Finished], tuple[str, str]]:
    """Names and data of a stream's events."""

    def text(place: int, event: Preview | Finished) -> tuple[str, str]:
        order = drawing.orders[place]
        common = dict(
            b64_json=_base64(event.image),
            created_at=int(time.time()),
            output_format=order.output_format,
            quality=told_quality(drawing.request.quality),
            image_index=place,
            seed=order.seed,
        )
        answer: PartialImageEvent | CompletedEvent
        if isinstance(event, Preview):
            height, width = order.image_size or drawing.tickets[place].card.image_size
            name = f"image_{kind}.partial_image"
            answer = PartialImageEvent.model_validate(
                common | {"type": name, "size": f"{width}x{height}", "partial_image_index": event.index}
            )
        else:
            name = f"image_{kind}.completed"
            own = {"type": name, "size": f"{event.width}x{event.height}", "model": drawing.card.key}
            answer = CompletedEvent.model_validate(common | own | {"usage": _usage(drawing, [event])})
        return name, answer.model_dump_json()

    return text


def _usage(drawing: Drawing, finished: Sequence[Finished]) -> Usage:
    order = drawing.orders[0]
    words = len((order.prompt or "").split()) + len((order.negative_prompt or "").split())
    source = 0 if order.source is None else drawing.card.tokens
    output = round(sum(end.cost for end in finished))
    return Usage(
        input_tokens=words + source,
        input_tokens_details=InputTokens(text_tokens=words, image_tokens=source),
        output_tokens=output,
        total_tokens=words + source + output,
    )


def model_object(card: ModelCard, name: str | None = None) -> ModelObject:
    """A card as /v1/models tells it. name: as it was asked for."""
    height, width = card.image_size
    return ModelObject(
        id=name or card.name,
        created=card.created,
        version=card.version,
        architecture=card.architecture,
        size=f"{width}x{height}",
        num_classes=card.num_classes,
        reads_prompts=card.reads_prompts,
        takes_pictures=card.takes_pictures,
        takes_sizes=card.takes_sizes,
        solvers=list(card.solvers),
        solver=card.solver,
        num_inference_steps=card.num_inference_steps,
        guidance_scale=card.guidance_scale,
        parameters=card.parameters,
    )


def _base64(image: bytes) -> str:
    return base64.b64encode(image).decode("ascii")
