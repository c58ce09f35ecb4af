"""What HTTP requests and answers hold, with bounds and examples: the OpenAPI document is made of these."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from smalti.serving.api_errors import near_names, sendable
from smalti.serving.messages import OutputFormat
from smalti.serving.server_settings import LARGEST_N

LARGEST_SEED = 2**63 - 1
MOST_STEPS = 1000
LONGEST_PROMPT = 4000

Quality = Literal["auto", "low", "medium", "high", "standard", "hd"]


def _whole(value: Any) -> Any:
    """JSON has no integers: 8.0 is 8, as JSON Schema says."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_WHOLE = BeforeValidator(_whole)
_Prompt = Annotated[str, Field(max_length=LONGEST_PROMPT)]
_Ignored = "Accepted as OpenAI's clients send it; has no effect."


class StrictRequest(BaseModel):
    """A request in which a field that does not exist is an error naming the near ones."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _only_known_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            for name in data:
                if name not in known:
                    field = sendable(str(name), 100)
                    message = "unknown field {field}: {hint}"
                    context = {"field": field, "hint": near_names(field, known)}
                    raise PydanticCustomError("unknown_parameter", message, context)
        return data


class PictureRequest(StrictRequest):
    """What generations and edits have in common; null takes the default."""

    model: Annotated[
        str | None,
        Field(
            max_length=200, description="A served model's name, or name@version; may be left out where one is served."
        ),
    ] = None
    prompt: Annotated[
        _Prompt | None,
        Field(description='What to draw, in words; for a model of classes a label\'s number, as in "7".'),
    ] = None
    negative_prompt: Annotated[
        _Prompt | None, Field(description="What to move away from, for a model that reads prompts.")
    ] = None
    class_label: Annotated[
        int | None,
        Field(ge=0, le=2**31 - 1, description="The class, for a model of classes; wins over the prompt."),
        _WHOLE,
    ] = None
    n: Annotated[
        int | None, Field(ge=1, le=LARGEST_N, description="Pictures to draw; picture i takes seed + i."), _WHOLE
    ] = 1
    size: Annotated[
        str | None,
        Field(
            pattern=r"^(auto|[1-9][0-9]{0,3}x[1-9][0-9]{0,3})$",
            description="Width x height in pixels; auto is the model's own.",
        ),
    ] = "auto"
    quality: Annotated[
        Quality | None,
        Field(
            description="Steps where num_inference_steps is not given: auto, medium and standard take the "
            "model's default, low half of it, high and hd twice."
        ),
    ] = "auto"
    seed: Annotated[
        int | None,
        Field(ge=0, le=LARGEST_SEED, description="The same seed draws the same picture; a random one where left out."),
        _WHOLE,
    ] = None
    num_inference_steps: Annotated[
        int | None, Field(ge=1, le=MOST_STEPS, description="Steps of the solver."), _WHOLE
    ] = None
    guidance_scale: Annotated[
        float | None,
        Field(ge=0, le=100, allow_inf_nan=False, description="1 is off; higher follows prompt or label more."),
    ] = None
    solver: Annotated[
        str | None, Field(max_length=50, description="One of the model's solvers, which GET /v1/models lists.")
    ] = None
    output_format: OutputFormat | None = "png"
    output_compression: Annotated[int | None, Field(ge=0, le=100, description="Quality of JPEG and WebP."), _WHOLE] = (
        None
    )
    response_format: Annotated[
        Literal["b64_json", "url"] | None,
        Field(description="The picture in the answer, or a URL that serves it for a while; streams have b64_json."),
    ] = "b64_json"
    stream: Annotated[
        bool | None, Field(description="Answer with server-sent events: previews and pictures as they come.")
    ] = False
    partial_images: Annotated[int | None, Field(ge=0, le=3, description="Previews a picture, in a stream."), _WHOLE] = (
        None
    )
    background: Annotated[
        Literal["auto", "opaque", "transparent"] | None, Field(description="Accepted; pictures are opaque.")
    ] = None
    moderation: Annotated[Literal["auto", "low"] | None, Field(description=_Ignored)] = None
    user: Annotated[
        str | None, Field(max_length=1000, description="Whose requests stay with one arm, where a model has several.")
    ] = None
    safety_identifier: Annotated[str | None, Field(max_length=1000, description=_Ignored)] = None

    @model_validator(mode="after")
    def _seeds_exist(self) -> Self:
        if self.seed is not None and self.seed + (self.n or 1) - 1 > LARGEST_SEED:
            context = {"field": "seed", "largest": LARGEST_SEED}
            raise PydanticCustomError("invalid_value", "seed + n - 1 must be at most {largest}", context)
        return self


class GenerationRequest(PictureRequest):
    """Pictures from a prompt or a class: OpenAI's request with a solver's fields beside it."""

    style: Annotated[Literal["vivid", "natural"] | None, Field(description=_Ignored)] = None

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "7"},
                {"class_label": 3, "n": 4, "seed": 11, "num_inference_steps": 20, "guidance_scale": 2.0},
                {"prompt": "7", "stream": True, "partial_images": 2, "output_format": "webp"},
            ]
        }
    )


class EditRequest(PictureRequest):
    """A picture from another one: redrawn as a whole (strength), or where a mask says so."""

    model_config = ConfigDict(strict=False)  # the fields of a form are text

    image: Annotated[bytes, Field(description="The picture to begin from: PNG, JPEG or WebP, as large as the model's.")]
    mask: Annotated[
        bytes | None, Field(description="A PNG as large as the picture; where it is transparent, or white, is painted.")
    ] = None
    strength: Annotated[
        float | None,
        Field(
            gt=0,
            le=1,
            allow_inf_nan=False,
            description="How much of the way from noise to take: 1 forgets the picture. Default 0.6; 1 with a mask.",
        ),
    ] = None
    input_fidelity: Annotated[Literal["high", "low"] | None, Field(description=_Ignored)] = None


class ErrorDetail(BaseModel):
    """What went wrong. code: for programs. param: the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {
                        "message": "n=1000000: should be less than or equal to 10",
                        "type": "invalid_request_error",
                        "param": "n",
                        "code": "invalid_value",
                    }
                }
            ]
        }
    )


