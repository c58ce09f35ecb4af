"""What a parent tells a worker of the model that it is to serve."""

import msgspec


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker loads and runs a model. devices: that the workers take in turn. threads: of its own, on a CPU.

    compile: torch.compile with padded forwards, faster after a slow start; pictures then depend on what shares their
    forwards by rounding, and otherwise not at all. max_rows: of a forward. allow_faults: for chaos.
    """

    name: str
    run: str
    devices: tuple[str, ...] = ("cpu",)
    threads: int = 1
    compile: bool = False
    max_rows: int = 16
    express_calls: int = 8
    checkpoint_every: int = 5
    aged_seconds: float = 10.0
    allow_faults: bool = False
