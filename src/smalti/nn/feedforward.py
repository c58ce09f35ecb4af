"""Feed-forward layers of a transformer block."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Activation = Literal["gelu_tanh", "gelu", "swiglu"]


class FeedForward(nn.Module):
    """Linear, activation, Linear.

    "gelu_tanh" is DiT's; "gelu" (by erf) is faster in eager mode on a CPU; "swiglu" gates one half by the other
    (Shazeer 2020, eq. 6) and takes 2/3 of the hidden width, so that the parameters stay as many.
    """

    def __init__(self, width: int, hidden_width: int, activation: Activation = "gelu_tanh") -> None:
        super().__init__()
        self.activation = activation
        if activation == "swiglu":
            hidden_width = max(8, 2 * hidden_width // 3 // 8 * 8)
        self.fc1 = nn.Linear(width, hidden_width * (2 if activation == "swiglu" else 1))
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, x_BND: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Each token on its own."""
        h = self.fc1(x_BND)
        if self.activation == "swiglu":
            gate, value = h.chunk(2, dim=-1)
            h = F.silu(gate) * value
        else:
            h = F.gelu(h, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.fc2(h)  # type: ignore[no-any-return]