class InputTokens(BaseModel):
    """What was read."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """What the request took. text_tokens: words of the prompt. image_tokens: of the picture that an edit begins from.

    output_tokens: tokens that the network computed: rows x tokens x calls, so that guidance and steps count.
    """

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    total_tokens: int


class DrawnImage(BaseModel):
    """One picture. seed: with it and the same fields the same picture can be asked for again."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class ImagesResponse(BaseModel):
    """The pictures. model: the version that drew them."""

    created: int
    model: str
    data: list[DrawnImage]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    quality: Literal["low", "medium", "high"]
    size: str
    usage: Usage


class _StreamEvent(BaseModel):
    b64_json: str
    created_at: int
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    quality: Literal["low", "medium", "high"]
    size: str
    image_index: int = Field(description="Which of the n pictures.")
    seed: int


class PartialImageEvent(_StreamEvent):
    """A preview of a picture on its way."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    partial_image_index: int


class CompletedEvent(_StreamEvent):
    """A picture that is done."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    model: str
    usage: Usage


class ModelObject(BaseModel):
    """A served model: OpenAI's fields, then what it is and takes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "smalti"
    version: str = Field(description="Of its weights; id@version pins a request to them.")
    architecture: str
    size: str = Field(description="Width x height of its pictures.")
    num_classes: int
    reads_prompts: bool
    takes_pictures: bool = Field(description="Whether /v1/images/edits works with it.")
    takes_sizes: bool
    solvers: list[str]
    solver: str
    num_inference_steps: int
    guidance_scale: float
    parameters: int


class ModelList(BaseModel):
    """The served models."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class Alive(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Workers that are ready, of each model's version."""

    status: Literal["ready"] = "ready"
    ready_workers: dict[str, int]
