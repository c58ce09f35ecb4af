"""The diffusers pipeline that the servers of serving_peers.py run: a class-conditional DiT on pixels."""

import io
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from smalti import rng
from smalti.training.memory import keep_freed_memory

_NULL_LABEL = 1000  # of an exported run, as DiTPipeline has it


class ClassPipeline(diffusers.DiffusionPipeline):
    """Class labels to pictures with a DiT on pixels and flow matching, as FluxPipeline drives that scheduler."""

    def __init__(
        self,
        transformer: diffusers.DiTTransformer2DModel,
        scheduler: diffusers.FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(
        self, class_labels: list[int], latents: torch.Tensor, num_inference_steps: int, guidance_scale: float
    ) -> list[Image.Image]:
        """One picture a label; latents: the start noise."""
        guided, count = guidance_scale != 1.0, len(class_labels)
        labels = torch.tensor(class_labels + [_NULL_LABEL] * (count if guided else 0))
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_inference_steps, num_inference_steps))
        for t in self.scheduler.timesteps:
            both = torch.cat([latents, latents]) if guided else latents
            velocity = self.transformer(both, timestep=t.expand(len(both)), class_labels=labels).sample
            if guided:
                conditional, unconditional = velocity.chunk(2)
                velocity = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        return self.image_processor.postprocess(latents, output_type="pil")


def load_pipeline(folder: Path, keep_memory: bool) -> ClassPipeline:
    """The pipeline of an exported run. keep_memory: freed memory stays in the process, as in smalti's."""
    if keep_memory:
        keep_freed_memory()
    return ClassPipeline(
        diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer").eval(),
        diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    )


def draw(
    pipeline: ClassPipeline, class_labels: list[int], seeds: list[int], num_inference_steps: int, guidance_scale: float
) -> list[bytes]:
    """A PNG for each of several labels and seeds."""
    model = pipeline.transformer.config
    shape = (model.in_channels, model.sample_size, model.sample_size)
    latents = rng.normal(shape, seed=torch.tensor(seeds), purpose="sampling/start")
    return [png(image) for image in pipeline(class_labels, latents, num_inference_steps, guidance_scale)]


def png(image: Image.Image) -> bytes:
    """A picture's file."""
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()
