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
    normed = F.layer_norm(x_BND, (x_BND.shape[-1],), eps=eps)
    return torch.addcmul(shift_B1D, normed, 1 + scale_B1D)
