"""SHA-256 of files, weights and labelled tensors: what cached entries are addressed by and checked with."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names and bytes of tensors on the CPU, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(label: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a label and of tensors with their names, types, shapes and bytes, wherever they are."""
    on_cpu = {name: tensor.detach().cpu() for name, tensor in sorted(tensors.items())}
    layout = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in on_cpu.items()]
    return hashlib.sha256(json.dumps([label, layout, tensor_digest(on_cpu)]).encode()).hexdigest()
