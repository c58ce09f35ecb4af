"""The commands that move weights between formats: convert, export, adapt."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from smalti.cli_arguments import Adapt, Convert, Export
from smalti.errors import UserError


def _changes(config: Any, given: tuple[str, ...]) -> dict[str, Any]:
    """--set field=value texts as values of the config's own types."""
    from smalti.config import parse_field

    known = {f.name for f in fields(config)}
    changes = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text!r} must have the form field=value")
        if name not in known:
            raise UserError(f"--set {text!r}: a {config.kind} has the fields {', '.join(sorted(known))}")
        changes[name] = parse_field(type(config), name, value)
    return changes


def _report(paths: tuple[Path, ...], num_tensors: int, num_values: int, remark: str) -> None:
    print(f"{num_tensors} tensors, {num_values:,} values -> {', '.join(map(str, paths))}")
    if remark:
        print(remark)


def convert_command(command: Convert) -> int:
    """smalti convert."""
    from dataclasses import replace

    from smalti.interop.convert import write_weights
    from smalti.interop.load import read_weights

    weights = read_weights(command.source, checkpoint=command.checkpoint)
    changes = _changes(weights.config, command.set)
    if changes:
        weights = replace(weights, config=replace(weights.config, **changes))
    written = write_weights(
        weights, command.out, command.to, original=command.format, prefix=command.prefix, overwrite=command.overwrite
    )
    _report(written.paths, written.num_tensors, written.num_values, written.remark)
    return 0


def export_command(command: Export) -> int:
    """smalti export."""
    from smalti.interop.convert import export_run

    written = export_run(command.run, command.out, checkpoint=command.checkpoint, overwrite=command.overwrite)
    _report(written.paths, written.num_tensors, written.num_values, written.remark)
    return 0


def adapt_command(command: Adapt) -> int:
    """smalti adapt."""
    from rich.console import Console
    from rich.table import Table

    from smalti.interop.convert import write_weights
    from smalti.interop.load import read_weights
    from smalti.interop.surgery import adapt, changed_fields

    names = ("num_classes", "image_size", "patch_size", "depth", "text_width", "pooled_width")
    changes = {name: value for name in names if (value := getattr(command, name)) is not None}
    if not changes:
        flags = [f"--{name.replace('_', '-')}" for name in names]
        raise UserError(f"give what to change: {', '.join(flags[:-1])} or {flags[-1]}")
    old = read_weights(command.source, checkpoint=command.checkpoint)
    new, report = adapt(old, seed=command.seed, **changes)
    written = write_weights(new, command.out, "smalti", overwrite=command.overwrite)
    table = Table("tensor", "what became of it", "kept", title="; ".join(changed_fields(old.config, new.config)))
    rows = {}
    for line in report:
        if line.how != "kept":
            block = re.match(r"\w+\.\d+", line.name)  # one row for all tensors of a block
            rows[block[0] if block and line.how.startswith("block") else line.name] = line
    for name, line in rows.items():
        table.add_row(name, line.how, f"{100 * line.kept:.0f} %")
    Console(highlight=False, width=120).print(table)
    unchanged = sum(line.how == "kept" for line in report)
    print(f"{unchanged} tensors kept as they were")
    _report(written.paths, written.num_tensors, written.num_values, written.remark)
    return 0
