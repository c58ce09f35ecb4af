"""The four ways of a DiT to be told time and label (DiT, section 3.2), and who else must know of them."""

import dataclasses

import pytest
import torch
from tiny_training import validation_losses
from torch.utils.flop_counter import FlopCounterMode

from smalti.config import apply_overrides
from smalti.diffusion.denoiser import NetworkDenoiser
from smalti.diffusion.processes import make_process
from smalti.errors import UserError
from smalti.interop.convert import write_weights
from smalti.interop.load import Weights
from smalti.interop.surgery import adapt
from smalti.models import DiT, DiTConfig, build_model, count_parameters, forward_flops, preset
from smalti.optim.mup import MuP, check_mup
from smalti.recipes import recipe
from smalti.sampling.guidance import perturbed_attention
from smalti.types import Condition

TINY = DiTConfig(image_size=(8, 12), in_channels=2, patch_size=2, width=32, depth=2, num_heads=4)
KINDS = ["adaln_zero", "adaln", "cross_attention", "in_context"]


def network(conditioning, **changes):
    """A network whose every weight is random: zero initialisations would hide what they multiply."""
    model = build_model(dataclasses.replace(TINY, conditioning=conditioning, **changes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def inputs(batch=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 2, 8, 12, generator=generator)
    return x, 1000 * torch.rand(batch, generator=generator), Condition(class_labels=torch.arange(batch) % 10)


@pytest.mark.parametrize("num_classes", [0, 10])
@pytest.mark.parametrize("positions", ["sincos", "sincos+rope"])
@pytest.mark.parametrize("conditioning", KINDS)
def test_flops_equal_the_counter(conditioning, positions, num_classes):
    model = network(conditioning, positions=positions, num_classes=num_classes)
    x, t, cond = inputs(1)
    with FlopCounterMode(display=False) as counter:
        model(x, t, cond if num_classes else None)
    assert counter.get_total_flops() == forward_flops(model.config)


def test_the_paper_s_costs():
    """DiT, section 3.2 and figure 5: cross-attention costs some 15 % more, in-context as good as nothing."""
    gflops, millions = {}, {}
    for kind in KINDS:
        config = dataclasses.replace(preset("DiT-XL/2"), conditioning=kind)
        gflops[kind] = forward_flops(config) / 2e9
        with torch.device("meta"):
            millions[kind] = sum(count_parameters(DiT(config)).values()) / 1e6
    assert gflops["cross_attention"] == pytest.approx(137.6, abs=0.5)  # the paper's figures
    assert gflops["in_context"] == pytest.approx(119.4, abs=0.5)
    assert gflops["adaln"] == pytest.approx(118.6, abs=0.3)
    assert millions["in_context"] == pytest.approx(449, abs=2)
    assert millions["cross_attention"] == pytest.approx(598, abs=2)
    assert millions["adaln"] == pytest.approx(600, abs=2)
    assert millions["adaln_zero"] == pytest.approx(675, abs=2)


@pytest.mark.parametrize("conditioning", KINDS)
def test_time_and_label_are_both_heard_and_rows_do_not_mix(conditioning):
    model = network(conditioning, positions="sincos+rope", qk_norm=True)
    x, t, cond = inputs()
    output = model(x, t, cond)
    assert output.shape == x.shape
    other_label = Condition(class_labels=cond.class_labels + torch.tensor([1, 0, 0]))
    for changed in (model(x, t + torch.tensor([100.0, 0, 0]), cond), model(x, t, other_label)):
        assert not torch.allclose(changed[0], output[0], atol=1e-3)
        assert torch.equal(changed[1:], output[1:])
    assert torch.equal(model(x, t), model(x, t, model.null_condition(3)))


@pytest.mark.parametrize("conditioning", KINDS)
def test_what_each_starts_as(conditioning):
    model = build_model(dataclasses.replace(TINY, conditioning=conditioning))
    x, t, cond = inputs()
    assert torch.equal(model(x, t, cond), torch.zeros_like(x))
    tokens = torch.randn(3, 24, 32)
    told = {
        "adaln_zero": lambda: (model.modulation(model.embed_condition(t, cond)).view(3, -1, 32)[:, :6],),
        "adaln": lambda: (model.modulation(model.embed_condition(t, cond)).view(3, -1, 32)[:, :4],),
        "cross_attention": lambda: (model.condition_as_tokens(t, cond),),
        "in_context": lambda: (),
    }[conditioning]()
    identity = torch.equal(model.blocks[0](tokens, *told), tokens)
    assert identity == (conditioning == "adaln_zero")
    if conditioning == "adaln":  # each block's matrix as one of its own: fans 32 and 4 x 32
        assert float(model.modulation.weight.detach()[:128].std()) == pytest.approx((2 / (32 + 128)) ** 0.5, rel=0.03)
        assert not model.modulation.weight[-64:].any()


def test_the_default_is_adaln_zero_as_it_was():
    """The forward written out, and the names in checkpoints."""
    model = network("adaln_zero", positions="sincos+rope", qk_norm=True, activation="swiglu")
    x, t, cond = inputs()
    tokens = model.patch_embed(x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))
    tokens = tokens + model.positions_ND
    rows = model.modulation(torch.nn.functional.silu(model.embed_condition(t, cond))).view(3, -1, 32)
    for i, block in enumerate(model.blocks):
        tokens = block(tokens, rows[:, 6 * i : 6 * i + 6], model.rope_2NK)
    normed = torch.nn.functional.layer_norm(tokens, (32,), eps=1e-6)
    values = model.output(normed * (1 + rows[:, -1:]) + rows[:, -2:-1])
    pictures = values.view(3, 4, 6, 2, 2, 2).permute(0, 5, 1, 3, 2, 4).reshape(3, 2, 8, 12)
    torch.testing.assert_close(model(x, t, cond), pictures)
    assert set(model.state_dict()) == {
        *(f"{part}.{leaf}" for part in ("patch_embed", "modulation", "output") for leaf in ("weight", "bias")),
        *(f"time_embed.fc{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")),
        "label_embed.weight",
        *(
            f"blocks.{i}.{part}.{leaf}"
            for i in range(2)
            for part in ("attn.qkv", "attn.out", "mlp.fc1", "mlp.fc2")
            for leaf in ("weight", "bias")
        ),
        *(f"blocks.{i}.attn.{norm}.weight" for i in range(2) for norm in ("q_norm", "k_norm")),
    }


