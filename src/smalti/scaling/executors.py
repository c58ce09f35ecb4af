"""Where a study's tasks run: in processes of this machine, or on a Ray cluster."""

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol

from smalti.errors import UserError
from smalti.scaling.tasks import Task

_STOP_SECONDS = 60.0  # that a run has to save itself


@dataclass(frozen=True)
class Ended:
    """How a task ended. result: None where it was stopped or its process died; died: by what, where it did."""

    result: dict[str, Any] | None
    died: str | None = None


class Running(Protocol):
    """A task that was started."""

    def ended(self) -> Ended | None:
        """How it ended; None while it runs."""
        ...

    def stop(self) -> None:
        """Ask it to save and stop; returns when it has, or was killed for not doing so."""
        ...


class Executor(Protocol):
    """Starts tasks."""

    @property
    def slots(self) -> int:
        """How many run at the same time."""
        ...

    def start(self, task: Task) -> Running:
        """Begin a task."""
        ...


def _perform_as_child(connection: Connection, task: dict[str, Any], parent: int, threads: int) -> None:
    from smalti.child_process import die_with_parent

    os.setsid()  # a terminal's Ctrl-C is the parent's, who tells its children
    die_with_parent(parent)
    import torch

    from smalti.scaling.tasks import perform
    from smalti.training.memory import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()
    connection.send_bytes(json.dumps(perform(task)).encode())


@dataclass(frozen=True)
class _Child:
    process: SpawnProcess
    connection: Connection

    def ended(self) -> Ended | None:
        if self.process.is_alive() and not self.connection.poll():
            return None
        try:  # what a process sent may arrive just before its end
            sent = self.connection.recv_bytes() if self.connection.poll() else None
        except (EOFError, ConnectionError):
            sent = None
        self.process.join()
        self.connection.close()
        if sent is not None:
            return Ended(json.loads(sent))
        code = self.process.exitcode or 0
        by = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Ended(None, f"its process ended by {by}")

    def stop(self) -> None:
        self.process.terminate()  # SIGTERM: the run saves and ends
        self.process.join(_STOP_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@dataclass(frozen=True)
class LocalProcesses:
    """A process for each task, so many at a time with so many threads each. A task's process dies with this one."""

    slots: int
    threads: int

    def start(self, task: Task) -> Running:
        """Begin a task in a new process."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        arguments = (theirs, task.to_json(), os.getpid(), self.threads)
        process = context.Process(target=_perform_as_child, args=arguments)
        process.start()
        theirs.close()
        return _Child(process, ours)


def _perform_on_ray(task: dict[str, Any], threads: int) -> dict[str, Any] | None:
    import torch

    from smalti.scaling.tasks import perform

    torch.set_num_threads(threads)
    return perform(task)


@dataclass(frozen=True)
class _RayTask:
    reference: Any

    def ended(self) -> Ended | None:
        import ray

        done, _ = ray.wait([self.reference], timeout=0)
        if not done:
            return None
        try:
            return Ended(ray.get(self.reference))
        except (ray.exceptions.RayError, ray.exceptions.RayTaskError) as error:
            return Ended(None, f"Ray: {str(error).splitlines()[-1]}")

    def stop(self) -> None:
        import ray

        ray.cancel(self.reference, force=True)  # its checkpoints stay


@dataclass(frozen=True)
class RayCluster:
    """Tasks on a Ray cluster, each with so many CPUs and, on "cuda", a GPU of its own."""

    slots: int
    threads: int

    def start(self, task: Task) -> Running:
        """Begin a task on some machine of the cluster."""
        import ray

        options = {"num_cpus": self.threads, "max_retries": 0, **({"num_gpus": 1} if task.device != "cpu" else {})}
        return _RayTask(ray.remote(**options)(_perform_on_ray).remote(task.to_json(), self.threads))


@contextmanager
def ray_cluster(threads: int, device: str) -> Iterator[RayCluster]:
    """The cluster that this machine belongs to; one is started where there is none, and ended afterwards.

    As many tasks run at a time as it has CPUs for, or GPUs. Raises UserError where Ray is missing.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--ray: Ray is not installed: pip install 'smalti[ray]'") from None
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False)
    try:
        resources = ray.cluster_resources()
        slots = int(resources.get("CPU", 0) // threads)
        if device != "cpu":
            slots = min(slots, int(resources.get("GPU", 0)))
        if slots < 1:
            raise UserError(f"--ray: the cluster has {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} "
                            f"GPUs, too few for one run on {device} with {threads} threads")  # fmt: skip
        yield RayCluster(slots, threads)
    finally:
        if started:
            ray.shutdown()
