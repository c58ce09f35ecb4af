"""Guidance against its formulas, and guidance done by hand in other prediction spaces."""

import math
import threading

import pytest
import torch
from guidance_examples import PROCESS, SPACES, LabelledDenoiser, dit_inputs, example, random_dit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smalti.diffusion import NetworkDenoiser, convert_prediction, make_process
from smalti.errors import UserError
from smalti.sampling import (
    AdaptiveProjectedGuidance,
    Autoguidance,
    ClassifierFreeGuidance,
    ClippedDenoiser,
    CosineScale,
    DynamicThreshold,
    IntervalScale,
    LinearScale,
    PerturbedAttentionGuidance,
    RescaledGuidance,
    noise_level_interval,
    perturbed_attention,
)
from smalti.sampling.guidance import project


def row(i, x, t, cond):
    return x[i : i + 1], t[i : i + 1], cond.map(lambda v: v[i : i + 1])


def guidances(denoiser, null, scale):
    """Every guidance at a scale."""
    return [
        ClassifierFreeGuidance(denoiser, null, scale),
        RescaledGuidance(denoiser, null, scale, 0.7),
        RescaledGuidance(denoiser, null, scale, 0.7, "v", PROCESS),
        AdaptiveProjectedGuidance(denoiser, null, scale, norm_threshold=1.0),
        PerturbedAttentionGuidance(denoiser, null, scale, LabelledDenoiser(1), 0.0),
        Autoguidance(denoiser, LabelledDenoiser(1), scale),
    ]


def test_classifier_free_guidance_is_its_formula_in_one_forward():
    x, t, cond, null = example()
    denoiser = LabelledDenoiser()
    guided = ClassifierFreeGuidance(denoiser, null, 2.5)(x, t, cond)
    assert denoiser.rows == [6]
    unconditional = denoiser(x, t, null)
    torch.testing.assert_close(guided, unconditional + 2.5 * (denoiser(x, t, cond) - unconditional))


@settings(max_examples=40, deadline=None)
@given(
    scales=st.tuples(st.floats(-2, 20), st.floats(-2, 20)), share=st.floats(0, 1), seed=st.integers(0, 1000),
)  # fmt: skip
def test_guidance_is_affine_in_the_scale(scales, share, seed):
    x, t, cond, null = example(seed=seed)
    denoiser = LabelledDenoiser(seed)
    make = [
        lambda scale: ClassifierFreeGuidance(denoiser, null, scale),
        lambda scale: Autoguidance(denoiser, LabelledDenoiser(1), scale),
        lambda scale: AdaptiveProjectedGuidance(denoiser, null, scale, eta=0.3, norm_threshold=2.0),
        lambda scale: PerturbedAttentionGuidance(denoiser, null, 3.0, LabelledDenoiser(1), scale),
    ]
    for guidance in make:
        low, high = (guidance(scale)(x, t, cond) for scale in scales)
        between = guidance(scales[0] + share * (scales[1] - scales[0]))(x, t, cond)
        torch.testing.assert_close(between, low + share * (high - low), rtol=1e-9, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), kind=st.sampled_from(["number", "rows", "schedule"]))
def test_scale_one_is_the_conditional_estimate(seed, kind):
    x, t, cond, null = example(seed=seed)
    denoiser = LabelledDenoiser(seed)
    scale = {"number": 1.0, "rows": torch.ones(3), "schedule": torch.ones_like}[kind]
    conditional = denoiser(x, t, cond)
    for guidance in guidances(denoiser, null, scale):
        torch.testing.assert_close(guidance(x, t, cond), conditional, rtol=1e-9, atol=1e-9)


def test_a_plain_scale_of_one_costs_no_second_half():
    x, t, cond, _ = example()
    for scale in (1.0, 1):
        denoiser, weaker = LabelledDenoiser(), LabelledDenoiser(1)
        for guidance in guidances(denoiser, None, scale):
            guidance(x, t, cond)
        PerturbedAttentionGuidance(denoiser, None, scale, weaker, 0)(x, t, cond)
        Autoguidance(denoiser, weaker, scale)(x, t, cond)
        assert set(denoiser.rows) == {3}
        assert weaker.rows == []


