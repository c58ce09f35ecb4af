"""Where a run's curves and pictures are shown beside its JSONL logs: TensorBoard, Weights & Biases, trackio.

Training reads nothing of them, and nothing that they do may stop it. A run that is resumed goes on with its curves.
"""

import io
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Protocol

from smalti.config import RunConfig, WriterName, to_json
from smalti.errors import UserError
from smalti.run_folder import RunFolder, write_json
from smalti.training.append_log import AppendLog

_EXTRAS = {"wandb": "track", "trackio": "track"}  # the pip extra that a package is in; TensorBoard is always there


class MetricWriter(Protocol):
    """Shown values and pictures by step."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Values of a step; several calls a step add up."""
        ...

    def picture(self, step: int, array: Any) -> None:
        """A grid of samples, [height, width] or [height, width, 3] uint8."""
        ...

    def close(self, failed: bool) -> None:
        """The end of this session, by an error or not."""
        ...


def check_writers(names: Sequence[WriterName]) -> None:
    """Raise UserError for a writer whose package is not installed, naming the pip extra that has it."""
    for name, extra in _EXTRAS.items():
        if name in names and find_spec(name) is None:
            raise UserError(f"loop.writers={','.join(names)}: {name} is not installed: pip install 'smalti[{extra}]'")


def open_writers(
    config: RunConfig, folder: RunFolder, first_step: int, say: Callable[[str], None]
) -> tuple["UnfailingWriter", ...]:
    """The writers of config.loop.writers. say(text) is told of the first failure of each."""
    openers: dict[WriterName, Callable[[], MetricWriter]] = {
        "tensorboard": lambda: TensorBoardWriter(folder, first_step),
        "wandb": lambda: WandbWriter(config, folder),
        "trackio": lambda: TrackioWriter(config, folder),
    }
    return tuple(UnfailingWriter(name, openers[name], say) for name in config.loop.writers)


class UnfailingWriter:
    """A writer that may fail, also at its opening: the first error is said, and training goes on."""

    def __init__(self, name: str, open_writer: Callable[[], MetricWriter], say: Callable[[str], None]) -> None:
        self._name, self._say, self._said = name, say, False
        self._writer: MetricWriter | None = None
        with self._forgiven():
            self._writer = open_writer()

    @contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._said:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                self._say(f"warning: {self._name} does not record: {reason}; training goes on, metrics.jsonl has all")
            self._said = True

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """As MetricWriter's."""
        with self._forgiven():
            if self._writer is not None:
                self._writer.scalars(step, values)

    def picture(self, step: int, array: Any) -> None:
        """As MetricWriter's."""
        with self._forgiven():
            if self._writer is not None:
                self._writer.picture(step, array)

    def close(self, failed: bool) -> None:
        """As MetricWriter's."""
        with self._forgiven():
            if self._writer is not None:
                self._writer.close(failed)


class TensorBoardWriter:
    """Event files in RUN/tensorboard; what they hold of first_step and later is hidden.

    Written between two steps, by this thread, and through a log that waits for a full disk: TensorBoard's own writer
    has a thread that such a disk ends with a traceback.
    """

    def __init__(self, folder: RunFolder, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        folder.tensorboard.mkdir(exist_ok=True)
        # Read in the order of their names, so that what a killed session wrote is hidden by the next one.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._log = AppendLog(folder.tensorboard / name)
        self._write(file_version="brain.Event:2")
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._log.append(record.getvalue())

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """As MetricWriter's."""
        from torch.utils.tensorboard.summary import scalar

        for name, value in values.items():
            self._write(step=step, summary=scalar(name, value))

    def picture(self, step: int, array: Any) -> None:
        """As MetricWriter's."""
        from torch.utils.tensorboard.summary import image

        self._write(step=step, summary=image("samples", array, dataformats="HW" if array.ndim == 2 else "HWC"))

    def close(self, failed: bool) -> None:
        """As MetricWriter's."""
        self._log.close()


def tracker_run_id(folder: RunFolder) -> str:
    """The id of a run at experiment trackers: made once, and kept in the run directory."""
    try:
        return str(json.loads(folder.trackers.read_text())["run_id"])
    except (OSError, ValueError, KeyError, TypeError):
        run_id = secrets.token_hex(4)
        write_json(folder.trackers, {"run_id": run_id})
        return run_id


class WandbWriter:
    """A run at Weights & Biases, in the project $WANDB_PROJECT or smalti; WANDB_MODE=offline keeps it in RUN/wandb."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        import wandb

        self._picture = wandb.Image
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "smalti"),
            name=folder.path.name,
            id=tracker_run_id(folder),
            resume="allow",
            dir=str(folder.path),
            config=to_json(config),
            settings=wandb.Settings(console="off"),  # a progress bar is no log
        )

    def _log(self, step: int, values: dict[str, Any]) -> None:
        # It takes no step earlier than its last. After a kill those between checkpoint and kill come again, the same.
        if step >= self._run.step:
            self._run.log(values, step=step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """As MetricWriter's."""
        self._log(step, values)

    def picture(self, step: int, array: Any) -> None:
        """As MetricWriter's."""
        self._log(step, {"samples": self._picture(array)})

    def close(self, failed: bool) -> None:
        """As MetricWriter's."""
        self._run.finish(exit_code=int(failed))


class TrackioWriter:
    """A run in trackio's local database ($TRACKIO_DIR), in the project $TRACKIO_PROJECT or smalti."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        import trackio

        self._picture, self._finish = trackio.Image, trackio.finish
        self._run: Any = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "smalti"),
            name=f"{folder.path.name}-{tracker_run_id(folder)}",  # by which it is found again
            config=to_json(config),
            resume="allow",
            embed=False,
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """As MetricWriter's."""
        self._run.log(dict(values), step=step)

    def picture(self, step: int, array: Any) -> None:
        """As MetricWriter's."""
        self._run.log({"samples": self._picture(array)}, step=step)

    def close(self, failed: bool) -> None:
        """As MetricWriter's."""
        self._finish()
