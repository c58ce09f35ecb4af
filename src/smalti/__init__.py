"""smalti: train, sample, measure and serve diffusion transformers.

pipe = smalti.load("runs/mnist")
out = pipe(class_labels=[3, 1, 4], num_inference_steps=20, solver="dpmpp_2m", guidance_scale=2.0, seed=0)
out.images[0].save("three.png")
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Condition", "Pipeline", "__version__", "load", "load_backbone"]

if TYPE_CHECKING:
    from smalti.interop import load_backbone
    from smalti.pipeline import Pipeline, load
    from smalti.types import Condition

_HOMES = {
    "Condition": "smalti.types",
    "Pipeline": "smalti.pipeline",
    "load": "smalti.pipeline",
    "load_backbone": "smalti.interop",
}


def __getattr__(name: str) -> Any:
    """Public names are imported where they are first used, so that `import smalti` stays light."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'smalti' has no attribute {name!r}")
