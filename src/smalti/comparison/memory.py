"""Peak resident memory of a piece of work inside a process that goes on."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_SELF = Path("/proc/self")
_RESET_PEAK = "5"  # proc(5), clear_refs


@dataclass
class PeakMemory:
    """bytes: the peak beyond what the process held before; None where the system does not tell."""

    bytes: int | None = None


def _resident(field: str) -> int:
    """VmRSS or VmHWM, the highest since it was reset, in bytes."""
    for line in (_SELF / "status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"no {field}")


def _give_back_freed_memory() -> None:
    """Ask glibc for it, so that what earlier work left does not hide what the next one takes."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """What the work inside needs at its peak, on Linux."""
    peak = PeakMemory()
    _give_back_freed_memory()
    try:
        (_SELF / "clear_refs").write_text(_RESET_PEAK)
        before = _resident("VmRSS")
    except OSError:
        yield peak
        return
    yield peak
    peak.bytes = max(0, _resident("VmHWM") - before)
