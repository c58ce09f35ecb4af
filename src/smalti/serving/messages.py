"""What is asked of a model and what it answers: msgspec structures, the one wire format of the server.

The parent and its workers send these over a socketpair as length-prefixed MessagePack, never pickle: a worker can be
lied to by nothing that executes. Numbers of pictures are unique in the life of a parent.
"""

from typing import Literal

import msgspec

OutputFormat = Literal["png", "jpeg", "webp"]
FailureCode = Literal[
    "invalid_request",  # the caller's mistake; param names the field
    "cancelled",
    "deadline_exceeded",
    "not_finite",  # the trajectory had NaN or infinity
    "out_of_memory",  # even alone in a forward
    "quarantined",  # a worker died of it, twice, with nothing beside it
    "worker_lost",  # no worker could be kept alive to draw it
    "shutting_down",
    "internal_error",
]
Fault = Literal["abort", "hang", "out_of_memory", "nan", "error"]


class PictureOrder(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One picture to draw. None takes the model's default; a picture depends on its order alone.

    seed: 0 .. 2^63 - 1. class_label or prompt: as the network takes. image_size: (height, width) in the network's own
    unit. solver_options: what Pipeline.plan takes beside the named fields. source, mask: picture files to begin from
    and what of it to paint (transparent or white = paint), with strength in (0, 1]. partial_images: estimates to send
    on the way. tenant, weight: whose share of the server it takes. user: whose requests stay with one arm of an A/B
    test, "" = the tenant's; taken off before the worker. deadline_seconds: fail when not done by then.
    request_id, index: the request it belongs to and its place there, for the receipt. fault: misbehave so, where the
    worker was told to allow it (tests and `smalti chaos`).
    """

    seed: int = 0
    class_label: int | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    solver: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    spacing: str | None = None
    solver_options: dict[str, bool | int | float | str | list[float]] = {}
    image_size: tuple[int, int] | None = None
    source: bytes | None = None
    mask: bytes | None = None
    strength: float = 1.0
    partial_images: int = 0
    output_format: OutputFormat = "png"
    output_compression: int = 90
    tenant: str = ""
    weight: float = 1.0
    user: str = ""
    deadline_seconds: float | None = None
    request_id: str = ""
    index: int = 0
    fault: Fault | None = None


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What a loaded model is and takes, for /v1/models and for checking requests before they are queued.

    name: as requests call it. version: the first 12 hex digits of the SHA-256 of its weights. created: Unix seconds.
    image_size: (height, width) of its pictures. tokens: a forward's tokens a row, the unit of cost beside steps.
    trajectory_bytes: of one picture's state, the most a checkpoint takes. num_classes: 0 where it takes no label.
    """

    name: str
    version: str
    created: int
    architecture: str
    image_size: tuple[int, int]
    channels: int
    num_classes: int
    reads_prompts: bool
    takes_pictures: bool
    takes_sizes: bool
    solvers: tuple[str, ...]
    solver: str
    num_inference_steps: int
    guidance_scale: float
    tokens: int
    trajectory_bytes: int
    parameters: int

    @property
    def key(self) -> str:
        """name@version, which pins a request to these weights."""
        return f"{self.name}@{self.version}"


# --- to a worker


class Draw(msgspec.Struct, frozen=True, tag="draw"):
    """Draw a picture. slot: where its checkpoints go. resume: a checkpoint to go on from, as the slot held it."""

    number: int
    order: PictureOrder
    slot: int
    resume: bytes | None = None


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Drop a picture at the next step."""

    number: int


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Finish what is there, then exit."""


class Slots(msgspec.Struct, frozen=True, tag="slots"):
    """The shared memory has grown to hold so many checkpoints of at most `largest` bytes."""

    count: int
    largest: int


ToWorker = Draw | Cancel | Stop | Slots

# --- from a worker


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The model is loaded and warm."""

    card: ModelCard


class CannotServe(msgspec.Struct, frozen=True, tag="cannot_serve"):
    """The model cannot be loaded, and another try would not change that."""

    message: str


class Admitted(msgspec.Struct, frozen=True, tag="admitted"):
    """The picture's order is sound. cost: rows x tokens x network calls that it takes in all."""

    number: int
    cost: float
    calls: int


class Preview(msgspec.Struct, frozen=True, tag="preview"):
    """What the picture looks like on the way. index: 0 .. partial_images - 1. call: network calls behind it."""

    number: int
    index: int
    call: int
    calls: int
    image: bytes


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The picture. image: a file of the order's format. resumed_from: the network call it went on from after a loss.

    calls: network calls of its plan. queued_seconds: from admission to the first forward. seconds: from admission.
    """

    number: int
    image: bytes
    width: int
    height: int
    calls: int
    cost: float
    resumed_from: int
    queued_seconds: float
    seconds: float


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The picture will not come. param: the field of the order at fault, where it is the caller's."""

    number: int
    code: FailureCode
    message: str
    param: str | None = None


class Tick(msgspec.Struct, frozen=True, tag="tick"):
    """A heartbeat: what the engine did since the last one. Sent after each tick, and once a second when idle.

    rows, padded_rows: of the tick's forward. seconds: its time. live, waiting: pictures that have begun and not.
    cost_left: rows x tokens x calls still to do.
    """

    ticks: int
    rows: int
    padded_rows: int
    seconds: float
    live: int
    waiting: int
    cost_left: float


PictureEvent = Admitted | Preview | Finished | Failed
FromWorker = Ready | CannotServe | PictureEvent | Tick
