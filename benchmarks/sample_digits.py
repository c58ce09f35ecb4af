"""Sampling speed: 20 guided DPM-Solver++(2M) calls of DiT-Tiny, smalti against diffusers' network and scheduler.

    python benchmarks/sample_digits.py [--batch-sizes 1 16] [--rounds 15] [--compile]

Both run conditional and unconditional rows in one forward, each in a process of its own, interleaved. smalti's
processes keep freed memory, as `smalti sample` does; `--peers-keep-memory` gives diffusers' that too. Random weights:
speed does not depend on them.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import diffusers
import torch
import tyro
from timing import interleaved, machine, write_row

from smalti.models import build_model
from smalti.models.dit import DiTConfig
from smalti.pipeline import Pipeline
from smalti.recipes import recipe
from smalti.training.memory import keep_freed_memory


def diffusers_sampler(batch_size: int, steps: int, keep_memory: bool) -> Callable[[], torch.Tensor]:
    """As diffusers' DiTPipeline does it, without its progress bar."""
    if keep_memory:
        keep_freed_memory()
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=1, out_channels=1, num_layers=4, sample_size=28,
        patch_size=4, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
    labels = torch.cat([torch.arange(batch_size) % 10, torch.full((batch_size,), 10)])

    @torch.inference_mode()
    def sample() -> torch.Tensor:
        scheduler = diffusers.DPMSolverMultistepScheduler()
        scheduler.set_timesteps(steps)
        latents = torch.randn(batch_size, 1, 28, 28)
        for t in scheduler.timesteps:
            both = model(torch.cat([latents, latents]), timestep=t.expand(2 * batch_size), class_labels=labels).sample
            conditional, unconditional = both.chunk(2)
            latents = scheduler.step(unconditional + 2.0 * (conditional - unconditional), t, latents).prev_sample
        return latents

    return sample


def smalti_sampler(batch_size: int, steps: int, compiled: bool) -> Callable[[], torch.Tensor]:
    """The pipeline as a user calls it, on the same plain DiT-Tiny."""
    keep_freed_memory()
    config = replace(recipe("mnist"), model=DiTConfig(activation="gelu"))
    backbone = build_model(config.model).eval().requires_grad_(False)
    pipe = Pipeline(backbone, config)
    if compiled:
        pipe = pipe.compiled()
    labels = [i % 10 for i in range(batch_size)]
    return lambda: pipe(labels, num_inference_steps=steps, solver="dpmpp_2m", guidance_scale=2.0).tensor


def main(
    batch_sizes: tuple[int, ...] = (1, 16),
    steps: int = 20,
    rounds: int = 15,
    compile: bool = False,
    threads: int = 2,
    peers_keep_memory: bool = False,
) -> None:
    """Measure and append a row a batch size to benchmarks/results/sample_digits.jsonl."""
    for batch_size in batch_sizes:
        candidates: dict[str, Callable[[], Callable[[], torch.Tensor]]] = {
            "diffusers": partial(diffusers_sampler, batch_size, steps, peers_keep_memory),
            "smalti eager": partial(smalti_sampler, batch_size, steps, False),
        }
        if compile:
            candidates["smalti compiled"] = partial(smalti_sampler, batch_size, steps, True)
        seconds = interleaved(candidates, rounds, threads)
        base = seconds["diffusers"]
        table = {
            name: {
                "seconds": round(s["median"], 4),
                "fastest_seconds": round(s["fastest"], 4),
                "against_diffusers": round(base["median"] / s["median"], 3),
                "against_diffusers_fastest": round(base["fastest"] / s["fastest"], 3),
            }
            for name, s in seconds.items()
        }
        setting = {
            "batch_size": batch_size,
            "calls": steps,
            "rounds": rounds,
            "diffusers_version": diffusers.__version__,
            "peers_keep_memory": peers_keep_memory,
        }
        write_row("sample_digits", {**setting, **machine(threads), "results": table})


if __name__ == "__main__":
    tyro.cli(main)
