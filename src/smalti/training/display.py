"""What a person sees while a run trains: a live bar on a terminal, plain lines anywhere else."""

import sys
import time
from types import TracebackType
from typing import Any, Protocol, Self


class TrainingDisplay(Protocol):
    """Shown what happens; keeps nothing that training reads."""

    def __enter__(self) -> Self:
        """Begin showing."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing."""
        ...

    def update(self, step: int, progress: float, loss: float, images_per_second: float, seconds_left: float) -> None:
        """A step is done; progress in [0, 1] of the budget."""
        ...

    def message(self, text: str) -> None:
        """Something to say once: a checkpoint, a validation loss."""
        ...

    def picture(self, path: str) -> None:
        """A new sample grid lies at path."""
        ...


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class SilentDisplay:
    """Says nothing: on the ranks that do not speak, and as the ground that others are made from."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def update(self, step: int, progress: float, loss: float, images_per_second: float, seconds_left: float) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def picture(self, path: str) -> None:
        """Nothing."""


class PlainDisplay(SilentDisplay):
    """A line now and then, for logs and pipes."""

    def __init__(self, seconds_between_lines: float = 5.0) -> None:
        self._between = seconds_between_lines
        self._last = 0.0
        self._grid = ""

    def update(self, step: int, progress: float, loss: float, images_per_second: float, seconds_left: float) -> None:
        """A line if the last is old enough, or at the end."""
        now = time.monotonic()
        if now - self._last < self._between and progress < 1:
            return
        self._last = now
        self.message(
            f"step {step}  {progress:4.0%}  loss {loss:.4f}  {images_per_second:.0f} images/s  "
            f"{clock(seconds_left)} left{self._grid}"
        )

    def message(self, text: str) -> None:
        """One line to standard output."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def picture(self, path: str) -> None:
        """Remembered for the next lines."""
        self._grid = f"  samples: {path}"


class LiveDisplay:
    """A rich progress bar with loss, speed, time left and the last grid's path."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self._progress: Any = Progress(
            TextColumn("[bold]step {task.fields[step]}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[speed]:.0f} images/s"),
            TextColumn("{task.fields[left]} left"),
            TextColumn("[cyan]{task.fields[grid]}"),
        )
        self._task = self._progress.add_task("train", total=1.0, step=0, loss=float("nan"), speed=0, left="?", grid="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, step: int, progress: float, loss: float, images_per_second: float, seconds_left: float) -> None:
        """Move the bar."""
        self._progress.update(
            self._task, completed=progress, step=step, loss=loss, speed=images_per_second, left=clock(seconds_left)
        )

    def message(self, text: str) -> None:
        """A line above the bar."""
        self._progress.console.print(text, highlight=False)

    def picture(self, path: str) -> None:
        """Shown beside the bar."""
        self._progress.update(self._task, grid=path)


def terminal_display() -> TrainingDisplay:
    """The live bar on a terminal, plain lines elsewhere."""
    return LiveDisplay() if sys.stdout.isatty() else PlainDisplay()
