"""aMUSEd's pipelines from a diffusers folder: text to image, image to image, inpainting, with our network.

The folder holds transformer (UVit2DModel), vqvae (VQModel), text_encoder (CLIPTextModelWithProjection), tokenizer and
scheduler. What is decoded is sampling/masked.py's; from the same random numbers the tokens are those of diffusers'
AmusedPipeline, AmusedImg2ImgPipeline and AmusedInpaintPipeline (tests/oracles/test_amused_pipelines.py), but for two
corners of theirs: strength=1 of image to image masks everything here, where they mask nothing; and a row without a
masked token is done here, where they mask one again that was given.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti import rng
from smalti.autoencoders.from_diffusers import VQTokens
from smalti.autoencoders.protocol import Tokenizer
from smalti.autoencoders.registry import load_tokenizer
from smalti.conditioning.encoders import CLIPText, TextEncoder, build_text_encoder
from smalti.diffusion.masking import Masking
from smalti.errors import UserError
from smalti.interop.load import load_backbone
from smalti.models.amused import Amused
from smalti.sampling.masked import MaskedPlan, MaskedTrajectories, cosine_shares, masked_plan
from smalti.types import MASKED, Condition, concat_conditions

_MASKINGS = {"cosine": "masked_cosine", "linear": "masked_linear"}  # AmusedScheduler's masking_schedule


@dataclass(frozen=True, eq=False)
class AmusedPlan(MaskedPlan):
    """A plan whose shares are of the tokens hidden at its start, hidden_share of all, and rounded as AmusedScheduler's.

    It counts floor(tokens share) in float32, where cos(pi / 3) is below 1/2 and 1 - 1/3 is below 2/3.
    """

    hidden_share: float = 1.0

    @cached_property
    def masked_shares(self) -> Tensor:
        """Share of all tokens that is hidden after each call, float32 [calls]."""
        next_times = torch.from_numpy(self.next_times)
        linear = self.process.name == _MASKINGS["linear"]
        shares = 1 - (1 - next_times).float() if linear else cosine_shares(next_times)
        return torch.tensor(self.hidden_share, dtype=torch.float32) * shares


@dataclass(frozen=True)
class AmusedSampling:
    """How to sample; the defaults are diffusers'.

    guidance_scale: of the logits, 1 is off. choice_temperature: of the noise on the confidence at the first of
    num_inference_steps, falling to 0. aesthetic_score, crop_left, crop_top: what the network is told beside the size.
    """

    num_inference_steps: int = 12
    guidance_scale: float = 10.0
    negative_prompt: str = ""
    choice_temperature: float = 2.0
    aesthetic_score: float = 6.0
    crop_left: int = 0
    crop_top: int = 0

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise UserError(f"num_inference_steps={self.num_inference_steps} must be at least 1")
        if self.guidance_scale < 1:
            raise UserError(f"guidance_scale={self.guidance_scale} must be at least 1, which is off")

    def plan(self, masking: Masking, strength: float = 1.0, hidden_share: float = 1.0) -> AmusedPlan:
        """The last int(num_inference_steps strength) of the steps. Raises UserError where that is none."""
        steps = self.num_inference_steps
        calls = int(steps * strength)
        if not 0.0 < strength <= 1.0 or calls < 1:
            raise UserError(f"strength={strength} must lie in [1 / num_inference_steps, 1], here {1 / steps:.3g} .. 1")
        # Of the noise that falls linearly over all steps, what is left at the first of these.
        choice = self.choice_temperature * (calls - 1) / (steps - 1) if steps > 1 else self.choice_temperature
        plan = masked_plan(masking, calls, t_start=calls / steps, choice_temperature=choice)
        return AmusedPlan(**{f.name: getattr(plan, f.name) for f in fields(plan)}, hidden_share=hidden_share)


@dataclass(frozen=True)
class AmusedPictures:
    """tokens: int64 [batch, rows, columns]. pictures: [batch, 3, height, width], cut to [-1, 1]."""

    tokens: Tensor
    pictures: Tensor


@dataclass(frozen=True)
class AmusedPipeline:
    """The parts of a pipeline, frozen. masking: the scheduler's, for all but inpainting, which takes the linear one.

    Picture i of a call depends on prompts[i], seeds[i] and what is common to the call alone.
    """

    network: Amused
    encoder: TextEncoder
    tokenizer: Tokenizer
    masking: Masking

    def text_to_image(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        image_size: tuple[int, int] | None = None,
        sampling: AmusedSampling | None = None,
    ) -> AmusedPictures:
        """Pictures of prompts, one a prompt. image_size: height and width, the network's own by default.

        Raises UserError for a size that the tokenizer's factor does not divide.
        """
        sampling = sampling or AmusedSampling()
        side, factor = self.network.config.grid_size, self.tokenizer.factor
        height, width = image_size or (side * factor, side * factor)
        if min(height, width) < 1 or height % factor or width % factor:
            raise UserError(f"image_size={height, width}: the tokenizer's factor of {factor} must divide both")
        x = torch.full((len(prompts), height // factor, width // factor), MASKED, device=self._device)
        return self._decoded(sampling.plan(self.masking), x, prompts, seeds, sampling)

    def image_to_image(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        pictures: Tensor,
        strength: float = 0.5,
        sampling: AmusedSampling | None = None,
    ) -> AmusedPictures:
        """Pictures [1 or batch, 3, height, width] in [-1, 1] of which a part of the tokens is masked and redrawn.

        strength: the last int(num_inference_steps strength) steps are done, and each token is masked with the
        probability that is the masked share where they begin.
        """
        sampling = sampling or AmusedSampling()
        plan = sampling.plan(self.masking, strength)
        tokens = self._tokens(pictures, len(prompts))
        share = self.masking.sigma(torch.tensor(plan.times[0])).float()
        u = rng.uniform(tuple(tokens.shape[1:]), seed=torch.tensor(seeds), purpose="sampling/start").float()
        x = torch.where((u < share).to(self._device), MASKED, tokens)
        return self._decoded(plan, x, prompts, seeds, sampling)

    def inpaint(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        pictures: Tensor,
        mask: Tensor,
        strength: float = 1.0,
        sampling: AmusedSampling | None = None,
    ) -> AmusedPictures:
        """Pictures [1 or batch, 3, height, width] redrawn where mask [height, width] is 1; where it is 0, tokens stay.

        A token is redrawn where the mask's mean over its pixels is at least 1/2. strength: as of image_to_image(); all
        the tokens to redraw are masked at the start, whatever it is. Raises UserError for a mask that selects none.
        """
        sampling = sampling or AmusedSampling()
        tokens = self._tokens(pictures, len(prompts))
        if mask.shape != pictures.shape[-2:]:
            raise UserError(
                f"mask is {tuple(mask.shape)}, that of the pictures is needed: {tuple(pictures.shape[-2:])}"
            )
        factor = self.tokenizer.factor
        hidden = F.avg_pool2d(mask.float()[None, None], factor)[0, 0] >= 0.5
        if not hidden.any():
            raise UserError(f"mask selects no token: of one's {factor} x {factor} pixels at least half must be white")
        plan = sampling.plan(Masking("masked_linear"), strength, float(hidden.sum() / hidden.numel()))
        x = torch.where(hidden.to(self._device), MASKED, tokens)
        return self._decoded(plan, x, prompts, seeds, sampling)

    @property
    def _device(self) -> torch.device:
        return self.network.output.weight.device

    def _tokens(self, pictures: Tensor, batch: int) -> Tensor:
        """Tokens of pictures, one picture for all or one each."""
        if len(pictures) not in (1, batch):
            raise UserError(f"{len(pictures)} pictures for {batch} prompts: needed is 1, or {batch}")
        return self.tokenizer.encode(pictures.to(self._device)).expand(batch, -1, -1)

    def _condition(self, prompts: Sequence[str], size: tuple[int, int], sampling: AmusedSampling) -> Condition:
        """What the network is told of pictures of a size (height, width)."""
        text = self.encoder(prompts)
        height, width = size
        # In this order, width before height: what the network was trained on.
        micro = [width, height, sampling.crop_left, sampling.crop_top, sampling.aesthetic_score]
        told = torch.tensor(micro, dtype=torch.float32, device=self._device).expand(len(prompts), -1)
        return Condition(text_embeds=text.text_embeds, pooled_embeds=text.pooled_embeds, micro_conditions=told)

    @torch.no_grad()
    def _decoded(
        self, plan: MaskedPlan, x: Tensor, prompts: Sequence[str], seeds: Sequence[int], sampling: AmusedSampling
    ) -> AmusedPictures:
        if not prompts or len(prompts) != len(seeds):
            raise UserError(f"{len(prompts)} prompts and {len(seeds)} seeds: needed is a seed for each of the prompts")
        batch, factor, guided = len(x), self.tokenizer.factor, sampling.guidance_scale > 1
        size = (x.shape[1] * factor, x.shape[2] * factor)
        cond = self._condition(prompts, size, sampling)
        if guided:
            cond = concat_conditions(self._condition([sampling.negative_prompt] * batch, size, sampling), cond)
        device = self._device
        trajectories = MaskedTrajectories(
            plan, torch.arange(batch, device=device), torch.tensor(seeds, device=device), x
        )
        while not trajectories.done:
            tokens = torch.where(trajectories.x == MASKED, self.network.config.mask_token, trajectories.x)
            logits = self.network(torch.cat([tokens, tokens]) if guided else tokens, None, cond)
            if guided:
                negative, positive = logits.chunk(2)
                logits = negative + sampling.guidance_scale * (positive - negative)
            trajectories.advance(logits)
        return AmusedPictures(trajectories.x, self.tokenizer.decode(trajectories.x).clamp(-1, 1))


def load_amused(folder: str | Path, device: torch.device | str = "cpu") -> AmusedPipeline:
    """The pipeline of a folder that diffusers' save_pretrained wrote, in float32.

    Raises UserError where a part is missing, damaged, or does not fit the others.
    """
    folder = Path(folder)
    name = _json_object(folder / "model_index.json").get("_class_name")
    if not str(name).startswith("Amused"):
        raise UserError(f"{folder / 'model_index.json'} is of an {name}: load_amused reads an AmusedPipeline")
    network = load_backbone(folder / "transformer", device=device)
    if not isinstance(network, Amused):
        raise UserError(f"{folder / 'transformer'} is no UVit2DModel")
    scheduler = _json_object(folder / "scheduler" / "scheduler_config.json")
    masking, mask_token = scheduler.get("masking_schedule", "cosine"), scheduler.get("mask_token_id")
    where = folder / "scheduler" / "scheduler_config.json"
    if masking not in _MASKINGS:
        raise UserError(f"{where}: masking_schedule={masking!r} must be one of {', '.join(_MASKINGS)}")
    if mask_token != network.config.mask_token:
        raise UserError(f"{where}: mask_token_id={mask_token}, and the network's is {network.config.mask_token}")
    encoder = build_text_encoder(CLIPText(str(folder / "text_encoder")), device)
    text = encoder([""])
    for field, given in (("text_width", text.text_embeds), ("pooled_width", text.pooled_embeds)):
        assert given is not None
        if given.shape[-1] != getattr(network.config, field):
            raise UserError(
                f"{folder / 'text_encoder'} gives {field}={given.shape[-1]}: the network takes "
                f"{getattr(network.config, field)}"
            )
    tokenizer = load_tokenizer(VQTokens(str(folder), "vqvae", network.config.codebook_size), device)
    return AmusedPipeline(network, encoder, tokenizer, Masking(_MASKINGS[masking]))


def _json_object(path: Path) -> dict[str, object]:
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged: {error}") from None
    if not isinstance(body, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return body
