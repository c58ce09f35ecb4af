"""Masking, its loss and its decoding: counts, chances and the tokens that must stay."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.diffusion.masking import mask_tokens, masked_count, masked_token_loss, masking_names
from smalti.diffusion.processes import make_process
from smalti.errors import UserError
from smalti.models.dit import DiTConfig
from smalti.models.registry import build_model, forward_flops
from smalti.models.uvit import UViTConfig
from smalti.sampling.masked import (
    MaskedTrajectories,
    begin_at,
    draw_tokens,
    gumbel,
    hide_least_confident,
    masked_plan,
)
from smalti.sampling.plan import run_plan
from smalti.types import MASKED, Condition

CODEBOOK = 5


@pytest.mark.parametrize("name", masking_names())
def test_the_masked_share_its_slope_its_inverse_and_its_mean(name):
    process, t = make_process(name), torch.linspace(0.001, 0.999, 4001, dtype=torch.float64, requires_grad=True)
    share = process.sigma(t)
    assert float(process.sigma(torch.zeros(1).double())) == pytest.approx(0, abs=1e-12)
    assert float(process.sigma(torch.ones(1).double())) == pytest.approx(1)
    (slope,) = torch.autograd.grad(share.sum(), t)
    torch.testing.assert_close(process.sigma_dot(t).detach(), slope)
    torch.testing.assert_close(process.t_of_log_snr(process.log_snr(t)).detach(), t.detach())
    torch.testing.assert_close(process.alpha(t) + share, torch.ones_like(t))
    assert float(torch.trapezoid(share.detach(), t.detach())) == pytest.approx(process.schedule.mean, abs=2e-3)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**20))
def test_as_many_tokens_are_masked_as_asked(batch, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(0, 9, (batch, height, width), generator=generator)
    count = masked_count(torch.rand(batch, generator=generator), height * width)
    masked = mask_tokens(x0, count, torch.rand(x0.shape, generator=generator))
    assert torch.equal((masked == MASKED).flatten(1).sum(1), count)
    assert torch.equal(masked[masked != MASKED], x0[masked != MASKED])
    assert int(count.min()) >= 1  # a loss of nothing says nothing


class Frequencies(torch.nn.Module):
    """Logits that do not look at the picture."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x, t, cond=None):
        return self.logits[None, :, None, None].expand(len(x), -1, *x.shape[1:])

    def null_condition(self, batch_size):
        return None


def test_the_loss_counts_each_masked_token_alike():
    process, logits = make_process("masked_linear"), torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0])
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, CODEBOOK, (4000, 4, 5), generator=generator)
    t = (torch.arange(4000) + 0.5).double() / 4000
    losses = masked_token_loss(
        Frequencies(logits), process, 0.0, x0, torch.rand(x0.shape, generator=generator), t, None
    )
    expected = -(logits.log_softmax(0) / CODEBOOK).sum()
    assert float(losses.mean()) == pytest.approx(float(expected), rel=0.03)
    one = masked_token_loss(
        Frequencies(logits), process, 0.1, x0[:1], torch.rand(1, 4, 5), torch.full((1,), 1.0).double(), None
    )
    whole = torch.nn.functional.cross_entropy(logits.expand(20, CODEBOOK), x0[0].flatten(), label_smoothing=0.1)
    assert float(one) == pytest.approx(float(whole) / 0.5)


def test_tokens_are_drawn_by_their_chances():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    u = (torch.arange(100_000) + 0.5).reshape(1, 1, -1) / 100_000
    for temperature in (1.0, 0.5, 2.0):
        drawn = draw_tokens(logits[None, :, None, None].expand(1, -1, 1, 100_000), u, temperature)
        shares = torch.bincount(drawn.flatten(), minlength=4) / 100_000
        torch.testing.assert_close(shares, (logits / temperature).softmax(0), atol=2e-5, rtol=0)
    assert int(draw_tokens(logits[None, :, None, None], u[:, :, :1], 0.0)) == 3
    near_one = torch.full((1, 1, 1), 1.0 - 1e-16, dtype=torch.float64)
    assert int(draw_tokens(torch.zeros(1, 3, 1, 1), near_one, 1.0)) == 2


