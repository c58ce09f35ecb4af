"""aMUSEd's three pipelines against diffusers' on the same random weights and from the same random numbers.

diffusers draws from a torch.Generator, we from addresses; here both take the numbers of our addresses, by which
diffusers' draws are replaced: torch.multinomial by the inverse distribution function, its uniform numbers by ours.
"""

import json
from contextlib import contextmanager

import diffusers
import pytest
import torch
import transformers
from diffusers.schedulers import scheduling_amused
from oracles.parity import randomised
from oracles.test_amused_diffusers import TINY
from oracles.test_text_encoders import clip, tokenizer

from smalti import rng
from smalti.diffusion.masking import Masking
from smalti.errors import UserError
from smalti.interop.amused_pipeline import AmusedSampling, load_amused
from smalti.sampling.masked import hide_least_confident
from smalti.types import MASKED

PROMPTS, SEEDS = ["a Red Heart", "two people holding hands"], [3, 2**40 + 7]


def modules(folder, masking="cosine"):
    """Random weights, large enough that the logits tell tokens apart."""
    vqvae = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, num_vq_embeddings=32,
        lookup_from_codebook=True,
    )  # fmt: skip
    randomised(vqvae, std=0.2)
    vqvae.quantize.embedding.weight.data.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    return {
        "vqvae": vqvae,
        "tokenizer": tokenizer(folder / "tokenizer", "<start> $A <end>", 77, pad="<end>"),
        "text_encoder": clip(folder / "text_encoder", transformers.CLIPTextModelWithProjection, 20, 24),
        "transformer": randomised(diffusers.UVit2DModel(**TINY), std=0.2, seed=5),
        "scheduler": diffusers.AmusedScheduler(mask_token_id=39, masking_schedule=masking),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("amused")
    parts = modules(folder)
    diffusers.AmusedPipeline(**parts).save_pretrained(folder)
    return folder, parts


def pipeline(cls, parts):
    """With a scheduler of its own: the inpainting pipeline changes its masking_schedule to linear, for all."""
    return cls(**{**parts, "scheduler": diffusers.AmusedScheduler.from_config(parts["scheduler"].config)})


@pytest.fixture(scope="module")
def ours(saved):
    return load_amused(saved[0])


@contextmanager
def our_numbers(monkeypatch, seeds, grid, calls):
    """diffusers' draws replaced by those of our addresses, call after call."""
    seeds, counts = torch.tensor(seeds), {"token": 0, "choice": 0}

    def uniform(purpose, call=0):
        return rng.uniform(grid, seed=seeds, purpose=f"sampling/{purpose}", call=call)

    def multinomial(probs, num_samples, generator=None):
        assert num_samples == 1
        u = uniform("token", counts["token"]).reshape(-1, 1)
        counts["token"] += 1
        shares = probs.double().cumsum(1)
        return torch.searchsorted(shares, u * shares[:, -1:])

    def gumbel(t, generator=None):
        u = uniform("choice", counts["choice"]).reshape(t.shape)
        counts["choice"] += 1
        return -torch.log(-torch.log(u)).float()

    with monkeypatch.context() as patched:
        patched.setattr(torch, "multinomial", multinomial)
        patched.setattr(torch, "rand", lambda *shape, **options: uniform("start").float())
        patched.setattr(scheduling_amused, "gumbel_noise", gumbel)
        yield
    assert counts == {"token": calls, "choice": calls - 1}


def their_tokens_and_pictures(made, **arguments):
    """The tokens that diffusers decodes, and its pictures in [0, 1]."""
    seen = []
    made.set_progress_bar_config(disable=True)
    pictures = made(**arguments, output_type="pt", callback=lambda step, t, tokens: seen.append(tokens.clone())).images
    return seen[-1], pictures


def assert_equal(result, tokens, pictures):
    assert torch.equal(result.tokens, tokens)
    assert len(tokens.unique()) > 4
    torch.testing.assert_close((result.pictures + 1) / 2, pictures, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("sampling", "size"),
    [
        (AmusedSampling(), None),
        (AmusedSampling(5, 1.0, choice_temperature=4.5), (12, 20)),
        (AmusedSampling(12, 3.0, "bad, blurry", 0.0, 5.5, 16, 8), None),
        (AmusedSampling(1), None),
    ],
)
def test_text_to_image(saved, ours, monkeypatch, sampling, size):
    height, width = size or (16, 16)
    with our_numbers(monkeypatch, SEEDS, (height // 2, width // 2), sampling.num_inference_steps):
        theirs = their_tokens_and_pictures(
            pipeline(diffusers.AmusedPipeline, saved[1]), prompt=PROMPTS,
            num_inference_steps=sampling.num_inference_steps, guidance_scale=sampling.guidance_scale,
            negative_prompt=[sampling.negative_prompt] * 2,
            temperature=(sampling.choice_temperature, 0), height=height, width=width,
            micro_conditioning_aesthetic_score=sampling.aesthetic_score,
            micro_conditioning_crop_coord=(sampling.crop_left, sampling.crop_top),
        )  # fmt: skip
    assert_equal(ours.text_to_image(PROMPTS, SEEDS, size, sampling), *theirs)


@pytest.mark.parametrize("strength", [0.5, 0.9])
def test_image_to_image(saved, ours, monkeypatch, strength):
    pictures = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with our_numbers(monkeypatch, SEEDS, (8, 12), int(12 * strength)):
        theirs = their_tokens_and_pictures(
            pipeline(diffusers.AmusedImg2ImgPipeline, saved[1]),
            prompt=PROMPTS,
            image=(pictures + 1) / 2,
            strength=strength,
        )
    result = ours.image_to_image(PROMPTS, SEEDS, pictures, strength)
    assert_equal(result, *theirs)
    share = float((result.tokens == ours.tokenizer.encode(pictures)).float().mean())
    assert (0.2 if strength == 0.5 else 0.0) < share < 0.7  # cos(pi / 4) = 0.71 are masked at 0.5, 0.99 at 0.9


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpaint(saved, ours, monkeypatch, strength):
    pictures = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mask = torch.zeros(16, 24)
    mask[2:12, 4:22] = 1.0
    with our_numbers(monkeypatch, SEEDS, (8, 12), int(12 * strength)):
        theirs = their_tokens_and_pictures(
            pipeline(diffusers.AmusedInpaintPipeline, saved[1]), prompt=PROMPTS[:1], num_images_per_prompt=2,
            image=(pictures + 1) / 2, mask_image=mask[::2, ::2][None, None], strength=strength,
        )  # fmt: skip
    result = ours.inpaint(PROMPTS[:1] * 2, SEEDS, pictures, mask, strength)
    assert_equal(result, *theirs)
    kept = mask[::2, ::2] == 0
    assert torch.equal(result.tokens[:, kept], ours.tokenizer.encode(pictures).expand(2, -1, -1)[:, kept])
    assert not torch.equal(*result.tokens)


@pytest.mark.parametrize("masking", ["cosine", "linear"])
def test_the_scheduler_alone_from_one_generator(masking):
    """Step by step on random logits: the same torch.Generator, nothing of diffusers' replaced."""
    steps, size = 12, (2, 32, 6, 7)
    scheduler = diffusers.AmusedScheduler(mask_token_id=39, masking_schedule=masking)
    scheduler.set_timesteps(steps, (2, 0))
    plan = AmusedSampling(steps).plan(Masking(f"masked_{masking}"))
    logits_of = torch.Generator().manual_seed(0)
    ours = torch.full((2, 6, 7), MASKED)
    for call, timestep in enumerate(scheduler.timesteps):
        logits = 3 * torch.randn(size, generator=logits_of)
        hidden = ours == MASKED
        theirs = scheduler.step(
            logits, timestep, torch.where(hidden, 39, ours), generator=torch.Generator().manual_seed(call)
        )
        generator = torch.Generator().manual_seed(call)
        shares = logits.flatten(2).movedim(1, -1).softmax(-1)
        drawn = torch.multinomial(shares.reshape(-1, 32), 1, generator=generator).view(2, 6, 7)
        drawn = torch.where(hidden, drawn, ours)
        assert torch.equal(drawn, theirs.pred_original_sample)
        if call + 1 < steps:
            u = torch.zeros(2, 42).uniform_(0, 1, generator=generator).view(2, 6, 7)
            noise = float(plan.choice_temperatures[call]) * -torch.log(-torch.log(u))
            log_probabilities = logits.log_softmax(1).gather(1, drawn[:, None])[:, 0]
            count = (plan.masked_shares[call] * 42).floor().long().expand(2)
            ours = hide_least_confident(ours, drawn, log_probabilities, noise, count)
        else:
            ours = drawn
        assert torch.equal(torch.where(ours == MASKED, 39, ours), theirs.prev_sample)


def test_corners_where_diffusers_differs(ours):
    pictures = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    given = ours.tokenizer.encode(pictures)
    # strength=1 redraws everything: it is text to image. diffusers' image to image then begins with nothing masked.
    scheduler = diffusers.AmusedScheduler(mask_token_id=39)
    scheduler.set_timesteps(12)
    assert torch.equal(scheduler.add_noise(given, scheduler.timesteps[-1]), given)
    whole = ours.image_to_image(PROMPTS, SEEDS, pictures, 1.0).tokens
    assert torch.equal(whole, ours.text_to_image(PROMPTS, SEEDS).tokens)
    # Nothing that was given is masked again, however many steps are left.
    mask = torch.zeros(16, 16)
    mask[:4, :2] = 1.0  # two tokens
    result = ours.inpaint(PROMPTS, SEEDS, pictures, mask).tokens
    assert torch.equal(result.flatten(1)[:, 16:], given.flatten(1).expand(2, -1)[:, 16:])
    assert result.min() >= 0


def test_a_picture_depends_on_its_own_prompt_and_seed(ours):
    together = ours.text_to_image(PROMPTS, SEEDS, sampling=AmusedSampling(4))
    alone = ours.text_to_image(PROMPTS[1:], SEEDS[1:], sampling=AmusedSampling(4))
    assert torch.equal(together.tokens[1:], alone.tokens)


def test_mistakes_are_said(saved, ours, tmp_path):
    pictures, mask = torch.zeros(1, 3, 16, 16), torch.zeros(16, 16)
    for call, words in {
        lambda: ours.inpaint(PROMPTS, SEEDS, pictures, mask): "mask selects no token",
        lambda: ours.inpaint(PROMPTS, SEEDS, pictures, mask[:8]): r"mask is \(8, 16\), that of the pictures is needed",
        lambda: ours.image_to_image(PROMPTS, SEEDS, pictures, 0.05): r"strength=0\.05 must lie in \[1 / num_inference",
        lambda: ours.image_to_image(PROMPTS, SEEDS, pictures.expand(3, -1, -1, -1)): "3 pictures for 2 prompts",
        lambda: ours.text_to_image(PROMPTS, SEEDS[:1]): "2 prompts and 1 seeds",
        lambda: ours.text_to_image(PROMPTS, SEEDS, (15, 16)): "factor of 2 must divide both",
        lambda: AmusedSampling(0): "num_inference_steps=0",
        lambda: AmusedSampling(guidance_scale=0.5): r"guidance_scale=0\.5 must be at least 1",
        lambda: load_amused(tmp_path): r"model_index\.json is missing",
    }.items():
        with pytest.raises(UserError, match=words):
            call()
    folder, parts = saved
    index = json.loads((folder / "model_index.json").read_text())
    for changed, words in {
        (("transformer", "codebook_size"), 24): "autoencoder.codebook_size=24: the tokenizer at .* has 32",
        (("scheduler", "mask_token_id"), 8255): "mask_token_id=8255, and the network's is 39",
        (("scheduler", "masking_schedule"), "cubic"): "masking_schedule='cubic' must be one of cosine, linear",
    }.items():
        (part, field), value = changed
        other = {**parts}
        if part == "transformer":
            other[part] = diffusers.UVit2DModel(**{**TINY, field: value})
        diffusers.AmusedPipeline(**other).save_pretrained(tmp_path / field)
        if part == "scheduler":
            path = tmp_path / field / "scheduler" / "scheduler_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
        with pytest.raises(UserError, match=words):
            load_amused(tmp_path / field)
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="is of an FluxPipeline"):
        load_amused(tmp_path)
