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
    mask = torch.ones(2, keys, dtype=torch.bool)
    attention(q[:, :, :4], k, v)
    attention(q, k, v, mask)
    assert len(calls) == (0 if plain else 2)
    calls.clear()
    attention(q.detach(), k.detach(), v.detach())
    attention(q.detach(), k.detach(), v.detach(), mask)
    assert len(calls) == 2  # without a gradient


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tokens", [7, 300])
def test_attention_and_its_gradients_equal_the_library_on_both_paths(tokens, training, masked):
    heads = torch.randn(3, 2, 3, tokens, 8)
    mask = torch.rand(2, tokens) < 0.6 if masked else None
    q, k, v = heads.clone().requires_grad_(training).unbind(0)
    theirs = heads.clone().requires_grad_(training)
    key_mask = None if mask is None else mask[:, None, None, :]
    expected = F.scaled_dot_product_attention(*theirs.unbind(0), attn_mask=key_mask)
    attended = attention(q, k, v, mask)
    torch.testing.assert_close(attended, expected, rtol=1e-4, atol=1e-5)
    if training:
        weights = torch.randn_like(expected)
        (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), theirs)
        gradients = torch.stack(torch.autograd.grad((attended * weights).sum(), (q, k, v)))
        torch.testing.assert_close(gradients, expected_gradient, rtol=1e-4, atol=1e-5)
