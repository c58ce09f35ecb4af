"""The run that a model's name stands for, where there is no recipe: published settings, to be planned and not run."""

import re

from smalti.conditioning.encoders import LLMText, SD3Text, T5Text, TextConfig
from smalti.config import LoopConfig, RunConfig
from smalti.data.sources.folder import FolderData
from smalti.errors import unknown_name
from smalti.models.mmdit import MMDiTConfig
from smalti.models.pixart import PixArtConfig
from smalti.models.registry import TrainableModelConfig, preset, preset_names
from smalti.models.sana import SanaConfig
from smalti.optim.ema import ExponentialEma
from smalti.optim.optimizers import AdamWConfig
from smalti.optim.schedule import Schedule

PUBLISHED_STEPS, PUBLISHED_BATCH = 400_000, 256  # of the tables in DiT and SiT


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def trainable_models() -> dict[str, TrainableModelConfig]:
    """The networks that smalti trains, by their papers' names as a command line takes them: dit-xl-2."""
    configs = {_plain(name): preset(name) for name in preset_names()}
    return {name: config for name, config in configs.items() if isinstance(config, TrainableModelConfig)}


def planned_config(model: str) -> RunConfig:
    """A run of a model by its paper's name ("DiT-XL/2" or dit-xl-2): AdamW, one average, 256 pictures a step.

    Text-to-image networks read their papers' encoders. Raises UserError with the nearest names.
    """
    models = trainable_models()
    if _plain(model) not in models:
        raise unknown_name("model in --model", model, models)
    config = models[_plain(model)]
    return RunConfig(
        recipe=_plain(model),
        data=FolderData(),
        model=config,
        text=_text_of(config),
        optimizer=AdamWConfig(),
        schedule=Schedule(warmup_steps=0, decay="none"),
        ema=ExponentialEma(),
        loop=LoopConfig(batch_size=PUBLISHED_BATCH, precision="auto"),
    )


def _text_of(config: TrainableModelConfig) -> TextConfig | None:
    if isinstance(config, MMDiTConfig):
        return SD3Text()
    if isinstance(config, PixArtConfig):
        return T5Text(max_tokens=config.null_text_tokens or 120)
    if isinstance(config, SanaConfig):
        return LLMText(max_tokens=300, chat=False, hidden_layer=-1)
    return None
