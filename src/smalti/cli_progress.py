"""What commands that read many pictures print: a progress bar, and what was skipped."""

import sys
from collections.abc import Callable, Sequence


class progress_bar:
    """A rich bar over progress(done, total) calls; silent where nobody watches."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __enter__(self) -> Callable[[int, int], None]:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
        self._bar.start()
        task = self._bar.add_task(self._text, total=None)
        return lambda done, total: self._bar.update(task, completed=done, total=total)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


_LISTED = 10


def skipped_lines(skipped: Sequence[tuple[str, str]]) -> list[str]:
    """How many pictures were skipped, and the first of them with the reason, a line each."""
    lines = [f"skipped: {len(skipped) or 'none'}", *(f"  {key}: {reason}" for key, reason in skipped[:_LISTED])]
    return lines + ([f"  and {len(skipped) - _LISTED} more"] if len(skipped) > _LISTED else [])
