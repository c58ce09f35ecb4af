"""Shapes in annotations are checked at run time under pytest, and only there."""

import os
import shutil

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that spin while they wait take the cores from each other where other work runs too: 590 s became 94 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
install_import_hook(["smalti.nn", "smalti.models", "smalti.conditioning.tiny"], "beartype.beartype")

import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _two_threads():
    """The thread count is part of what a floating-point sum depends on: fixed, and set back after each test."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """A run of the digits, trained once for all tests. A test that changes a run does so to a copy."""
    from training_runs import trained_config

    from smalti.training.display import PlainDisplay
    from smalti.training.loop import train

    torch.set_num_threads(2)
    path = tmp_path_factory.mktemp("runs") / "trained"
    train(trained_config(), path, display=PlainDisplay(1e9))
    return path


@pytest.fixture(scope="session")
def masked_run(tmp_path_factory):
    """A run of masked tokens, trained once for all tests."""
    from training_runs import masked_config

    from smalti.training.display import PlainDisplay
    from smalti.training.loop import train

    torch.set_num_threads(2)
    path = tmp_path_factory.mktemp("runs") / "masked"
    train(masked_config(), path, display=PlainDisplay(1e9))
    return path


@pytest.fixture(scope="session")
def trained_pipeline(trained_run):
    """The pipeline of the trained run."""
    import smalti

    return smalti.load(trained_run)


@pytest.fixture(scope="module")
def browser():
    """Chromium, through Playwright. Not for longer than a module: its event loop is in the way of asyncio's."""
    api, chromium = pytest.importorskip("playwright.sync_api"), shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield started
        started.close()
