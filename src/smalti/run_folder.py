"""The run directory: where each thing of a run lies, and reading it back.

config.json       everything that defines the run          checkpoints/      see checkpoint.py
run.json          how, where and when it was trained        samples/          grids drawn while training
tokenizer.json    of a run that reads prompts               latents.json      of a run on latents: their mean and std
metrics.jsonl     losses; the same bytes for the same run   samples.png       the newest grid
timing.jsonl      images a second, seconds                  tensorboard/      the same for TensorBoard
ema_snapshots/    averages of ema=post_hoc                  trackers.json     the run's ids at experiment trackers
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smalti.config import RunConfig, from_json, to_json
from smalti.errors import UserError


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run directory."""

    path: Path

    @property
    def config(self) -> Path:
        """The run's full config."""
        return self.path / "config.json"

    @property
    def record(self) -> Path:
        """How the run was trained."""
        return self.path / "run.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def ema_snapshots(self) -> Path:
        """Folder of the averages that `smalti ema` makes others from."""
        return self.path / "ema_snapshots"

    @property
    def trackers(self) -> Path:
        """The run's ids at experiment trackers, by which a resumed run goes on with its curves."""
        return self.path / "trackers.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of the run's own text encoder."""
        return self.path / "tokenizer.json"

    @property
    def latents(self) -> Path:
        """Mean and standard deviation of the latents that the run was trained on."""
        return self.path / "latents.json"

    @property
    def ems(self) -> Path:
        """The network's statistics for DPM-Solver-v3, where they have been measured."""
        return self.path / "ems.npz"

    @property
    def metrics(self) -> Path:
        """Losses by step."""
        return self.path / "metrics.jsonl"

    @property
    def timing(self) -> Path:
        """Speed by step."""
        return self.path / "timing.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def previews(self) -> Path:
        """Grids drawn while training."""
        return self.path / "samples"

    @property
    def newest_grid(self) -> Path:
        """The last grid drawn."""
        return self.path / "samples.png"

    @property
    def failure(self) -> Path:
        """What is kept of a step whose loss was not finite."""
        return self.path / "failure"


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def finite_json(body: Any) -> Any:
    """A JSON body with null in the place of each float that is not finite, which JSON has no word for."""
    if isinstance(body, dict):
        return {name: finite_json(value) for name, value in body.items()}
    if isinstance(body, list | tuple):
        return [finite_json(value) for value in body]
    return None if isinstance(body, float) and not math.isfinite(body) else body


def write_json(path: Path, body: Any) -> None:
    """Write JSON so that a reader never sees half of it."""
    write_text(path, json.dumps(finite_json(body), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """A JSON file's body. Raises UserError where it cannot be read or does not parse."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from None


def append_row(path: Path, row: Any) -> None:
    """Write a row of JSON at the end of a JSONL file, on a line of its own also where a kill tore the last one."""
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write(("\n" if torn else "") + json.dumps(finite_json(row)) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, none where there is no file. A line that a kill tore is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def read_config(path: Path) -> RunConfig:
    """The config of a run directory. Raises UserError where there is no run or its config does not parse."""
    folder = RunFolder(path)
    if not path.exists():
        raise UserError(f"there is no run at {path}: train one with `smalti train mnist --out {path}`")
    if not folder.config.is_file():
        raise UserError(f"{path} is not a run directory: {folder.config} is missing")
    try:
        body = json.loads(folder.config.read_text())
    except ValueError as error:
        raise UserError(f"{folder.config} is damaged: {error}") from None
    if not isinstance(body, dict):
        raise UserError(f"{folder.config} is damaged: it holds no object")
    config = from_json(RunConfig, body)
    assert isinstance(config, RunConfig)
    return config


def write_config(folder: RunFolder, config: RunConfig) -> None:
    """Write config.json."""
    write_json(folder.config, to_json(config))


def read_record(folder: RunFolder) -> dict[str, Any]:
    """run.json, or an empty record where it is missing or damaged."""
    try:
        body = json.loads(folder.record.read_text())
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def cache_folder() -> Path:
    """Where smalti keeps what it can make again: $SMALTI_CACHE, or smalti/ in the user's cache folder."""
    explicit = os.environ.get("SMALTI_CACHE")
    base = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    return Path(explicit) if explicit else Path(base) / "smalti"
