"""Muon: orthogonal updates, fused q, k, v as three matrices, state that survives a round trip."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.models import DiTConfig, UNetConfig, build_model
from smalti.optim.ema import update_ema
from smalti.optim.optimizers import AdamWConfig, Muon, MuonConfig, build_optimizers, orthogonalise


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(2, 24), extra=st.integers(0, 24), seed=st.integers(0, 100))
def test_orthogonalise_keeps_directions_and_levels_singular_values(rows, extra, seed):
    x = torch.randn(2, rows, rows + extra + 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalise(x, steps=5)
    assert (torch.linalg.svdvals(y) - 1).abs().max() < 0.15
    torch.testing.assert_close(y, u @ torch.diag_embed(torch.linalg.svdvals(y)) @ vh, rtol=0, atol=0.2)


def test_fused_qkv_is_three_matrices():
    """A step on a fused [3 D, D] parameter equals three steps on its parts."""
    torch.manual_seed(0)
    fused = torch.nn.Parameter(torch.randn(24, 8))
    parts = [torch.nn.Parameter(piece.clone()) for piece in fused.detach().chunk(3)]
    gradient = torch.randn(24, 8)
    fused.grad = gradient
    for part, piece in zip(parts, gradient.chunk(3), strict=True):
        part.grad = piece.clone()
    for params, pieces in (([fused], 3), (parts, 1)):
        Muon([{"params": params, "pieces": pieces}], lr=0.1, momentum=0.9, steps=5, weight_decay=0.0).step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in parts]))


def test_tall_and_wide_matrices_get_updates_of_one_size():
    for shape in ((64, 16), (16, 64), (16, 16)):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon([parameter], lr=1.0, momentum=0.9, steps=5, weight_decay=0.0).step()
        assert parameter.detach().square().mean().sqrt() == pytest.approx(0.2, rel=0.15)


def test_every_parameter_has_one_optimizer():
    model = build_model(DiTConfig(depth=1, width=32))
    for config in (AdamWConfig(), MuonConfig()):
        owned = [p for o in build_optimizers(config, model).values() for g in o.param_groups for p in g["params"]]
        assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))


def test_a_network_without_matrices_in_blocks_has_adamw_alone():
    model = build_model(UNetConfig(widths=(8, 16), attention_levels=()))
    (adamw,) = build_optimizers(MuonConfig(adamw_learning_rate=0.5), model).values()
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(list(model.parameters()))
    assert adamw.param_groups[0]["lr"] == 0.5


def test_ema_is_the_weighted_mean():
    average, weight = torch.ones(3), torch.zeros(3)
    update_ema([average], [weight], decay=0.75)
    assert torch.equal(average, torch.full((3,), 0.75))
