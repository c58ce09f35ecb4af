"""What `smalti info` prints of a run or a recipe."""

from pathlib import Path

import torch
from rich.console import Group, RenderableType
from rich.table import Table

from smalti.conditioning.tiny import TinyTextConfig, TinyTextEncoder
from smalti.config import RunConfig, flat_json
from smalti.errors import UserError
from smalti.models.registry import build_model, count_parameters, forward_flops
from smalti.recipes import recipe, recipe_names
from smalti.run_folder import RunFolder, read_config, read_record


def _pairs(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows:
        table.add_row(name, value)
    return table


def _model_tables(config: RunConfig) -> list[Table]:
    with torch.device("meta"):
        parts = count_parameters(build_model(config.model, codebook_size=config.codebook_size))
        if isinstance(config.text, TinyTextConfig):
            parts["text encoder"] = sum(count_parameters(TinyTextEncoder(config.text)).values())
    rows = [(name, f"{count:,}") for name, count in parts.items()] + [("total", f"{sum(parts.values()):,}")]
    text_tokens = 0 if config.text is None else config.text.max_tokens
    flops = forward_flops(config.model, None, text_tokens, config.codebook_size)
    cost = [
        ("forward", f"{flops / 1e6:,.1f} MFLOP a picture"),
        ("training step", f"{3 * flops * config.loop.batch_size / 1e9:,.1f} GFLOP at batch {config.loop.batch_size}"),
    ]
    return [_pairs("[bold]Parameters", rows), _pairs("[bold]Cost", cost)]


def describe(name: str) -> RenderableType:
    """Tables of a run directory or a recipe's name. Raises UserError for what is neither."""
    path = Path(name)
    if not path.exists() and name in recipe_names():
        config, trained = recipe(name), [("recipe", f"not trained yet: smalti train {name}")]
    elif not path.exists() and "/" not in name:
        raise UserError(f"{name!r} is neither a run directory nor a recipe; recipes: {', '.join(recipe_names())}")
    else:
        config = read_config(path)
        trained = [(key, str(value)) for key, value in read_record(RunFolder(path)).items()]
    return Group(
        *_model_tables(config),
        _pairs("[bold]Training", trained),
        _pairs(
            "[bold]Config (each name is what --set takes)",
            [(path, str(value)) for path, value in flat_json(config).items()],
        ),
    )
