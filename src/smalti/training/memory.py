"""Keep freed memory in the process: a training step asks for the same buffers again and again."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Stop glibc from giving large buffers back to the kernel after each use.

    By default a tensor above 128 KiB to 32 MiB is mapped and unmapped each time, and each of its pages is faulted in
    and zeroed again by the kernel. A process that trains asks for the same sizes at each step, so it keeps them. Does
    nothing on other C libraries. Called by the command line, never on import.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 2**30)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