@settings(max_examples=40, deadline=None)
@given(
    space=st.sampled_from(SPACES),
    process_name=st.sampled_from(["rectified_flow", "vp_linear", "vp_cosine", "vp_linear_discrete"]),
    scale=st.floats(-1, 12),
    seed=st.integers(0, 1000),
)
def test_guidance_on_x0_equals_guidance_on_what_the_network_predicts(space, process_name, scale, seed):
    x, t, cond, null = example(seed=seed)
    process, denoiser = make_process(process_name), LabelledDenoiser(seed)
    conditional, unconditional = (
        convert_prediction("x0", space, process, t, x, denoiser(x, t, c)) for c in (cond, null)
    )
    guided = unconditional + scale * (conditional - unconditional)
    expected = convert_prediction(space, "x0", process, t, x, guided)
    torch.testing.assert_close(
        ClassifierFreeGuidance(denoiser, null, scale)(x, t, cond), expected, rtol=1e-7, atol=1e-7
    )


@settings(max_examples=20, deadline=None)
@given(scales=st.lists(st.floats(-2, 12), min_size=3, max_size=3), seed=st.integers(0, 1000))
def test_a_scale_a_row_equals_each_row_alone(scales, seed):
    x, t, cond, null = example(seed=seed)
    denoiser = LabelledDenoiser(seed)
    together = [guidance(x, t, cond) for guidance in guidances(denoiser, null, torch.tensor(scales).double())]
    together.append(
        PerturbedAttentionGuidance(denoiser, null, 2.0, LabelledDenoiser(1), torch.tensor(scales).double())(x, t, cond)
    )
    for i, scale in enumerate(torch.tensor(scales).tolist()):
        null_row = null.map(lambda v, i=i: v[i : i + 1])
        alone = [guidance(*row(i, x, t, cond)) for guidance in guidances(denoiser, null_row, scale)]
        alone.append(
            PerturbedAttentionGuidance(denoiser, null_row, 2.0, LabelledDenoiser(1), scale)(*row(i, x, t, cond))
        )
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-6, atol=1e-6)


def test_variance_logits_are_those_of_the_conditional_rows():
    x, t, cond, null = example()
    denoiser = LabelledDenoiser()
    expected = cond.class_labels[:, None, None, None].expand_as(x).double()
    for scale in (1.0, 3.0):
        for guidance in guidances(denoiser, null, scale):
            x0, logits = guidance.with_variance(x, t, cond)
            assert torch.equal(x0, guidance(x, t, cond))
            assert torch.equal(logits, expected)
    nested = ClippedDenoiser(DynamicThreshold(ClassifierFreeGuidance(denoiser, null, 3.0)))
    assert torch.equal(nested.with_variance(x, t, cond)[1], expected)
    with pytest.raises(UserError, match="has no with_variance"):
        ClassifierFreeGuidance(lambda x, t, cond: x, null, 3.0).with_variance(x, t, cond)


# Schedules


