"""The folder of a small network: config.json with its kind, sizes and a checksum, and model.safetensors."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from smalti.data.durable import publish
from smalti.data.fingerprint import fingerprint
from smalti.errors import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"

NetworkT = TypeVar("NetworkT", bound=nn.Module)


def write_network_folder(folder: Path, kind: str, sizes: Mapping[str, Any], network: nn.Module) -> None:
    """Write both files, each whole or not at all. Raises UserError where the folder cannot be written."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    body = {"kind": kind, **sizes, "sha256": fingerprint(kind, tensors)}
    partial = folder / "partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial)
        publish(partial, folder / WEIGHTS)
        partial.write_text(json.dumps(body, indent=2) + "\n")
        publish(partial, folder / CONFIG)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write to {folder}: {error}") from None


def read_network_sizes(folder: Path, kind: str) -> dict[str, Any]:
    """What config.json says of a network of a kind, "sha256" included. Raises UserError where it is of another."""
    try:
        body = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder / CONFIG} is missing: {folder} holds no {kind}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is damaged: {error}") from None
    found = body.pop("kind", None) if isinstance(body, dict) else None
    if found != kind:
        raise UserError(f"{folder / CONFIG} is not of a {kind}: its kind is {found!r}")
    sizes: dict[str, Any] = body
    return sizes


def config_value(folder: Path, name: str) -> Any:
    """What a folder's config.json, ours or diffusers', says of a name; None where it says nothing or cannot be read."""
    try:
        body = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return None
    return body.get(name) if isinstance(body, dict) else None


def read_network_folder(folder: Path, kind: str, build: Callable[[dict[str, Any]], NetworkT]) -> NetworkT:
    """The network that write_network_folder wrote, frozen, in eval mode. build: from what it was given as sizes.

    Raises UserError for what is missing, damaged or of another kind.
    """
    sizes = read_network_sizes(folder, kind)
    checksum = sizes.pop("sha256", None)
    try:
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise UserError(f"{folder / WEIGHTS} is missing: {folder} holds no {kind}") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged: {error}") from None
    try:
        network = build(sizes)
        network.load_state_dict(tensors)
    except (TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"{folder} is damaged: {str(error).splitlines()[0]}") from None
    if fingerprint(kind, tensors) != checksum:
        raise UserError(f"{folder / WEIGHTS} is damaged: its checksum does not match the one in {CONFIG}")
    return network.eval().requires_grad_(False)