def test_gumbel_noise_makes_choices_by_chances():
    u = torch.rand(200_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
    shares = torch.bincount((logits + gumbel(u)).argmax(1), minlength=3) / 200_000
    torch.testing.assert_close(shares.double(), logits.softmax(0), atol=5e-3, rtol=0)


def test_the_least_confident_are_hidden_and_never_what_was_known():
    x = torch.tensor([[[MASKED, 3, MASKED, MASKED]]])
    tokens = torch.tensor([[[1, 3, 2, 4]]])
    log_probabilities = torch.tensor([[[-0.1, -9.0, -3.0, -2.0]]])

    def hidden(noise, count):
        return hide_least_confident(x, tokens, log_probabilities, torch.tensor(noise), torch.tensor([count]))

    none = [[[0.0] * 4]]
    assert hidden(none, 1).tolist() == [[[1, 3, MASKED, 4]]]
    assert hidden(none, 2).tolist() == [[[1, 3, MASKED, MASKED]]]
    assert hidden(none, 4).tolist() == [[[1, 3, MASKED, MASKED]]]  # one is revealed at every call
    assert hidden(none, 0).tolist() == [[[1, 3, MASKED, 4]]]  # and one is left
    assert hidden([[[-9.0, 0.0, 0.0, 0.0]]], 1).tolist() == [[[MASKED, 3, 2, 4]]]


@settings(deadline=None)
@given(
    steps=st.integers(1, 30), t_start=st.floats(0.05, 1.0), temperature=st.floats(0, 3), choice=st.floats(0, 6),
    name=st.sampled_from(masking_names()), seed=st.integers(0, 2**40),
)  # fmt: skip
def test_decoding_ends_whole_keeps_what_was_given_and_hides_less_each_time(
    steps, t_start, temperature, choice, name, seed
):
    process = make_process(name)
    plan = masked_plan(process, steps, t_start=t_start, temperature=temperature, choice_temperature=choice)
    seeds = torch.tensor([seed, seed + 1])
    given_tokens = torch.arange(24).reshape(1, 4, 6).expand(2, 4, 6) % CODEBOOK
    keep = torch.zeros(2, 4, 6, dtype=torch.bool)
    keep[0, :2] = True
    x = begin_at(plan, given_tokens, seeds, keep)
    group = MaskedTrajectories(plan, torch.arange(2), seeds, x)
    hidden = [(group.x == MASKED).flatten(1).sum(1)]
    while not group.done:
        logits = torch.randn(2, CODEBOOK, 4, 6, generator=torch.Generator().manual_seed(group.call))
        whole = group.advance(logits)
        assert int(whole.min()) >= 0
        assert torch.equal(group.x[group.x != MASKED], whole[group.x != MASKED])
        hidden.append((group.x == MASKED).flatten(1).sum(1))
    counts = torch.stack(hidden)
    assert group.call == steps
    assert int(counts[-1].max()) == 0
    assert bool((counts.diff(dim=0) <= 0).all())
    assert torch.equal(group.x[0, :2], given_tokens[0, :2])
    kept = x != MASKED
    assert torch.equal(group.x[kept], x[kept])


def test_a_picture_depends_on_its_own_seed_alone():
    plan = masked_plan(make_process("masked_cosine"), 6)

    def network(x, t, cond=None):
        return torch.randn(CODEBOOK, 4, 4, generator=torch.Generator().manual_seed(3)) + 0 * x[:, None].float()

    start = torch.full((3, 4, 4), MASKED)
    together = run_plan(plan, network, start, seeds=torch.tensor([7, 8, 9]))
    alone = torch.cat([run_plan(plan, network, start[:1], seeds=torch.tensor([seed])) for seed in (7, 8, 9)])
    assert torch.equal(together, alone)
    assert not torch.equal(together[0], together[1])


def test_the_shares_of_the_schedule_are_aMUSEds():
    plan = masked_plan(make_process("masked_cosine"), 12)
    ratios = (torch.arange(12) + 1) / 12
    assert torch.equal((plan.masked_shares * 256).floor(), (torch.cos(ratios * math.pi / 2) * 256).floor().clamp(min=0))
    np.testing.assert_allclose(plan.choice_temperatures, np.linspace(2, 0, 12))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be at least 1"),
        ({"num_inference_steps": 4, "t_start": 0.0}, r"t_start=0.0 must lie in \(0, 1\]"),
        ({"num_inference_steps": 4, "temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"num_inference_steps": 4, "choice_temperature": math.inf}, "choice_temperature=inf"),
    ],
)
def test_plans_that_cannot_be_are_named(options, says):
    with pytest.raises(UserError, match=says):
        masked_plan(make_process("masked_cosine"), **options)


@pytest.mark.parametrize(
    "config",
    [
        DiTConfig(image_size=(8, 8), in_channels=6, patch_size=2, width=32, depth=2, num_heads=2),
        UViTConfig(image_size=(8, 8), in_channels=6, patch_size=2, width=32, depth=2, num_heads=2),
    ],
)
def test_a_network_of_tokens_gives_logits_and_its_operations_are_counted(config):
    from torch.utils.flop_counter import FlopCounterMode

    network = build_model(config, codebook_size=CODEBOOK).eval()
    x = torch.randint(-1, CODEBOOK, (3, 8, 8))
    cond = Condition(class_labels=torch.tensor([0, 1, 2]))
    logits = network(x, torch.zeros(3), cond)
    with FlopCounterMode(display=False) as counter:
        network(x[:1], torch.zeros(1), Condition(class_labels=torch.tensor([0])))
    assert logits.shape == (3, CODEBOOK, 8, 8)
    assert forward_flops(config, codebook_size=CODEBOOK) == counter.get_total_flops()
    if isinstance(config, DiTConfig):
        assert float(logits.std()) == 0  # equal chances before training


def test_a_masked_token_is_told_from_every_other():
    config = UViTConfig(image_size=(4, 4), in_channels=6, patch_size=2, width=32, depth=2, num_heads=2)
    network = build_model(config, codebook_size=CODEBOOK).eval()
    cond = Condition(class_labels=torch.zeros(CODEBOOK + 1, dtype=torch.int64))
    with torch.no_grad():
        logits = network(torch.arange(-1, CODEBOOK)[:, None, None].expand(-1, 4, 4), torch.zeros(CODEBOOK + 1), cond)
    assert len(torch.unique(logits, dim=0)) == CODEBOOK + 1
