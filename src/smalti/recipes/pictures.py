"""Runs on pictures with captions: the emoji set, your own folder, Fashion-MNIST."""

from dataclasses import replace

from smalti.autoencoders.registry import SmallKLAutoencoder
from smalti.conditioning.captions import CaptionPolicy
from smalti.conditioning.tiny import TinyTextConfig
from smalti.config import Budget, LoopConfig, RunConfig, SamplingConfig
from smalti.data.sources.folder import FolderData
from smalti.data.sources.idx import IdxData
from smalti.diffusion.objective import Objective
from smalti.diffusion.timesteps import LogitNormalTimesteps
from smalti.models.mmdit import MMDiTConfig
from smalti.optim.ema import PowerEma
from smalti.optim.optimizers import MuonConfig
from smalti.optim.schedule import Schedule
from smalti.recipes.digits import mnist

_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # where Debian's dataset-fashion-mnist puts it


def emoji_32() -> RunConfig:
    """Text to image on 32-pixel emoji: MM-DiT with its own text encoder, 30 minutes on two CPU cores, no download.

    smalti data emoji && smalti train emoji-32 --minutes 30
    docs/text-to-image.md has what it reaches.
    """
    text = TinyTextConfig(max_tokens=20)
    return RunConfig(
        recipe="emoji-32",
        data=FolderData(path="emoji"),
        budget=Budget("minutes", 30.0),
        model=MMDiTConfig(
            image_size=(32, 32),
            in_channels=3,
            patch_size=4,
            width=192,
            depth=6,
            num_heads=6,
            text_width=text.width,
            pooled_width=text.width,
            position_grid=16,
            qk_norm=True,
            initialisation="wide",
        ),
        text=text,
        captions=CaptionPolicy(dropout=0.1),
        process="rectified_flow",
        objective=Objective("velocity"),
        timesteps=LogitNormalTimesteps(mean=0.5),
        optimizer=MuonConfig(learning_rate=4e-3, adamw_learning_rate=4e-3),
        schedule=Schedule(),
        ema=PowerEma(),
        loop=LoopConfig(
            batch_size=64,
            stratified_timesteps=True,
            validate_every=500,
            checkpoint_every=500,
            preview_every=1000,
            precision="auto",
            compile=True,
        ),
        sampling=SamplingConfig(guidance_scale=3.0),
    )


def emoji_64_latent() -> RunConfig:
    """Text to image on 64-pixel emoji in the latents of a small autoencoder, trained first; for hours of CPU or a GPU.

    smalti data emoji && smalti train-autoencoder emoji --size 64 64 --minutes 20 --out runs/autoencoder
    smalti train emoji-64-latent --minutes 120
    """
    base = emoji_32()
    model = base.model
    assert isinstance(model, MMDiTConfig)
    return replace(
        base,
        recipe="emoji-64-latent",
        autoencoder=SmallKLAutoencoder(path="runs/autoencoder"),
        budget=Budget("minutes", 120.0),
        model=replace(model, image_size=(16, 16), in_channels=4, patch_size=2, width=256, depth=8, num_heads=8),
    )


def folder() -> RunConfig:
    """Text to image on a folder of your own pictures with captions, at 64 pixels.

    smalti train folder --set data.path=my-pictures
    The folder holds metadata.jsonl with file_name and text, or a folder a class. `smalti doctor folder --set
    data.path=my-pictures` says first whether it will work and how long it will take.
    """
    base = emoji_32()
    model = base.model
    assert isinstance(model, MMDiTConfig)
    return replace(
        base,
        recipe="folder",
        data=FolderData(path="pictures"),
        budget=Budget("epochs", 100.0),
        model=replace(model, image_size=(64, 64), width=256, depth=8, num_heads=8),
    )


def fashion() -> RunConfig:
    """Fashion-MNIST by class with the digits' recipe: 60,000 pictures of clothes, 28 x 28.

    smalti train fashion --minutes 5
    Needs Debian's dataset-fashion-mnist, or any folder of IDX files (--set data.path=...).
    """
    return replace(mnist(), recipe="fashion", data=IdxData(path=_FASHION_MNIST), budget=Budget("minutes", 5.0))
