"""From a request to orders for a model: what the model cannot draw is refused before it is queued, naming the field."""

import io
import secrets
import warnings
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from smalti.errors import unknown_name
from smalti.serving.access import Caller
from smalti.serving.api_errors import ApiError, invalid
from smalti.serving.messages import Fault, ModelCard, PictureOrder
from smalti.serving.schemas import MOST_STEPS, EditRequest, PictureRequest, Quality
from smalti.serving.service import NotReady, PictureService

_RANDOM_SEEDS = 2**32  # small enough for a JavaScript number
_IMG2IMG_STRENGTH = 0.6
_MOST_PIXELS = 4096 * 4096
_DEFAULT_COMPRESSION = 90


@dataclass(frozen=True)
class Circumstances:
    """What an order takes from elsewhere than the request's fields."""

    caller: Caller
    deadline_seconds: float | None = None
    fault: Fault | None = None


def find_card(service: PictureService, model: str | None) -> ModelCard:
    """The newest card of a request's model, or of the only one served.

    Raises ApiError: 404 for an unknown model, 400 where several are served and none is named; NotReady without any.
    """
    cards = service.cards()
    if not cards:
        raise NotReady("no model is loaded yet", 5.0)
    names = sorted({card.name for card in cards})
    if model is None:
        if len(names) > 1:
            raise invalid(f"model is missing: one of {', '.join(names)}", "model", "missing_required_parameter")
        return cards[-1]
    for card in reversed(cards):
        if model in (card.name, card.key):
            return card
    raise ApiError(404, str(unknown_name("model", model, names)), code="model_not_found", param="model")


def orders_of(request: PictureRequest, card: ModelCard, circumstances: Circumstances, max_n: int) -> list[PictureOrder]:
    """One order a picture, with seeds seed, seed + 1, ... from the request's or a random one.

    Raises ApiError for what the model cannot draw.
    """
    count = request.n or 1
    if count > max_n:
        raise invalid(f"n={count} is more than this server takes: 1 .. {max_n}", "n")
    label, prompt = _label_and_prompt(request, card)
    if request.negative_prompt and not card.reads_prompts:
        raise invalid(f"negative_prompt has no effect: {card.name} reads no prompts", "negative_prompt")
    if request.solver is not None and request.solver not in card.solvers:
        raise invalid(str(unknown_name("solver", request.solver, card.solvers)), "solver")
    seed = secrets.randbelow(_RANDOM_SEEDS) if request.seed is None else request.seed
    source, mask, strength = _editing(request, card)
    caller, compression = circumstances.caller, request.output_compression
    return [
        PictureOrder(
            seed=seed + i,
            class_label=label,
            prompt=prompt,
            negative_prompt=request.negative_prompt or None,
            solver=request.solver,
            num_inference_steps=_steps(request, card),
            guidance_scale=request.guidance_scale,
            image_size=_size(request.size or "auto", card),
            source=source,
            mask=mask,
            strength=strength,
            partial_images=(request.partial_images or 0) if request.stream else 0,
            output_format=request.output_format or "png",
            output_compression=_DEFAULT_COMPRESSION if compression is None else compression,
            tenant=caller.tenant,
            user=request.user or "",
            weight=caller.weight,
            deadline_seconds=circumstances.deadline_seconds,
            request_id=caller.request_id,
            index=i,
            fault=circumstances.fault,
        )
        for i in range(count)
    ]


def _label_and_prompt(request: PictureRequest, card: ModelCard) -> tuple[int | None, str | None]:
    if card.reads_prompts:
        if request.class_label is not None:
            raise invalid(f"class_label has no effect: {card.name} reads prompts", "class_label")
        if request.prompt is None:
            raise invalid("prompt is missing", "prompt", "missing_required_parameter")
        return None, request.prompt
    if not card.num_classes:
        if request.class_label is not None or (request.prompt or "").strip():
            param = "prompt" if request.class_label is None else "class_label"
            raise invalid(f"{param} has no effect: {card.name} is unconditional; leave it out or empty", param)
        return None, None
    known = f"0 .. {card.num_classes - 1}"
    if request.class_label is not None:
        if request.class_label >= card.num_classes:
            raise invalid(f"class_label={request.class_label} must lie in {known}", "class_label")
        return request.class_label, None
    text = (request.prompt or "").strip()
    if not text:
        message = f"{card.name} draws classes: give class_label, or a prompt that is a label's number, {known}"
        raise invalid(message, "prompt", "missing_required_parameter")
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < card.num_classes):
        raise invalid(f"prompt={text[:50]!r} is not a label's number: {card.name} draws classes {known}", "prompt")
    return int(text), None


def _steps(request: PictureRequest, card: ModelCard) -> int | None:
    """None takes the model's default."""
    if request.num_inference_steps is not None:
        return request.num_inference_steps
    match told_quality(request.quality):
        case "low":
            # Many solvers need two steps; a model of one step has no lower quality.
            return max(card.num_inference_steps // 2, min(card.num_inference_steps, 2))
        case "high":
            return min(2 * card.num_inference_steps, MOST_STEPS)
    return None


def told_quality(quality: Quality | None) -> Literal["low", "medium", "high"]:
    """A request's quality in the words of an answer."""
    match quality:
        case "low":
            return "low"
        case "high" | "hd":
            return "high"
    return "medium"


def _size(size: str, card: ModelCard) -> tuple[int, int] | None:
    """(height, width); None for the model's own."""
    if size == "auto":
        return None
    width, height = map(int, size.split("x"))
    if (height, width) == card.image_size:
        return None
    if not card.takes_sizes:
        own = f"{card.image_size[1]}x{card.image_size[0]}"
        raise invalid(f"size={size}: {card.name} draws {own} only", "size")
    return height, width


def _editing(request: PictureRequest, card: ModelCard) -> tuple[bytes | None, bytes | None, float]:
    """Source, mask and strength."""
    if not isinstance(request, EditRequest):
        return None, None, 1.0
    if not card.takes_pictures:
        raise invalid(f"image: {card.name} cannot begin from pictures", "image")
    size = check_picture(request.image, "image")
    if request.mask is not None and check_picture(request.mask, "mask") != size:
        raise invalid(f"mask must be as large as image, {size[0]}x{size[1]}", "mask")
    default = _IMG2IMG_STRENGTH if request.mask is None else 1.0
    return request.image, request.mask, default if request.strength is None else request.strength


def check_picture(file: bytes, param: str) -> tuple[int, int]:
    """(width, height) of a picture file, of which only the head is read. Raises ApiError for what is none, or huge."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(file), formats=("PNG", "JPEG", "WEBP")) as picture:
                width, height = picture.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise invalid(f"{param} is not a picture in PNG, JPEG or WebP: {type(error).__name__}", param) from None
    if width * height > _MOST_PIXELS:
        raise invalid(f"{param} has {width}x{height} pixels, allowed are {_MOST_PIXELS} in all", param)
    return width, height
