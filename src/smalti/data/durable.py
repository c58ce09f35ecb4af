"""Files that a crash leaves whole or absent: written under a temporary name, forced to the disk, then renamed."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(partial: Path, target: Path) -> None:
    """Give a file that is written whole its name, so that it is there after a crash or not at all."""
    sync(partial)
    partial.replace(target)
    sync(target.parent)
