"""The command `smalti top`."""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from smalti.cli_serve_arguments import Top
from smalti.errors import UserError

if TYPE_CHECKING:
    from smalti.serving.service import ServiceState

_TIMEOUT = 3.0


def top_command(command: Top) -> int:
    """Draw the server's state until Ctrl-C, or once."""
    from rich.console import Console, RenderableType
    from rich.live import Live

    from smalti.serving.top import Reading, frame, with_reading

    if not command.url.startswith(("http://", "https://")):
        raise UserError(f"url={command.url!r} must begin with http:// or https://")
    if not command.every > 0:
        raise UserError(f"--every {command.every} must be above 0")
    # Pipes have no width of their own: leave room for whole rows.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    history: tuple[Reading, ...] = ()

    def next_frame() -> tuple[RenderableType, bool]:
        """What to show, and whether the server answered."""
        nonlocal history
        state = _state(command.url)
        trouble = state if isinstance(state, str) else ""
        if not isinstance(state, str):
            history = with_reading(history, Reading(time.monotonic(), state))
        return frame(command.url, history, trouble, console.width), not trouble

    if command.once:
        shown, answered = next_frame()
        if answered:  # speeds are of two readings
            time.sleep(command.every)
            shown, answered = next_frame()
        console.print(shown)
        return 0 if answered else 1
    with contextlib.suppress(KeyboardInterrupt), ExitStack() as stack:
        show: Callable[[RenderableType], None] = console.print
        if console.is_terminal:
            show = partial(
                stack.enter_context(Live(console=console, screen=True, auto_refresh=False)).update, refresh=True
            )
        while True:
            show(next_frame()[0])
            time.sleep(command.every)
    return 0


def _state(url: str) -> "ServiceState | str":
    """The server's state, or why there is none now."""
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from smalti.serving.state_router import read_state

    key = os.environ.get("SMALTI_API_KEY")
    request = Request(f"{url.rstrip('/')}/v1/state", headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urlopen(request, timeout=_TIMEOUT) as answer:
            return read_state(answer.read())
    except HTTPError as error:
        if error.code in (401, 403):
            return "the server wants an API key: set SMALTI_API_KEY"
        return f"the server answers {error.code} to GET /v1/state: is it smalti's?"
    except (OSError, HTTPException) as error:
        return f"no answer: {getattr(error, 'reason', error)}; trying again"
    except ValueError:
        return "the answer to GET /v1/state is not a state: is the server smalti's, of this version?"
