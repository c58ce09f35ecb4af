"""Config: strict overrides, errors that teach, JSON round trip."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.cli import join_repeated_set
from smalti.config import Budget, RunConfig, apply_overrides, from_json, to_json
from smalti.errors import UserError
from smalti.optim.ema import ExponentialEma, PowerEma
from smalti.optim.optimizers import AdamWConfig, MuonConfig
from smalti.optim.schedule import Schedule, learning_rate_factor
from smalti.recipes import recipe, recipe_names

MNIST = recipe("mnist")


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_survive_json(name):
    config = recipe(name)
    assert from_json(RunConfig, json.loads(json.dumps(to_json(config)))) == config


@settings(max_examples=30, deadline=None)
@given(
    batch_size=st.integers(1, 512),
    rate=st.floats(1e-6, 1.0),
    optimizer=st.sampled_from(["adamw", "muon"]),
    ema=st.sampled_from(["power", "exponential"]),
)
def test_overridden_configs_survive_json(batch_size, rate, optimizer, ema):
    overrides = [f"optimizer={optimizer}", f"ema={ema}", f"batch_size={batch_size}", f"optimizer.learning_rate={rate}"]
    config = apply_overrides(MNIST, overrides)
    assert config.loop.batch_size == batch_size
    assert config.optimizer.learning_rate == rate
    assert isinstance(config.optimizer, {"adamw": AdamWConfig, "muon": MuonConfig}[optimizer])
    assert isinstance(config.ema, {"power": PowerEma, "exponential": ExponentialEma}[ema])
    assert from_json(RunConfig, json.loads(json.dumps(to_json(config)))) == config


def test_overrides_take_unique_names_and_dotted_paths():
    config = apply_overrides(MNIST, ["checkpoint_every=10", "model.depth=2", "compile=true", "schedule.decay=cosine"])
    assert (config.loop.checkpoint_every, config.model.depth, config.loop.compile) == (10, 2, True)
    assert apply_overrides(MNIST, ["image_size=28x28"]).model.image_size == (28, 28)
    assert apply_overrides(MNIST, []) == MNIST


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["bach_size=3"], "did you mean 'batch_size'"),
        (["batch_size"], "form field=value"),
        (["batch_size=many"], "must be int"),
        (["batch_size=0"], "loop.batch_size=0"),
        (["kind=adamw"], "unknown field"),
        (["positions=fourier"], "must be one of sincos"),
        (["optimizer=sgd"], "optimizer='sgd' must be one of adamw, muon"),
        (["max_decay=0.9"], "has no effect: it belongs to ema=exponential"),
        (["optimizer=adamw", "momentum=0.9"], "has no effect: it belongs to optimizer=muon"),
        (["min_snr_gamma=3"], "has no effect while weighting=uniform"),
        (["schedule.decay=none", "final_factor=0.1"], "has no effect while decay=none"),
        (["schedule.decay=step"], "must be one of none, linear, cosine, sqrt"),
        (["patch_size=5"], "must divide by model.patch_size"),
        (["image_size=32,32"], "the digits are"),
        (["image_size=28"], "2 values"),
        (["minutes=3"], "unknown field"),
        (["amount=3"], "--minutes, --steps or --epochs"),
        (["process=vp"], "unknown process"),
        (["solver=dpm"], "unknown solver"),
        (["num_classes=5"], "10 classes"),
    ],
)
def test_bad_overrides_are_refused(overrides, says):
    with pytest.raises(UserError, match=says):
        apply_overrides(MNIST, overrides)


def test_unknown_json_keys_are_refused():
    body = to_json(MNIST)
    body["model"]["widht"] = 3
    with pytest.raises(UserError, match=r"unknown key model\.widht"):
        from_json(RunConfig, body)


def test_budget_must_be_positive():
    with pytest.raises(UserError, match="must be above 0"):
        replace(MNIST, budget=Budget("steps", 0))


def test_repeated_set_flags_are_joined():
    assert join_repeated_set(["train", "m", "--set", "a=1", "--steps", "3", "--set", "b=2", "c=3", "--resume"]) == [
        "train", "m", "--steps", "3", "--resume", "--set", "a=1", "b=2", "c=3"
    ]  # fmt: skip


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'mnist'"):
        recipe("minst")


def test_schedule_warms_up_holds_and_decays():
    schedule = Schedule(warmup_steps=10, decay="linear", decay_share=0.5)
    factors = [learning_rate_factor(schedule, step, step / 100) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10:51] == [1.0] * 41
    assert factors[75] == pytest.approx(0.5)
    assert factors[100] == 0.0


@pytest.mark.parametrize(
    ("decay", "quarter", "half"),
    [("linear", 0.75, 0.5), ("cosine", 0.5 + 0.5**1.5, 0.5), ("sqrt", 0.5, 1 - 0.5**0.5)],
)
def test_shapes_of_the_decay(decay, quarter, half):
    """Over the last fifth of a run (WSD): full until then, 0 at the end, never rising."""
    schedule = Schedule(warmup_steps=0, decay=decay, decay_share=0.2)
    factor = {share: learning_rate_factor(schedule, 500, 0.8 + 0.2 * share) for share in (-1, 0, 0.25, 0.5, 1)}
    expected = {-1: 1, 0: 1, 0.25: quarter, 0.5: half, 1: 0}
    assert factor == pytest.approx(expected, abs=1e-7)
    floored = Schedule(warmup_steps=0, decay=decay, decay_share=0.2, final_factor=0.1)
    assert learning_rate_factor(floored, 500, 1.0) == pytest.approx(0.1)


@settings(max_examples=20, deadline=None)
@given(std=st.floats(0.02, 0.25))
def test_power_ema_has_the_width_it_is_asked_for(std):
    """Weights of the average over 2,000 steps have the relative standard deviation of the profile."""
    ema, steps = PowerEma(std), 2000
    weights, kept = [], 1.0
    for step in range(steps, 0, -1):
        weights.append(kept * (1 - ema.decay(step)))
        kept *= ema.decay(step)
    times = [step / steps for step in range(steps, 0, -1)]
    total = sum(weights)
    mean = sum(w * t for w, t in zip(weights, times, strict=True)) / total
    variance = sum(w * (t - mean) ** 2 for w, t in zip(weights, times, strict=True)) / total
    assert total == pytest.approx(1.0, abs=1e-6)
    assert variance**0.5 == pytest.approx(std, rel=0.02)
