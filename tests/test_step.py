"""One optimiser step: micro-batches, precision and activation checkpointing change nothing that they should not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_runs import tiny_config

from smalti.config import apply_overrides
from smalti.data.digits import load_digits
from smalti.diffusion.processes import make_process
from smalti.errors import UserError
from smalti.training.activation_checkpointing import checkpoint_activations
from smalti.training.batch import training_batch
from smalti.training.failure import batch_from_tensors, batch_tensors, join_batches
from smalti.training.parallel import check_divisible, repeated_blocks
from smalti.training.state import new_state
from smalti.training.step import (
    clip_gradients,
    compute_gradients,
    squared_sizes,
    update_ratio,
    update_weights,
    weights_copy,
)

DIGITS = load_digits()[0]


def micro_batches(config, parts=1, step=0):
    process = make_process(config.process)
    return [training_batch(config, process, (DIGITS,), step, part=(i, parts)) for i in range(parts)]


def gradients(config, change=None):
    """(loss, norm before clipping, gradients) of a first step from weights that all have gradients."""
    state = new_state(config, torch.device("cpu"))
    with torch.no_grad():  # adaLN-Zero would leave the blocks without any
        for p in state.parameters:
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    if change is not None:
        change(state.model)
    parts = config.loop.gradient_accumulation_steps
    loss = compute_gradients(config, make_process(config.process), state, state.model, micro_batches(config, parts))
    norm = clip_gradients(config, state)
    return loss, norm, [p.grad.clone() for p in state.parameters]


def assert_close(one, other, tolerance):
    assert other[:2] == pytest.approx(one[:2], rel=tolerance)
    largest = max(g.abs().max() for g in one[2])
    for expected, found in zip(one[2], other[2], strict=True):
        assert (found - expected).abs().max() <= tolerance * largest


PLAIN = tiny_config(4, "precision=float32", "batch_size=16", "stratified_timesteps=true")


@settings(max_examples=15, deadline=None)
@given(parts=st.sampled_from([1, 2, 4, 8, 16]), step=st.integers(0, 2000))
def test_the_parts_of_a_batch_are_the_batch(parts, step):
    """Byte for byte: data, noise, times and dropped labels do not depend on how many share them."""
    whole = batch_tensors(micro_batches(PLAIN, 1, step)[0])
    joined = batch_tensors(join_batches(micro_batches(PLAIN, parts, step)))
    assert whole.keys() == joined.keys()
    assert all(torch.equal(whole[name], joined[name]) for name in whole)


@pytest.mark.parametrize("parts", [2, 4, 16])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts):
    accumulated = apply_overrides(PLAIN, [f"gradient_accumulation_steps={parts}"])
    assert_close(gradients(PLAIN), gradients(accumulated), 2e-6)


def test_activation_checkpointing_changes_no_gradient():
    plain, checkpointed = gradients(PLAIN), gradients(PLAIN, checkpoint_activations)
    assert plain[:2] == checkpointed[:2]
    assert all(torch.equal(a, b) for a, b in zip(plain[2], checkpointed[2], strict=True))


def test_activation_checkpointing_runs_each_block_again():
    state = new_state(apply_overrides(PLAIN, ["depth=3"]), torch.device("cpu"))
    assert len(repeated_blocks(state.model)) == 3
    calls = []
    for block in repeated_blocks(state.model):
        block.mlp.register_forward_hook(lambda *_: calls.append(1))
    checkpoint_activations(state.model)
    compute_gradients(PLAIN, make_process(PLAIN.process), state, state.model, micro_batches(PLAIN))
    assert len(calls) == 6


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_gradients_are_near(precision):
    """The scale of float16's loss is out of them again."""
    half = apply_overrides(PLAIN, [f"precision={precision}"])
    assert_close(gradients(PLAIN), gradients(half), 0.05)


def test_a_float16_overflow_is_seen_in_the_norm():
    config = apply_overrides(PLAIN, ["precision=float16"])

    def explode(model):
        with torch.no_grad():
            model.output.weight.mul_(1e6)

    _, norm, _ = gradients(config, explode)
    assert not torch.isfinite(torch.tensor(norm))


def test_the_update_ratio_is_that_of_the_weights():
    state = new_state(PLAIN, torch.device("cpu"))
    before = weights_copy(state)
    compute_gradients(PLAIN, make_process(PLAIN.process), state, state.model, micro_batches(PLAIN))
    update_weights(PLAIN, state, progress=0.0)
    old, new = (torch.cat([p.detach().double().flatten() for p in ps]) for ps in (before, state.parameters))
    expected = float((new - old).norm() / new.norm())
    assert expected > 0
    assert update_ratio(*squared_sizes(state, before)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("batch", "parts", "ranks", "near"), [(10, 1, 4, "8 or 12"), (3, 2, 2, "take 4"), (7, 3, 1, "6 or 9")]
)
def test_a_batch_that_does_not_divide_is_named(batch, parts, ranks, near):
    with pytest.raises(UserError, match=rf"loop.batch_size={batch} .*{near}"):
        check_divisible(batch, parts, ranks)


def test_a_batch_as_tensors_and_back():
    (batch,) = micro_batches(PLAIN)
    again = batch_from_tensors(batch_tensors(batch))
    assert torch.equal(again.x0, batch.x0)
    assert torch.equal(again.cond.class_labels, batch.cond.class_labels)
    assert again.cond.text_embeds is None
