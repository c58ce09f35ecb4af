"""Training speed of DiTs: smalti, a straightforward eager DiT and diffusers' class, in images a second and MFU.

    python benchmarks/train_throughput.py                  # digits and DiT-S/2 on the CPU
    python benchmarks/train_throughput.py --device cuda    # DiT-B/2 and DiT-XL/2 on 4x32x32 latents, bfloat16

Each candidate trains in a process of its own, in turn with the others, or one after the other (--one-at-a-time, and
always on a GPU, whose memory they would share). Compilation is not counted. smalti's processes keep freed memory, as
`smalti train` does; --peers-keep-memory gives the peers that too.

MFU is 3 x the products of a forward over the time of a step, against square products in the row's precision: its median
against the median of rounds of products that take turns with the steps, so that both meet the same other load on the
machine, and its fastest round against the fastest single product.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import diffusers
import torch
import tyro
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from reference_dit import ReferenceDiT
from timing import append_row, device_name, interleaved, machine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from smalti.config import LoopConfig, apply_overrides
from smalti.data.digits import load_digits
from smalti.data.rows import PicturesInMemory
from smalti.diffusion.objective import noisy_input
from smalti.diffusion.processes import make_process
from smalti.models import forward_flops
from smalti.models.dit import DiTConfig, dit_presets
from smalti.recipes import recipe
from smalti.training.batch import training_batch
from smalti.training.forward import compile_blocks, multiplies_bfloat16, product_precision
from smalti.training.memory import keep_freed_memory
from smalti.training.peak import matmul_peak, product_side
from smalti.training.state import new_state
from smalti.training.step import clip_gradients, compute_gradients, update_weights

Step = Callable[[], None]
Precision = Literal["float32", "bfloat16"]
Compiled = Literal["no", "blocks", "network"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PRODUCTS = 20  # square products a round


def _preset(name: str) -> DiTConfig:
    return replace(dit_presets()[name], learn_sigma=False, initialisation="wide")


CASES = {
    "digits": DiTConfig(initialisation="wide"),
    "dit-s-2": _preset("DiT-S/2"),
    "dit-b-2": _preset("DiT-B/2"),
    "dit-xl-2": _preset("DiT-XL/2"),
    "smallest": DiTConfig(image_size=(8, 8), in_channels=4, width=32, depth=1, num_heads=2),  # for the test
}


@dataclass(frozen=True)
class Setting:
    """What is trained, and how; one for each candidate."""

    case: str
    batch_size: int
    device: str
    precision: Precision
    keep_memory: bool

    @property
    def config(self) -> DiTConfig:
        return CASES[self.case]

    def products(self) -> AbstractContextManager[None]:
        return product_precision(LoopConfig(precision=self.precision), torch.device(self.device))

    def finish(self) -> None:
        """Wait for what the device still has to do."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def training_rows(case: str) -> PicturesInMemory:
    """The digits; in place of latents random numbers, which take as long."""
    if case == "digits":
        return load_digits()[0]
    config, generator = CASES[case], torch.Generator().manual_seed(0)
    shape = (2048, config.in_channels, *config.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return PicturesInMemory(images, torch.randint(0, config.num_classes, (2048,), generator=generator))


def reference_step(setting: Setting, compiled: bool) -> Step:
    """One training step of the straightforward DiT, as the usual script writes it."""
    if setting.keep_memory:
        keep_freed_memory()
    config, size = setting.config, setting.batch_size
    model: nn.Module = ReferenceDiT(
        config.image_size[0], config.in_channels, config.patch_size, config.width, config.depth, config.num_heads,
        config.num_classes,
    ).to(setting.device)  # fmt: skip
    network = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    average = copy.deepcopy(model).requires_grad_(False)
    rows, process = training_rows(setting.case).to(setting.device), make_process("rectified_flow")

    def step() -> None:
        x0, labels = rows.labelled(torch.randint(0, len(rows), (size,), device=setting.device))
        eps = torch.randn_like(x0)
        t = torch.sigmoid(torch.randn(size, device=setting.device))
        labels = torch.where(torch.rand(size, device=setting.device) < 0.1, config.num_classes, labels)
        with setting.products():
            output = network(noisy_input(process, t, x0, eps), 1000 * t, labels)
        loss = torch.nn.functional.mse_loss(output.float(), eps - x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                mean.mul_(0.999).add_(weight, alpha=0.001)
        setting.finish()

    return step


def _batches(rows: PicturesInMemory, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    pictures, labels = rows.labelled(torch.arange(len(rows)))
    while True:
        yield from DataLoader(TensorDataset(pictures, labels), batch_size, shuffle=True, drop_last=True)


def diffusers_step(setting: Setting) -> Step:
    """One training step of diffusers' class as its examples train: DataLoader, DDPMScheduler, AdamW, EMAModel."""
    if setting.keep_memory:
        keep_freed_memory()
    config, device = setting.config, setting.device
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.width // config.num_heads,
        in_channels=config.in_channels, out_channels=config.in_channels, num_layers=config.depth,
        sample_size=config.image_size[0], patch_size=config.patch_size, num_embeds_ada_norm=config.num_classes,
    ).to(device)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000)
    average = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    average.to(device)
    noise_scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000)
    batches = _batches(training_rows(setting.case), setting.batch_size)

    def step() -> None:
        pictures, labels = (part.to(device) for part in next(batches))
        noise = torch.randn_like(pictures)
        t = torch.randint(0, 1000, (len(pictures),), device=device)
        noisy = noise_scheduler.add_noise(pictures, noise, t)
        with setting.products():
            output = model(noisy, timestep=t, class_labels=labels).sample
        loss = torch.nn.functional.mse_loss(output.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.step(model.parameters())
        setting.finish()

    return step


def smalti_step(setting: Setting, compiled: Compiled) -> Step:
    """One training step of smalti's loop, without its logs.

    The network is the peers' but for the GELU of eager float32 on a CPU, which is erf's, the faster one there.
    """
    keep_freed_memory()
    exact = setting.device == "cpu" and setting.precision == "float32" and compiled == "no"
    config = apply_overrides(recipe("mnist"), ["optimizer=adamw", f"batch_size={setting.batch_size}"])
    config = replace(
        config,
        model=replace(setting.config, activation="gelu" if exact else "gelu_tanh"),
        loop=replace(config.loop, precision=setting.precision),
    )
    state, process = new_state(config, torch.device(setting.device)), make_process(config.process)
    rows = training_rows(setting.case).to(setting.device)
    network = torch.compile(state.model, dynamic=False) if compiled == "network" else state.model
    if compiled == "blocks":
        compile_blocks(state.model)

    def step() -> None:
        batch = training_batch(config, process, (rows,), state.step)
        compute_gradients(config, process, state, network, [batch])
        clip_gradients(config, state)
        update_weights(config, state, progress=0.0)
        state.step += 1
        setting.finish()

    return step


def product_step(device: str, precision: Precision) -> Step:
    """Square products, _PRODUCTS of them: what the machine could do in that round."""
    size, dtype = product_side(torch.device(device)), _DTYPES[precision]
    a, b = torch.randn(2, size, size, device=device, dtype=dtype).unbind(0)

    def step() -> None:
        for _ in range(_PRODUCTS):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def candidates(setting: Setting, compile: bool) -> dict[str, tuple[Precision, Callable[[], Step]]]:
    """Each candidate's precision and how its step is made; on a CPU that multiplies bfloat16 in that too."""
    found: dict[str, tuple[Precision, Callable[[], Step]]] = {}

    def add(name: str, make: Callable[..., Step], with_setting: Setting, *arguments: object) -> None:
        found[f"{name}, {with_setting.precision}"] = (with_setting.precision, partial(make, with_setting, *arguments))

    add("diffusers", diffusers_step, setting)
    add("reference", reference_step, setting, False)
    add("smalti", smalti_step, setting, "no")
    if compile:
        add("reference compiled", reference_step, setting, True)
        add("smalti compiled", smalti_step, setting, "blocks")
        add("smalti compiled whole", smalti_step, setting, "network")
    if setting.precision == "float32" and multiplies_bfloat16(torch.device(setting.device)):
        rounded = replace(setting, precision="bfloat16")
        add("reference", reference_step, rounded, False)
        add("smalti", smalti_step, rounded, "no")
        if compile:
            add("smalti compiled", smalti_step, rounded, "blocks")
    return found


def measure(setting: Setting, compile: bool, rounds: int, threads: int, one_at_a_time: bool) -> dict[str, object]:
    """Images a second, the ratio to the straightforward DiT and MFU of each candidate, of its fastest round too."""
    made = candidates(setting, compile)
    precisions = sorted({precision for precision, _ in made.values()})
    torch.set_num_threads(threads)
    best = {p: matmul_peak(torch.device(setting.device), _DTYPES[p], 0.5) / 1e9 for p in precisions}
    factories = {f"products, {p}": partial(product_step, setting.device, p) for p in precisions}
    factories |= {name: factory for name, (_, factory) in made.items()}
    if one_at_a_time:
        measured = {name: interleaved({name: make}, rounds, threads)[name] for name, make in factories.items()}
    else:
        measured = interleaved(factories, rounds, threads)
    round_gflop = _PRODUCTS * 2 * product_side(torch.device(setting.device)) ** 3 / 1e9
    usual = {p: round_gflop / measured[f"products, {p}"]["median"] for p in precisions}
    best = {p: max(best[p], round_gflop / measured[f"products, {p}"]["fastest"]) for p in precisions}
    gflop = 3 * forward_flops(setting.config) * setting.batch_size / 1e9
    base = measured[f"reference, {setting.precision}"]
    results = {}
    for name, (precision, _) in made.items():
        median, fastest = measured[name]["median"], measured[name]["fastest"]
        results[name] = {
            "images_per_second": round(setting.batch_size / median, 1),
            "images_per_second_fastest": round(setting.batch_size / fastest, 1),
            "against_reference": round(base["median"] / median, 3),
            "against_reference_fastest": round(base["fastest"] / fastest, 3),
            f"mfu_of_{precision}": round(gflop / median / usual[precision], 3),
            f"mfu_of_{precision}_fastest": round(gflop / fastest / best[precision], 3),
            "peak_memory_mib": round(measured[name]["peak_memory_mib"]),
        }
    return {
        "products_gflops": {p: round(rate) for p, rate in usual.items()},
        "products_gflops_fastest": {p: round(rate) for p, rate in best.items()},
        "results": results,
    }


def main(
    device: Literal["cpu", "cuda"] = "cpu",
    cases: tuple[str, ...] = (),
    batch_size: int = 128,
    batch_size_s2: int = 8,
    rounds: int = 15,
    rounds_s2: int = 5,
    threads: int = 2,
    compile: bool = True,
    one_at_a_time: bool = False,
    peers_keep_memory: bool = False,
    out: Path = Path(__file__).parent / "results" / "train_throughput.jsonl",
) -> None:
    """Measure each case and append a row for it to --out.

    cases: digits and dit-s-2 on a CPU, dit-b-2 and dit-xl-2 on a GPU by default. batch_size_s2, rounds_s2: of dit-s-2
    on a CPU, where 128 pictures take 30 s a step and some 20 GiB for each candidate.
    """
    for case in cases or (("digits", "dit-s-2") if device == "cpu" else ("dit-b-2", "dit-xl-2")):
        slow = device == "cpu" and case == "dit-s-2"
        setting = Setting(
            case, batch_size_s2 if slow else batch_size, device, "float32" if device == "cpu" else "bfloat16",
            peers_keep_memory,
        )  # fmt: skip
        row = measure(
            setting, compile, rounds_s2 if slow else rounds, threads, one_at_a_time=one_at_a_time or device == "cuda"
        )
        described = {
            "case": case, "device": device_name(device), "batch_size": setting.batch_size,
            "rounds": rounds_s2 if slow else rounds, "peers_keep_memory": peers_keep_memory,
            "gflop_per_image_forward": round(forward_flops(setting.config) / 1e9, 4),
            "diffusers": diffusers.__version__,
        }  # fmt: skip
        if slow and setting.batch_size != batch_size:
            described["why_this_batch_size"] = f"{batch_size} pictures take 30 s a step and 20 GiB for each candidate"
        append_row(out, {**described, **machine(threads), **row}, show=True)


if __name__ == "__main__":
    tyro.cli(main)
