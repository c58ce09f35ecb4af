"""Recipes: one function a run; each docstring gives the command, the time and the score to expect."""

from collections.abc import Callable

from smalti.config import RunConfig
from smalti.errors import unknown_name
from smalti.recipes.digits import mnist, mnist_ddpm
from smalti.recipes.masked import mnist_masked
from smalti.recipes.pictures import emoji_32, emoji_64_latent, fashion, folder

_RECIPES: dict[str, Callable[[], RunConfig]] = {
    "mnist": mnist,
    "mnist-ddpm": mnist_ddpm,
    "mnist-masked": mnist_masked,
    "fashion": fashion,
    "emoji-32": emoji_32,
    "emoji-64-latent": emoji_64_latent,
    "folder": folder,
}


def recipe_names() -> list[str]:
    """The known recipes."""
    return sorted(_RECIPES)


def recipe(name: str) -> RunConfig:
    """A recipe's config by name. Raises UserError with the nearest names."""
    if name not in _RECIPES:
        raise unknown_name("recipe", name, _RECIPES)
    return _RECIPES[name]()
