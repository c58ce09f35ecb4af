"""The comparisons that come with smalti, on the bundled digits. docs/compare.md says what each is about."""

from pathlib import Path

from smalti.comparison.spec import ComparisonSpec, Contender, read_spec
from smalti.errors import unknown_name

_DIT = Contender("dit")  # the recipe mnist: DiT-Tiny, rectified flow, Muon

# No U-Net of this shape has DiT-Tiny's parameters and its operations: this one has half the parameters and 1.5 times
# the operations. AdamW's rate was tuned: docs/compare.md.
_UNET = ("model=unet", "model.widths=16,24,64", "optimizer=adamw", "optimizer.learning_rate=5e-3", "beta2=0.99")

_BUNDLED = (
    ComparisonSpec(
        "unet-vs-dit",
        "Which makes better digits of the same training FLOPs: a U-Net of convolutions or a DiT?",
        (Contender("unet", set=_UNET), _DIT),
    ),
    ComparisonSpec(
        "dit-vs-sit-vs-edm",
        "The same network and optimiser under three processes: noise prediction on a variance-preserving process "
        "(DiT), velocity on the straight path (SiT), EDM. Which learns most from equal training FLOPs?",
        (
            Contender(
                "dit-vp",
                set=(
                    "process=vp_linear", "prediction_type=eps", "timesteps=uniform", "sampling.spacing=lambda",
                    "clip_x0=true",
                ),
            ),
            Contender("sit"),
            Contender(
                "edm",
                set=(
                    "process=edm", "prediction_type=edm", "weighting=edm", "timesteps=edm_log_normal",
                    "sampling.spacing=karras",
                ),
            ),
        ),
    ),
    ComparisonSpec(
        "diffusion-vs-masked",
        "A dozen network calls: does a flow-matched DiT or a masked model of as many training FLOPs, of pixels or of "
        "learned tokens, spend them better?",
        (
            Contender("diffusion"),
            Contender("masked-pixels", recipe="mnist-masked"),
            Contender("masked-tokens", recipe="mnist-tokens", tokenizer_share=0.08),
        ),
        calls=(4, 8, 12),
    ),
    ComparisonSpec(
        "patch-size",
        "Patches of 2, 4 or 7 pixels (196, 49 or 16 tokens): where are equal training FLOPs spent best?",
        tuple(Contender(f"patch-{size}", set=(f"patch_size={size}",)) for size in (2, 4, 7)),
    ),
    ComparisonSpec(
        "depth",
        "Two wide blocks, four, or eight narrow ones of about as many parameters: how deep should a small DiT be?",
        (
            Contender("depth-2", set=("depth=2", "model.width=192", "num_heads=6")),
            Contender("depth-4", set=("depth=4", "model.width=128", "num_heads=4")),
            Contender("depth-8", set=("depth=8", "model.width=96", "num_heads=3")),
        ),
    ),
    ComparisonSpec(
        "adaln-zero-vs-adaln-vs-cross-attention-vs-in-context",
        "How should a DiT be told time and label? The four designs of the paper (section 3.2) at equal training FLOPs.",
        tuple(
            Contender(kind.replace("_", "-"), set=(f"conditioning={kind}",))
            for kind in ("adaln_zero", "adaln", "cross_attention", "in_context")
        ),
    ),
)  # fmt: skip


def bundled_specs() -> dict[str, ComparisonSpec]:
    """The bundled specs by name."""
    return {spec.name: spec for spec in _BUNDLED}


def find_spec(name_or_path: str) -> ComparisonSpec:
    """A bundled spec by name, or one's own from a .json file. Raises UserError with the nearest names."""
    specs = bundled_specs()
    if name_or_path in specs:
        return specs[name_or_path]
    if name_or_path.endswith(".json"):
        return read_spec(Path(name_or_path))
    raise unknown_name("comparison (or give a .json file)", name_or_path, specs)
