"""A network with its own text encoder: it learns what captions say, and every text network can be inside."""

from dataclasses import replace

import pytest
import torch

from smalti.conditioning.prompted import PromptedNetwork, build_prompted_network, with_text_width
from smalti.conditioning.tiny import TinyTextConfig, TinyTextEncoder, train_tokenizer
from smalti.diffusion.objective import Objective, per_sample_loss
from smalti.diffusion.processes import make_process
from smalti.errors import UserError
from smalti.models import DiTConfig, FluxConfig, MMDiTConfig, PixArtConfig, SanaConfig, ZImageConfig, build_model
from smalti.optim.optimizers import MuonConfig, build_optimizers
from smalti.training.forward import compile_blocks
from smalti.types import Condition, concat_conditions

COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "yellow": (1, 1, -1)}
PLACES = {"left": slice(0, 4), "right": slice(4, 8)}
CAPTIONS = [f"a {colour} square on the {place}" for colour in COLOURS for place in PLACES]
TEXT = TinyTextConfig(vocab_size=300, width=32, depth=1, num_heads=2, max_tokens=12)
TOKENIZER = train_tokenizer(CAPTIONS, TEXT)
MODEL = MMDiTConfig(
    image_size=(8, 8), in_channels=3, width=32, depth=2, num_heads=2, text_width=32, pooled_width=32, position_grid=4,
    qk_norm=True,
)  # fmt: skip


def squares():
    """One picture a caption, [8, 3, 8, 8]."""
    pictures = torch.zeros(len(CAPTIONS), 3, 8, 8)
    for number, (colour, place) in enumerate((c, p) for c in COLOURS for p in PLACES):
        pictures[number, :, :, PLACES[place]] = torch.tensor(COLOURS[colour]).float()[:, None, None]
    return pictures


def test_training_ties_pictures_to_captions():
    torch.set_num_threads(1)
    network = build_prompted_network(MODEL, TEXT)
    process, objective, pictures = make_process("rectified_flow"), Objective("velocity"), squares()
    tokens = TOKENIZER.encode(CAPTIONS)
    generator = torch.Generator().manual_seed(0)
    optimizers = build_optimizers(MuonConfig(learning_rate=5e-3, adamw_learning_rate=5e-3), network)

    def losses(rows, said):
        x0, cond = pictures[rows], tokens.map(lambda tensor: tensor[said])
        eps = torch.randn(x0.shape, generator=generator)
        t = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        return per_sample_loss(network, process, objective, x0, eps, t, cond)

    for _ in range(120):
        rows = torch.randint(0, 8, (32,), generator=generator)
        losses(rows, rows).mean().backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    rows = torch.arange(8).repeat(32)
    with torch.inference_mode():
        right, wrong = losses(rows, rows).mean(), losses(rows, (rows + 1 + torch.arange(256) // 8 % 7) % 8).mean()
    assert right < 0.7 * wrong, (right, wrong)


@pytest.mark.parametrize(
    "config",
    [
        MODEL,
        FluxConfig(
            image_size=(8, 8),
            in_channels=3,
            width=32,
            depth=1,
            single_depth=1,
            num_heads=2,
            guidance=False,
            rope_widths=(4, 6, 6),
        ),
        PixArtConfig(image_size=(8, 8), in_channels=3, width=32, depth=1, num_heads=2, learn_sigma=False),
        SanaConfig(image_size=(8, 8), in_channels=3, out_channels=3, width=32, depth=1, num_heads=2, num_cross_heads=2),
        ZImageConfig(in_channels=3, width=32, depth=1, refiner_depth=1, num_heads=2, rope_widths=(4, 6, 6)),
    ],
    ids=lambda config: config.kind,
)
def test_every_text_network_can_be_inside(config):
    network = build_prompted_network(with_text_width(config, 32), TEXT)
    with torch.no_grad():
        for parameter in network.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([100.0, 700.0])
    cond = TOKENIZER.encode(CAPTIONS[:2])
    output = network(x, t, cond)
    assert output.shape[-2:] == (8, 8)
    encoded = network.encode(cond)
    assert encoded.token_ids is None
    assert torch.equal(network(x, t, encoded), output)
    assert (network(x, t, TOKENIZER.encode(CAPTIONS[1:3])) - output).abs().max() > 1e-5
    null = network.null_condition(2)
    concat_conditions(encoded, null)  # guidance runs both in one batch
    expected = network(x, t, TOKENIZER.encode(["", ""]))
    torch.testing.assert_close(network(x, t, null), expected)
    torch.testing.assert_close(network(x, t), expected)
    output.sum().backward()
    assert all(p.grad is not None for p in network.text.parameters())


def test_other_parts_of_the_condition_pass_through():
    network = build_prompted_network(MODEL, TEXT)
    guidance = torch.tensor([3.0])
    assert network.encode(replace(TOKENIZER.encode(["red"]), guidance=guidance)).guidance is guidance
    only_labels = Condition(class_labels=torch.tensor([1]))
    assert network.encode(only_labels) is only_labels


def test_networks_that_do_not_fit():
    with pytest.raises(UserError, match=r"model.text_width=4096 must be text.width=32"):
        PromptedNetwork(build_model(replace(MODEL, text_width=4096)), TinyTextEncoder(TEXT))
    with pytest.raises(UserError, match="pooled_width"):
        build_prompted_network(replace(MODEL, pooled_width=16), TEXT)
    with pytest.raises(UserError, match="dit takes no text"):
        build_prompted_network(DiTConfig(), TEXT)


def test_initialisation_is_a_function_of_the_seed_and_the_network_is_build_models():
    torch.manual_seed(1)
    first = build_prompted_network(MODEL, TEXT, seed=3)
    torch.manual_seed(2)
    second = build_prompted_network(MODEL, TEXT, seed=3)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    for name, value in build_model(MODEL, 3).state_dict().items():
        assert torch.equal(value, first.state_dict()[f"network.{name}"]), name


def test_blocks_are_reached_by_compilation_and_by_muon():
    network = build_prompted_network(MODEL, TEXT)
    compile_blocks(network)
    assert all(block._compiled_call_impl is not None for block in network.network.blocks)
    matrices = {
        id(p) for group in build_optimizers(MuonConfig(), network)["muon"].param_groups for p in group["params"]
    }
    named = dict(network.named_parameters())
    inside = {name for name, p in named.items() if id(p) in matrices}
    assert inside == {n for n, p in named.items() if p.ndim == 2 and n.startswith(("network.blocks", "text.blocks"))}
    assert any(name.startswith("text.blocks") for name in inside)
