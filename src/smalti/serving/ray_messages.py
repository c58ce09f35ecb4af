"""What a replica of the engine on Ray says of itself, beside the picture's events.

Both ways a call's payload is bytes of MessagePack, as over a worker's socket. Ray puts it into its own envelope, which
it makes with pickle: that is between the nodes of one cluster, and nothing of it comes from a request.
"""

import msgspec

from smalti.serving.messages import PictureEvent


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """How a replica is. heartbeat_age: seconds since its engine's last sign."""

    replica: str
    pid: int
    heartbeat_age: float
    mean_step_seconds: float
    ticks: int
    rows: int
    padded_rows: int
    live: int
    waiting: int
    last_rows: int


class Checkpoint(msgspec.Struct, frozen=True, tag="checkpoint"):
    """A picture's state, to go on from elsewhere when the replica is lost."""

    number: int
    state: bytes


FromReplica = PictureEvent | Beat | Checkpoint
"""A picture's stream: Beat, then its events with checkpoints between, Beat, and the terminal event last."""
