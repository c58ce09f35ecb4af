"""Published scaling laws, to compare one's own with. None of them holds for other data."""

from dataclasses import dataclass

from smalti.scaling.law import Cost, Law
from smalti.scaling.power import Power


@dataclass(frozen=True)
class PublishedFrontier:
    """What a paper found along the frontier: best n, best d, loss and FID of a budget, and where it measured them."""

    source: str
    n: Power
    d: Power
    loss: Power
    fid: Power
    lowest_flops: float
    highest_flops: float


# Liang, He, Shi et al. 2024, "Scaling Laws for Diffusion Transformers": rectified flow, text to image. Their D counts
# tokens, so that only its exponent compares with pictures.
DIFFUSION_TRANSFORMERS = PublishedFrontier(
    source="arXiv 2410.08184",
    n=Power(0.0009, 0.568),
    d=Power(186.9, 0.432),
    loss=Power(2.394, -0.0273),
    fid=Power(2.26e6, -0.234),
    lowest_flops=1e17,
    highest_flops=6e18,
)

# Language models: d in tokens, FLOPs 6 a parameter and token.
TOKEN_COST = Cost(6.0, 1.0)
HOFFMANN = Law(e=1.69, a=406.4, b=410.7, alpha=0.34, beta=0.28)  # Hoffmann et al. 2022, eq. 10
BESIROGLU = Law(e=1.8172, a=482.01, b=2085.43, alpha=0.3478, beta=0.3658)  # Besiroglu et al. 2024, table 1