def test_in_context_tokens_have_no_place():
    """The rotary table leaves the two condition tokens as they are."""
    model = network("in_context", positions="rope")
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    model(*inputs())
    assert seen[0].shape[1] == 2 + 24
    assert torch.equal(seen[0][0, :2], torch.ones_like(seen[0][0, :2]))
    assert not seen[0][1, :2].any()
    assert torch.equal(seen[0][:, 2:], model.rope_2NK)


@pytest.mark.parametrize("conditioning", KINDS)
def test_perturbed_attention_of_every_kind(conditioning):
    model = network(conditioning)
    x, t, cond = inputs()
    denoiser = NetworkDenoiser(model, make_process("rectified_flow"), "velocity")
    perturbed = perturbed_attention(denoiser, (1,))(x, t / 1000, cond)
    assert not torch.allclose(perturbed, denoiser(x, t / 1000, cond))


@pytest.mark.parametrize("conditioning", ["adaln", "cross_attention", "in_context"])
def test_training_lowers_the_validation_loss(conditioning):
    model = build_model(DiTConfig(width=64, depth=2, initialisation="wide", conditioning=conditioning))
    parameters = list(model.parameters())
    before, after = validation_losses(model, parameters, lambda labels: Condition(class_labels=labels), steps=80)
    assert after < 0.5 * before  # adaLN-Zero, the fastest: 0.24 of it


@pytest.mark.parametrize("conditioning", ["adaln", "cross_attention", "in_context"])
def test_others_refuse_what_they_cannot_have(conditioning, tmp_path):
    model = network(conditioning, frequency_shift=1.0, image_size=(8, 8))
    weights = Weights(model.config, model.state_dict(), "smalti")
    for target, out in (("diffusers", tmp_path / "folder"), ("original", tmp_path / "a.safetensors")):
        with pytest.raises(UserError, match=r"cannot express model\.conditioning"):
            write_weights(weights, out, target)
        assert not out.exists()
    with pytest.raises(UserError, match="no rules that were checked"):
        check_mup(MuP(), model.config)
    with pytest.raises(UserError, match="cannot be adapted"):
        adapt(weights, num_classes=5)


def test_a_wrong_name_is_refused():
    with pytest.raises(UserError, match="must be one of adaln_zero, adaln, cross_attention, in_context"):
        apply_overrides(recipe("mnist"), ["conditioning=adaln-zero"])
