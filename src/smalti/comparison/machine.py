"""The machine that figures were measured on."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

import smalti
from smalti.config import RunConfig
from smalti.training.forward import product_dtype


def _processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine_of(config: RunConfig) -> dict[str, Any]:
    """What a run's speed depends on, for a report."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "products": str(product_dtype(config.loop, torch.device("cpu"))).removeprefix("torch."),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "smalti": smalti.__version__,
    }
