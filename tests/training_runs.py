"""Small runs for tests."""

from dataclasses import replace
from pathlib import Path

from smalti.config import Budget, RunConfig, apply_overrides
from smalti.recipes import recipe

TINY = [
    "model.width=32", "depth=1", "num_heads=2", "batch_size=8", "log_every=1", "checkpoint_every=3",
    "validate_every=7", "preview_every=1000", "sampling.num_inference_steps=2", "warmup_steps=2",
]  # fmt: skip


def tiny_config(steps: int = 12, *overrides: str) -> RunConfig:
    """DiT of 32 channels and one block, 8 digits a step."""
    return replace(apply_overrides(recipe("mnist"), [*TINY, *overrides]), budget=Budget("steps", steps))


def trained_config() -> RunConfig:
    """DiT of 32 channels and two blocks that sees 4,800 digits: seconds of training, estimates of a picture's size."""
    return tiny_config(
        150, "depth=2", "batch_size=32", "log_every=10", "checkpoint_every=75", "validate_every=1000",
        "warmup_steps=10", "sampling.num_inference_steps=4",
        # Its own, whatever the recipe is tuned to: tests know how smooth this network is.
        "optimizer.learning_rate=4e-3", "adamw_learning_rate=4e-3", "label_dropout=0.1",
        "sampling.guidance_scale=2",
    )  # fmt: skip


def masked_config() -> RunConfig:
    """Masked pixels of 16 levels: a DiT of 32 channels and two blocks, 40 steps."""
    config = apply_overrides(
        recipe("mnist-masked"),
        [
            "model.width=32", "depth=2", "num_heads=2", "model.in_channels=8",
            "batch_size=16", "log_every=1", "validate_every=20", "checkpoint_every=20", "preview_every=1000",
            "schedule.warmup_steps=5", "schedule.decay=none", "loop.compile=false", "loop.writers=",
            "sampling.num_inference_steps=4",
        ],
    )  # fmt: skip
    return replace(config, budget=Budget("steps", 40))


def final_bytes(run: Path) -> dict[str, bytes]:
    """What must be equal between two runs: weights, average, optimiser and the metrics log."""
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    files = {name: newest / f"{name}.safetensors" for name in ("model", "ema", "optimizer")}
    return {name: path.read_bytes() for name, path in {**files, "metrics": run / "metrics.jsonl"}.items()}