@pytest.mark.parametrize(
    ("schedule", "at_noise", "in_the_middle", "at_data"),
    [
        (LinearScale(1.0, 5.0), 1.0, 3.0, 5.0),
        (CosineScale(1.0, 5.0), 1.0, 3.0, 5.0),
        (CosineScale(0.0, 4.0, power=2.0), 0.0, 4.0 * (1 - math.cos(math.pi / 4)) / 2, 4.0),
        (IntervalScale(3.0, 0.2, 0.8), 1.0, 3.0, 1.0),
        (IntervalScale(3.0, 0.5, 1.0, outside=0.0), 3.0, 3.0, 0.0),
    ],
)
def test_schedules_at_their_ends_and_in_the_middle(schedule, at_noise, in_the_middle, at_data):
    t = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    expected = torch.tensor([at_noise, in_the_middle, at_data], dtype=torch.float64)
    torch.testing.assert_close(schedule(t), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", [LinearScale(0.0, 8.0), CosineScale(0.0, 8.0)])
def test_published_schedules_keep_the_mean_scale(schedule):
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert float(torch.trapezoid(schedule(t), t)) == pytest.approx(4.0)


def test_a_schedule_gives_each_row_the_scale_of_its_own_time():
    x, t, cond, null = example()
    denoiser = LabelledDenoiser()
    schedule = IntervalScale(torch.tensor([2.0, 3.0, 4.0]), 0.3, 0.6)
    t = torch.tensor([0.2, 0.45, 0.9], dtype=torch.float64)
    guided = ClassifierFreeGuidance(denoiser, null, schedule)(x, t, cond)
    expected = ClassifierFreeGuidance(denoiser, null, torch.tensor([1.0, 3.0, 1.0]))(x, t, cond)
    assert torch.equal(guided, expected)
    assert torch.equal(guided[0], denoiser(x, t, cond)[0])


@pytest.mark.parametrize("process_name", ["rectified_flow", "vp_cosine", "vp_linear"])
def test_guidance_interval_in_noise_levels(process_name):
    process = make_process(process_name)
    schedule = noise_level_interval(process, 3.0, 0.28, 5.42)
    t = torch.linspace(0.001, 0.99, 500, dtype=torch.float64)
    level = process.sigma(t) / process.alpha(t)
    assert torch.equal(schedule(t) == 3.0, (level >= 0.28) & (level <= 5.42))
    whole = noise_level_interval(process, 3.0, 0.0, math.inf)
    assert (whole.t_low, whole.t_high) == (0.0, 1.0)


# Rescale


def test_the_space_of_the_rescale_matters():
    x, t, cond, null = example()
    denoiser = LabelledDenoiser()
    x0, eps, v, velocity = (
        RescaledGuidance(denoiser, null, 6.0, 0.7, space, PROCESS)(x, t, cond) for space in ("x0", *SPACES)
    )
    for a, b in ((x0, eps), (x0, v), (eps, v)):
        assert (a - b).abs().max() > 1e-3
    torch.testing.assert_close(velocity, v)  # on a variance-preserving process one is a multiple of the other


def test_full_rescale_has_the_conditional_deviation_and_a_constant_stays_finite():
    x, t, cond, null = example()
    denoiser = LabelledDenoiser()
    rescaled = RescaledGuidance(denoiser, null, 9.0, 1.0)(x, t, cond)
    torch.testing.assert_close(rescaled.flatten(1).std(1), denoiser(x, t, cond).flatten(1).std(1))
    flat = RescaledGuidance(lambda x, t, cond: torch.full_like(x, 0.5), null, 9.0, 0.7)(x, t, cond)
    assert torch.isfinite(flat).all()


# Adaptive projected guidance


def test_projected_guidance_with_all_of_the_parallel_part_is_classifier_free_guidance():
    x, t, cond, null = example()
    denoiser = LabelledDenoiser()
    projected = AdaptiveProjectedGuidance(denoiser, null, 5.0, eta=1.0)(x, t, cond)
    torch.testing.assert_close(projected, ClassifierFreeGuidance(denoiser, null, 5.0)(x, t, cond))


def test_perpendicular_guidance_is_perpendicular_and_short():
    x, t, cond, null = example()
    denoiser = LabelledDenoiser()
    conditional = denoiser(x, t, cond)
    update = AdaptiveProjectedGuidance(denoiser, null, 2.0, norm_threshold=0.5)(x, t, cond) - conditional
    torch.testing.assert_close((update * conditional).flatten(1).sum(1), torch.zeros(3).double(), atol=1e-12, rtol=0)
    assert (update.flatten(1).norm(dim=1) <= 0.5).all()
    parallel, orthogonal = project(conditional, torch.zeros_like(conditional))
    assert torch.equal(parallel, torch.zeros_like(parallel))
    assert torch.equal(orthogonal, conditional)


# Autoguidance


def test_autoguidance_is_its_formula():
    x, t, cond, null = example()
    strong, weak = LabelledDenoiser(0), LabelledDenoiser(1)
    for weaker_cond in (None, null):
        guided = Autoguidance(strong, weak, 2.0, weaker_cond)(x, t, cond)
        expected = 2 * strong(x, t, cond) - weak(x, t, weaker_cond or cond)
        torch.testing.assert_close(guided, expected)


# Perturbed attention


def test_identity_attention_equals_a_hand_computation():
    attn = random_dit(qk_norm=True).double().blocks[0].attn
    tokens = torch.randn(2, 16, 32, dtype=torch.float64)
    values = tokens @ attn.qkv.weight[64:].T + attn.qkv.bias[64:]
    expected = values @ attn.out.weight.T + attn.out.bias
    torch.testing.assert_close(attn.as_identity_map()(tokens), expected, rtol=1e-12, atol=1e-12)


def test_the_view_shares_all_weights_and_leaves_the_network_alone():
    model = random_dit(positions="learned")
    x, t, cond = dit_inputs(model)
    before = model(x, t, cond)
    view = model.with_identity_attention((1,))
    perturbed = view(x, t, cond)
    assert not torch.equal(perturbed, before)
    assert torch.equal(model(x, t, cond), before)
    assert view.blocks[0] is model.blocks[0]
    assert view.blocks[1] is not model.blocks[1]
    named = dict(model.named_parameters())
    assert dict(view.named_parameters()).keys() == named.keys()
    assert all(parameter is named[name] for name, parameter in view.named_parameters())
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.mul_(2)
    assert not torch.equal(view(x, t, cond), perturbed)
    both = view.with_identity_attention((0,))  # a view of a view adds to it
    assert torch.equal(both(x, t, cond), model.with_identity_attention((0, 1))(x, t, cond))


def test_view_and_network_run_at_once():
    model = random_dit()
    x, t, cond = dit_inputs(model)
    view = model.with_identity_attention((0, 2))
    expected = {0: model(x, t, cond), 1: view(x, t, cond)}
    wrong = []

    def work(which):
        for _ in range(20):
            if not torch.equal((model, view)[which](x, t, cond), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_perturbed_attention_guidance_is_its_formula():
    model = random_dit().double()
    x, _, cond = dit_inputs(model)
    x, t = x.double(), torch.tensor([0.3, 0.7], dtype=torch.float64)
    denoiser = NetworkDenoiser(model, PROCESS, "v")
    perturbed = perturbed_attention(denoiser, (1,))
    null = model.null_condition(2)
    conditional, unconditional, worse = denoiser(x, t, cond), denoiser(x, t, null), perturbed(x, t, cond)
    alone = PerturbedAttentionGuidance(denoiser, None, 1.0, perturbed, 3.0)(x, t, cond)
    torch.testing.assert_close(alone, conditional + 3 * (conditional - worse), rtol=1e-9, atol=1e-9)
    combined = PerturbedAttentionGuidance(denoiser, null, 4.0, perturbed, 3.0)(x, t, cond)
    expected = unconditional + 4 * (conditional - unconditional) + 3 * (conditional - worse)
    torch.testing.assert_close(combined, expected, rtol=1e-9, atol=1e-9)


def test_perturbed_attention_guidance_needs_no_condition():
    model = random_dit(num_classes=0)
    x, _, _ = dit_inputs(model)
    t = torch.tensor([0.3, 0.7], dtype=torch.float64)
    denoiser = NetworkDenoiser(model, PROCESS, "v")
    guided = PerturbedAttentionGuidance(denoiser, None, 1.0, perturbed_attention(denoiser, (1,)), 3.0)(x, t)
    assert (guided - denoiser(x, t)).abs().max() > 1e-3


# Compiling, errors


def test_guidance_traces_into_one_graph():
    """On a plain function: the shape checks that tests put on networks do not trace."""

    def denoiser(x, t, cond):
        return x * cond.class_labels.to(x.dtype)[:, None, None, None].cos() + t[:, None, None, None]

    x, t, cond, null = example()
    schedule = IntervalScale(torch.tensor([3.0, 4.0, 5.0]), 0.3, 0.6)
    for guidance in (
        RescaledGuidance(denoiser, null, schedule, 0.7, "v", PROCESS),
        AdaptiveProjectedGuidance(denoiser, null, torch.tensor([1.0, 4.0, 5.0]), norm_threshold=1.0),
        PerturbedAttentionGuidance(denoiser, null, 3.0, denoiser, 2.0),
    ):
        compiled = torch.compile(guidance, dynamic=False, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, t, cond), guidance(x, t, cond))


X, T, COND, NULL = example()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda d: ClassifierFreeGuidance(d, None, 4.0), "guidance_scale=4.0 needs a null condition"),
        (lambda d: ClassifierFreeGuidance(d, None, torch.ones(3)), r"guidance_scale=tensor of shape \(3,\)"),
        (lambda d: ClassifierFreeGuidance(d, NULL, math.nan), "guidance_scale=nan must be finite"),
        (lambda d: ClassifierFreeGuidance(d, NULL, torch.ones(3, 1)), r"guidance_scale has shape \(3, 1\)"),
        (lambda d: ClassifierFreeGuidance(d, NULL, 4.0)(X, T), "guidance_scale=4.0 needs a condition"),
        (lambda d: ClassifierFreeGuidance(d, NULL, torch.ones(2))(X, T, COND), r"guidance_scale has shape \(2,\)"),
        (lambda d: ClassifierFreeGuidance(d, NULL, lambda t: t.sum())(X, T, COND), r"guidance_scale has shape \(\)"),
        (lambda d: ClassifierFreeGuidance(d, example(2)[3], 4.0)(X, T, COND), "null.class_labels has 2 rows.*: 3"),
        (lambda d: ClassifierFreeGuidance(d, NULL, 4.0)(X, T, example(2)[2]), "cond.class_labels has 2 rows.*: 3"),
        (lambda d: RescaledGuidance(d, NULL, 4.0, 1.5), "guidance_rescale=1.5"),
        (lambda d: RescaledGuidance(d, NULL, 4.0, 0.5, "epsilon", PROCESS), "unknown space 'epsilon'"),
        (lambda d: RescaledGuidance(d, NULL, 4.0, 0.5, "eps"), "process is missing"),
        (lambda d: AdaptiveProjectedGuidance(d, NULL, 4.0, norm_threshold=0.0), "norm_threshold=0.0"),
        (lambda d: AdaptiveProjectedGuidance(d, None, 4.0), "guidance_scale=4.0"),
        (lambda d: Autoguidance(d, d, math.inf), "guidance_scale=inf"),
        (lambda d: Autoguidance(d, d, 2.0, example(2)[3])(X, T, COND), "weaker_cond.class_labels has 2 rows"),
        (lambda d: PerturbedAttentionGuidance(d, NULL, 2.0, d, math.nan), "pag_scale=nan"),
        (lambda d: PerturbedAttentionGuidance(d, None, 2.0, d, 1.0), "guidance_scale=2.0"),
        (lambda d: PerturbedAttentionGuidance(d, NULL, 2.0, d, torch.ones(2))(X, T, COND), "pag_scale has shape"),
        (lambda d: perturbed_attention(NetworkDenoiser(random_dit(), PROCESS, "v"), (3,)), r"layers=\(3,\).*0 \.\. 2"),
        (lambda d: perturbed_attention(NetworkDenoiser(random_dit(), PROCESS, "v"), (-1,)), r"layers=\(-1,\)"),
        (lambda d: perturbed_attention(NetworkDenoiser(random_dit(), PROCESS, "v"), ()), r"layers=\(\)"),
        (lambda d: perturbed_attention(NetworkDenoiser(nn.Identity(), PROCESS, "v"), (0,)), "network Identity has no"),
        (lambda d: IntervalScale(2.0, 0.8, 0.2), "t_low=0.8, t_high=0.2"),
        (lambda d: noise_level_interval(PROCESS, 2.0, 5.0, 1.0), "low=5.0, high=1.0"),
        (lambda d: CosineScale(1.0, 2.0, 0.0), "power=0.0"),
    ],
)
def test_mistakes_are_named_in_one_line(call, says):
    with pytest.raises(UserError, match=says) as caught:
        call(LabelledDenoiser())
    assert "\n" not in str(caught.value)
