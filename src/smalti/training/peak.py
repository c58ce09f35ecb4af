"""How fast a device multiplies matrices, which model FLOPs utilisation (MFU) is a share of."""

import time
from functools import lru_cache

import torch


def product_side(device: torch.device) -> int:
    """The side of the square matrices: large enough to reach the peak, small enough for a moment."""
    return 1024 if device.type == "cpu" else 8192


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """The best rate of a square matrix product in `seconds` of trying, in FLOP/s."""
    return _measured(str(device), dtype, torch.get_num_threads(), seconds)


@lru_cache(maxsize=8)
def _measured(device_name: str, dtype: torch.dtype, threads: int, seconds: float) -> float:
    device = torch.device(device_name)
    side = product_side(device)
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        _finish(device)
        started = time.perf_counter()
        torch.mm(a, b)
        _finish(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
