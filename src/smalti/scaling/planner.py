"""What a run will take before anything is started: operations, memory by part, hours and money."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from smalti.config import RunConfig
from smalti.errors import UserError
from smalti.models.registry import forward_flops
from smalti.scaling.accelerators import Devices, Precision, product_precision_on
from smalti.scaling.amounts import bytes_text
from smalti.scaling.measured_training import MeasuredTraining
from smalti.scaling.step_memory import MemoryByPart, Moment, StepMemory, spread, step_memory, text_tokens
from smalti.training.parallel import Sharding, check_divisible

GPU_UTILISATION, CPU_UTILISATION = 0.35, 0.5  # of the peak by the step's products, where nothing was measured
_CPU_FRAMEWORK = 350 * 2**20  # a process that has imported smalti.training
_GPU_FRAMEWORK = 1024 * 2**20  # CUDA's context, libraries and their workspaces: assumed
_COMMUNICATION = 512 * 2**20  # NCCL's buffers: assumed


@dataclass(frozen=True)
class Amount:
    """How long a run trains, in one of these. images: seen, repeats included. flops: of the model, without what
    checkpointing computes again."""

    steps: int | None = None
    images: float | None = None
    epochs: float | None = None
    flops: float | None = None
    minutes: float | None = None


@dataclass(frozen=True)
class RunPlan:
    """A run that has not been started. Bytes are of one device.

    step_flops: of the whole batch, a backward counting two forwards; executed_flops: with the forward that activation
    checkpointing repeats. peaks: when most is held, in each moment. checkpoint_copy: what a checkpoint copies to the
    machine's memory while it is written. utilisation: share of the devices' peak; None where steps were measured.
    """

    config: RunConfig
    devices: Devices
    sharding: Sharding
    precision: Precision
    parameters: int
    forward_flops: int
    step_flops: float
    executed_flops: float
    steps: int
    dataset_images: int | None
    step_seconds: float
    seconds: float
    utilisation: float | None
    price_per_hour: float | None
    peaks: Mapping[Moment, MemoryByPart]
    whole: MemoryByPart
    checkpoint_copy: int
    advice: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """Pictures seen, repeats included."""
        return self.steps * self.config.loop.batch_size

    @property
    def passes(self) -> float | None:
        """Over the data; None where its size is not known."""
        return None if self.dataset_images is None else self.images / self.dataset_images

    @property
    def flops(self) -> float:
        """Of the whole run, of the model."""
        return self.steps * self.step_flops

    @property
    def device_hours(self) -> float:
        """Hours times devices."""
        return self.seconds / 3600 * self.devices.count

    @property
    def cost(self) -> float | None:
        """Dollars; None where there is no price."""
        return None if self.price_per_hour is None else self.price_per_hour * self.device_hours

    @property
    def peak_moment(self) -> Moment:
        """When most memory is held."""
        return max(self.peaks, key=lambda moment: self.peaks[moment].total)

    @property
    def memory(self) -> MemoryByPart:
        """The parts when most is held; their total is what the device must have."""
        return self.peaks[self.peak_moment]

    @property
    def needed(self) -> int:
        """Bytes at the peak; on a CPU with the copy of a checkpoint that is being written beside the steps."""
        return self.memory.total + (self.checkpoint_copy if self.devices.is_cpu else 0)

    @property
    def fits(self) -> bool:
        """Whether a device has that much memory."""
        return self.needed <= self.devices.accelerator.memory


def forward_flops_of(config: RunConfig) -> int:
    """Operations of one forward of a picture, its text included."""
    return forward_flops(config.model, None, text_tokens(config), config.codebook_size)


def plan_run(
    config: RunConfig,
    devices: Devices,
    amount: Amount,
    *,
    sharding: Sharding = "ddp",
    dataset_images: int | None = None,
    utilisation: float | None = None,
    price_per_hour: float | None = None,
    measured: MeasuredTraining | None = None,
) -> RunPlan:
    """Plan a run. measured: of this very config on this machine, in place of an assumed utilisation.

    Raises UserError for epochs of data of unknown size, a batch that does not divide over the devices, a utilisation
    outside (0, 1] and a precision that the device has no products of.
    """
    check_divisible(config.loop.batch_size, config.loop.gradient_accumulation_steps, devices.count)
    if utilisation is not None and not 0 < utilisation <= 1:
        raise UserError(f"--mfu {utilisation:g} must lie in (0, 1]: the share of the peak that the products reach")
    if price_per_hour is not None and not 0 <= price_per_hour < math.inf:
        raise UserError(f"--price-per-hour {price_per_hour:g} must be at least 0 and finite")
    precision = product_precision_on(devices.accelerator, config.loop)
    peak = devices.count * devices.accelerator.peak(precision)
    forward = forward_flops_of(config)
    step_flops = 3.0 * forward * config.loop.batch_size
    executed = step_flops * (4 / 3 if config.loop.activation_checkpointing else 1)
    if measured is not None:
        share, step_seconds = None, measured.step
    else:
        share = utilisation or (CPU_UTILISATION if devices.is_cpu else GPU_UTILISATION)
        step_seconds = executed / (peak * share)
    steps = _steps(config, amount, step_flops, step_seconds, dataset_images)
    step = step_memory(_of_one_device(config, devices.count), precision, devices.is_cpu)
    plan = RunPlan(
        config,
        devices,
        sharding,
        precision,
        step.parameters,
        forward,
        step_flops,
        executed,
        steps,
        dataset_images,
        step_seconds,
        steps * step_seconds if measured is None else measured.run_seconds(config.loop, steps),
        share,
        devices.accelerator.price_per_hour if price_per_hour is None else price_per_hour,
        _on_devices(step, devices, sharding),
        step.whole,
        step.whole.weights + step.whole.averages + step.whole.optimizer,
    )
    return plan if plan.fits else replace(plan, advice=tuple(_what_would_fit(plan, step)))


def _of_one_device(config: RunConfig, devices: int) -> RunConfig:
    """The part of a batch that one device computes."""
    return replace(config, loop=replace(config.loop, batch_size=config.loop.batch_size // devices))


def _on_devices(step: StepMemory, devices: Devices, sharding: Sharding) -> dict[Moment, MemoryByPart]:
    framework = _CPU_FRAMEWORK if devices.is_cpu else _GPU_FRAMEWORK + (_COMMUNICATION if devices.count > 1 else 0)
    peaks = spread(step, devices.count, sharding)
    return {moment: replace(peak, framework=framework) for moment, peak in peaks.items()}


def _steps(
    config: RunConfig, amount: Amount, step_flops: float, step_seconds: float, dataset_images: int | None
) -> int:
    batch = config.loop.batch_size
    if amount.steps is not None:
        steps = float(amount.steps)
    elif amount.images is not None:
        steps = amount.images / batch
    elif amount.flops is not None:
        steps = amount.flops / step_flops
    elif amount.minutes is not None:
        steps = 60 * amount.minutes / step_seconds
    else:
        assert amount.epochs is not None
        if dataset_images is None:
            raise UserError(f"{amount.epochs:g} epochs: say of how many pictures, as in --data 1.3M")
        steps = amount.epochs * dataset_images / batch
    return max(1, math.ceil(steps - 1e-9))


def _what_would_fit(plan: RunPlan, step: StepMemory) -> list[str]:
    """What to change so that the memory suffices: each change alone, then all together."""
    config, devices = plan.config, plan.devices
    checkpointed = replace(config, loop=replace(config.loop, activation_checkpointing=True))
    tried: list[tuple[str, RunConfig, Sharding]] = []
    if not config.loop.activation_checkpointing:
        tried.append(("--activation-checkpointing", checkpointed, plan.sharding))
    if devices.count > 1 and plan.sharding == "ddp":
        tried.append(("--sharding fsdp", config, "fsdp"))
        if not config.loop.activation_checkpointing:
            tried.append(("--sharding fsdp --activation-checkpointing", checkpointed, "fsdp"))
    advice: list[str] = []

    def needed(changed: RunConfig, sharding: Sharding) -> int:
        if changed is config:
            memory = step
        else:
            memory = step_memory(_of_one_device(changed, devices.count), plan.precision, devices.is_cpu)
        peak = max(part.total for part in _on_devices(memory, devices, sharding).values())
        return peak + (plan.checkpoint_copy if devices.is_cpu else 0)

    room = devices.accelerator.memory
    for change, changed, sharding in tried:
        bytes_needed = needed(changed, sharding)
        if bytes_needed <= room:
            advice.append(f"{change}: {bytes_text(bytes_needed)}, fits")
    for change, changed, sharding in [("", config, plan.sharding), *tried[-1:]]:
        largest = _largest_batch(changed, devices.count, room, partial(needed, sharding=sharding))
        if largest is not None and largest < config.loop.batch_size:
            parts = config.loop.batch_size // largest
            same = (
                f" (or --set gradient_accumulation_steps={parts * config.loop.gradient_accumulation_steps}: the same "
                "batch in parts)"
                if config.loop.batch_size % largest == 0
                else ""
            )
            advice.append(f"--batch-size {largest}{' ' + change if change else ''}: fits{same}")
        if advice:
            break
    if not advice:
        more = "more devices with --sharding fsdp" if devices.count > 1 or not devices.is_cpu else "a larger machine"
        advice.append(f"not even one picture a device fits: take devices with more memory, or {more}")
    return advice


def _largest_batch(config: RunConfig, devices: int, room: int, needed: Callable[[RunConfig], int]) -> int | None:
    """The largest halved batch that fits; None where not even the smallest does. needed(config): bytes."""
    parts = devices * config.loop.gradient_accumulation_steps
    sizes = [config.loop.batch_size]
    while sizes[-1] % 2 == 0 and (sizes[-1] // 2) % parts == 0:
        sizes.append(sizes[-1] // 2)

    def fits(size: int) -> bool:
        return needed(replace(config, loop=replace(config.loop, batch_size=size))) <= room

    return next(filter(fits, sizes), None) if fits(sizes[-1]) else None
