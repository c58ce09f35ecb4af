"""The arguments of the commands about serving."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Top:
    """Show the engine of a running server, live: workers, queue, rows that share a forward, pictures a second.

    Examples: smalti top
              smalti top https://pictures.example.org --once

    Reads GET /v1/state twice a second and goes on when the server restarts; Ctrl-C ends it. Where the server wants an
    API key, it is taken from $SMALTI_API_KEY.
    """

    url: Annotated[Positional[str], arg(metavar="URL")] = "http://127.0.0.1:8000"
    """The server's address."""
    once: bool = False
    """Print one frame and end; exits with 1 where the server does not answer."""
    every: float = 0.5
    """Seconds between readings."""
