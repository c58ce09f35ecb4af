"""Accelerators that a run may be planned for: their peaks, memory and price; and this machine's CPU."""

import os
from dataclasses import dataclass
from typing import Literal

import torch

from smalti.config import LoopConfig
from smalti.errors import UserError, unknown_name
from smalti.training.forward import product_dtype
from smalti.training.peak import matmul_peak

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Accelerator:
    """One device. float32, bfloat16, float16: dense matrix products with float32 sums, in FLOP/s; None: it has none.

    memory: bytes. price_per_hour: of renting one, in US dollars; None where it is not rented.
    """

    name: str
    memory: int
    float32: float | None
    bfloat16: float | None
    float16: float | None
    price_per_hour: float | None = None

    def peak(self, precision: Precision) -> float:
        """FLOP/s of dense products. Raises UserError for a precision that it has no products of."""
        peak: float | None = getattr(self, precision)
        if peak is None:
            has = [name for name in ("float32", "bfloat16", "float16") if getattr(self, name) is not None]
            raise UserError(f"--precision {precision}: {self.name} has no products of it; it has {', '.join(has)}")
        return peak


@dataclass(frozen=True)
class Devices:
    """How many of which accelerator."""

    accelerator: Accelerator
    count: int = 1

    @property
    def is_cpu(self) -> bool:
        """Whether it is this machine's CPU."""
        return self.accelerator.name == "cpu"

    def __str__(self) -> str:
        return self.accelerator.name if self.count == 1 else f"{self.accelerator.name} x {self.count}"


def _gpu(name: str, mib: int, float32: float, bfloat16: float | None, float16: float, price: float) -> Accelerator:
    """Peaks given in TFLOP/s."""
    return Accelerator(
        name, mib * 2**20, 1e12 * float32, None if bfloat16 is None else 1e12 * bfloat16, 1e12 * float16, price
    )


# Peaks: NVIDIA's data sheets and architecture white papers (Turing, Ampere, Ada, Hopper), dense, without sparsity, with
# sums in float32 (half of the advertised figure on GeForce cards), of the SXM form where there are several; float32
# without TF32, as smalti trains. Memory: what nvidia-smi reports. Prices: rounded, of what renting one on demand
# typically cost in 2025; they differ between providers by a factor of 3 and move: --price-per-hour.
ACCELERATORS = {
    gpu.name: gpu
    for gpu in (
        #    name        MiB     float32 bfloat16 float16 $/hour
        _gpu("h200", 143_771, 67.0, 989.4, 989.4, 3.50),
        _gpu("h100", 81_559, 67.0, 989.4, 989.4, 2.75),
        _gpu("a100-80", 81_920, 19.5, 312.0, 312.0, 1.75),
        _gpu("a100-40", 40_960, 19.5, 312.0, 312.0, 1.25),
        _gpu("l40s", 46_068, 91.6, 362.0, 362.0, 1.00),
        _gpu("l4", 23_034, 30.3, 121.0, 121.0, 0.70),
        _gpu("a10", 23_028, 31.2, 125.0, 125.0, 0.75),
        _gpu("t4", 15_360, 8.1, None, 65.0, 0.35),  # Turing multiplies no bfloat16
        _gpu("rtx4090", 24_564, 82.6, 165.2, 165.2, 0.40),
        _gpu("rtx3090", 24_576, 35.6, 71.0, 71.0, 0.25),
    )
}


def this_cpu() -> Accelerator:
    """This machine's CPU: its memory, and its rate of matrix products, measured in a moment."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cpu = torch.device("cpu")
    rates = {dtype: matmul_peak(cpu, dtype) for dtype in (torch.float32, torch.bfloat16)}
    return Accelerator("cpu", memory, rates[torch.float32], rates[torch.bfloat16], None)


def parse_devices(text: str) -> Devices:
    """ "h100x8", "l4" or "cpu". Raises UserError for an unknown name, with the nearest, and for a count below 1."""
    wanted = text.strip().lower()
    if wanted == "cpu":
        return Devices(this_cpu())
    name, x, count = (wanted, "", "") if wanted in ACCELERATORS else wanted.rpartition("x")
    if not (x and count.lstrip("-").isdigit() and name):
        name, count = wanted, "1"
    if name == "cpu":
        raise UserError(f"--gpu {text}: the CPU is planned for as one device: give --gpu cpu")
    if name not in ACCELERATORS:
        raise unknown_name("accelerator in --gpu", name, [*ACCELERATORS, "cpu"])
    if int(count) < 1:
        raise UserError(f"--gpu {text}: {name} must be taken at least once, as in {name}x8")
    return Devices(ACCELERATORS[name], int(count))


def product_precision_on(accelerator: Accelerator, loop: LoopConfig) -> Precision:
    """What loop.precision means there: "auto" is bfloat16 where it is multiplied natively, else float32."""
    if loop.precision != "auto":
        return loop.precision
    if accelerator.name == "cpu":
        return "bfloat16" if product_dtype(loop, torch.device("cpu")) == torch.bfloat16 else "float32"
    return "float32" if accelerator.bfloat16 is None else "bfloat16"
