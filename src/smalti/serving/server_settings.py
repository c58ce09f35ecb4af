"""What the HTTP server is told when it starts."""

from dataclasses import dataclass

from smalti.errors import UserError
from smalti.serving.access import KEYS_VARIABLE, ApiKey, checked_rate, is_loopback

LARGEST_N = 10


@dataclass(frozen=True)
class ServerSettings:
    """How the server answers. Raises UserError for what it must not do.

    host, port: where it listens; without keys on loopback only, unless allow_open says that whoever reaches it may ask.
    keys: from access.read_keys. rate_limit: requests to draw a key, such as "60/minute". body_limit, json_limit: bytes
    of a request with files and of any other. max_n: pictures a request, 1 .. 10. cors_origins: pages of other hosts
    whose scripts may ask. allowed_hosts: names under which it answers, () = any with keys, else those of loopback.
    allow_faults: obey the header x-smalti-fault (tests and `smalti chaos`). traces: OpenTelemetry spans.
    deadline_seconds: of requests that give none. file_seconds, file_bytes: how long pictures behind URLs are kept, and
    how much of them. public_url: how clients reach the server, for those URLs; None = as the request did.
    stream_ping_seconds: between signs of life in a quiet stream. stream_stall_seconds: after which a stream that its
    client does not read is dropped.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[ApiKey, ...] = ()
    allow_open: bool = False
    rate_limit: str | None = None
    body_limit: int = 50 * 2**20
    json_limit: int = 8 * 2**20
    max_n: int = LARGEST_N
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allow_faults: bool = False
    traces: bool = False
    deadline_seconds: float | None = None
    file_seconds: float = 3600.0
    file_bytes: int = 256 * 2**20
    public_url: str | None = None
    stream_ping_seconds: float = 15.0
    stream_stall_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not self.keys and not is_loopback(self.host) and not self.allow_open:
            raise UserError(
                f"host={self.host} lets other machines ask, and there are no API keys: give a keys file or the "
                f"variable {KEYS_VARIABLE}, or allow_open=True where all that reach the server may use it"
            )
        if not 0 <= self.port <= 65535:
            raise UserError(f"port={self.port} must lie in 0 .. 65535")
        if not 1 <= self.max_n <= LARGEST_N:
            raise UserError(f"max_n={self.max_n} must lie in 1 .. {LARGEST_N}")
        if self.rate_limit is not None:
            checked_rate(self.rate_limit)
        if self.deadline_seconds is not None:
            self._check_positive("deadline_seconds")
        for name in ("body_limit", "json_limit", "file_seconds", "stream_ping_seconds", "stream_stall_seconds"):
            self._check_positive(name)
        if self.file_bytes < 2**20:
            raise UserError(f"file_bytes={self.file_bytes} must be at least {2**20}")

    def _check_positive(self, name: str) -> None:
        if not getattr(self, name) > 0:
            raise UserError(f"{name}={getattr(self, name)} must be above 0")

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names under which the server answers; () = any."""
        if self.allowed_hosts or self.keys or not is_loopback(self.host):
            return self.allowed_hosts
        return ("localhost", "127.0.0.1", "::1", self.host.strip("[]"))
