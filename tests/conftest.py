"""Shapes in annotations are checked at run time under pytest, and only there."""

import os

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that spin while they wait take the cores from each other where other work runs too: 590 s became 94 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
install_import_hook(["smalti.nn", "smalti.models"], "beartype.beartype")

import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _two_threads():
    """The thread count is part of what a floating-point sum depends on: fixed, and set back after each test."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(2)
