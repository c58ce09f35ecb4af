"""Attention's two ways on a CPU: the same function, each taken where it is the faster."""

import pytest
import torch
import torch.nn.functional as F

from smalti.nn.attention import attention


def heads(tokens, dtype, width=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, tokens, width, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize(
    ("dtype", "keys", "plain"),
    [
        (torch.float32, 128, True),
        (torch.float32, 129, False),
        (torch.bfloat16, 256, True),
        (torch.bfloat16, 257, False),
        (torch.float64, 8, False),
    ],
)
def test_training_takes_plain_products_up_to_the_length_where_they_are_faster(dtype, keys, plain, monkeypatch):
    kernel, calls = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    q, k, v = heads(keys, dtype)
    attention(q[:, :, :4], k, v)
    assert (not calls) == plain
    calls.clear()
    with torch.no_grad():
        attention(q.detach(), k.detach(), v.detach())
    attention(q, k, v, torch.ones(2, keys, dtype=torch.bool))
    assert len(calls) == 2  # without a gradient, and with a mask


def test_both_ways_give_the_same_outputs_and_gradients():
    q, k, v = heads(40, torch.float32)
    weight = torch.randn(2, 3, 40, 16, generator=torch.Generator().manual_seed(1))
    plain = attention(q, k, v)
    fused = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(plain, fused, rtol=1e-5, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad((o * weight).sum(), (q, k, v)) for o in (plain, fused)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
