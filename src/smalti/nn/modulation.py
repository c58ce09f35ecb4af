"""adaLN: normalisation without weights of its own, shifted and scaled by the condition.

Shapes: B batch, N tokens, D width.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def modulate(
    x_BND: Float[Tensor, "B N D"], shift_B1D: Float[Tensor, "B 1 D"], scale_B1D: Float[Tensor, "B 1 D"], eps: float
) -> Float[Tensor, "B N D"]:
    """LayerNorm without weights, then (1 + scale) and shift from the condition. Source: DiT, section 3.2."""
    return scale_and_shift(F.layer_norm(x_BND, (x_BND.shape[-1],), eps=eps), shift_B1D, scale_B1D)


def scale_and_shift(
    x_BND: Float[Tensor, "B N D"], shift_B1D: Float[Tensor, "B 1 D"], scale_B1D: Float[Tensor, "B 1 D"]
) -> Float[Tensor, "B N D"]:
    """x (1 + scale) + shift, for tokens that another normalisation made ready."""
    return torch.addcmul(shift_B1D, x_BND, 1 + scale_B1D)
