"""The planner: its operations, its memory against real tensors, its arithmetic, and the command."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from training_runs import TINY

from smalti.cli import main
from smalti.config import Budget, LoopConfig, apply_overrides
from smalti.diffusion.objective import per_sample_loss
from smalti.diffusion.processes import make_process
from smalti.models.registry import forward_flops
from smalti.optim.optimizers import AdamWConfig
from smalti.recipes import recipe
from smalti.scaling.accelerators import ACCELERATORS, Devices, parse_devices, product_precision_on
from smalti.scaling.amounts import amount_text, bytes_text, duration_text, parse_amount, parse_count
from smalti.scaling.measured_training import MeasuredTraining, measure_training
from smalti.scaling.planned_config import planned_config, trainable_models
from smalti.scaling.planner import Amount, plan_run
from smalti.scaling.step_memory import spread, step_memory
from smalti.training.batch import Batch
from smalti.training.state import new_state
from smalti.training.step import clip_gradients, compute_gradients, update_weights
from smalti.types import Condition

SMALL = apply_overrides(recipe("mnist"), [*TINY, "loop.batch_size=8", "precision=float32"])


def real_batch(config):
    rows, model = config.loop.batch_size, config.model
    x0, eps = (torch.randn(rows, model.in_channels, *model.image_size) for _ in range(2))
    t = torch.linspace(0.1, 0.9, rows, dtype=torch.float64)
    return Batch(x0, eps, t, Condition(class_labels=torch.arange(rows) % 10))


def after_a_step(config):
    """A real state after one real step."""
    state, process = new_state(config, torch.device("cpu")), make_process(config.process)
    compute_gradients(
        config, process, state, state.model, [real_batch(config)] * config.loop.gradient_accumulation_steps
    )
    clip_gradients(config, state)
    update_weights(config, state, 0.5)
    return state


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def state_bytes(state):
    entries = [e for optimizer in state.optimizers.values() for e in optimizer.state.values()]
    return nbytes(v for entry in entries for v in entry.values() if isinstance(v, torch.Tensor))


def of_module(module):
    return nbytes([*module.parameters(), *module.buffers()])


@pytest.mark.parametrize("overrides", [(), ("optimizer=adamw",), ("ema=post_hoc",), ("optimizer=schedule_free",)])
def test_weights_averages_gradients_and_optimizer_state_are_the_real_ones(overrides):
    if "optimizer=schedule_free" in overrides:
        overrides = (*overrides, "ema=by_optimizer", "schedule.decay=none")
    config = apply_overrides(SMALL, overrides)
    planned, state = step_memory(config, "float32", cpu=True).whole, after_a_step(config)
    assert planned.weights == of_module(state.model)
    assert planned.averages == sum(of_module(average) for average in state.averages().values())
    assert planned.optimizer == state_bytes(state)
    assert planned.gradients == nbytes(p.grad for p in state.parameters)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_are_those_that_a_real_forward_keeps(precision):
    """Counted another way: unique storages that autograd saves, on real tensors."""
    config = replace(SMALL, loop=replace(SMALL.loop, precision=precision))
    state, batch = new_state(config, torch.device("cpu")), real_batch(config)
    own = {t.untyped_storage().data_ptr() for t in (*state.model.parameters(), *state.model.buffers())}
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        per_sample_loss(
            state.model, make_process(config.process), config.objective, batch.x0, batch.eps, batch.t, batch.cond
        )
    expected = sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in own)
    planned = step_memory(config, precision, cpu=True).whole.activations
    pictures = nbytes([batch.x0])  # target, output and input are alive too; the loss keeps its own difference
    casts = nbytes(state.model.parameters()) // 2 if precision == "bfloat16" else 0  # kept by autocast until its end
    assert expected - 2 * pictures <= planned <= expected + 5 * pictures + casts


def test_activations_grow_with_the_batch_and_not_with_checkpointing():
    whole = {n: step_memory(replace(SMALL, loop=replace(SMALL.loop, batch_size=n)), "float32", True) for n in (8, 16)}
    small, large = whole[8].whole, whole[16].whole
    assert large.activations == pytest.approx(2 * small.activations, rel=0.05)
    assert (large.weights, large.optimizer) == (small.weights, small.optimizer)
    checkpointed = apply_overrides(SMALL, ["activation_checkpointing=true"])
    assert step_memory(checkpointed, "float32", True).whole.activations < 0.5 * small.activations
    parts = apply_overrides(SMALL, ["loop.batch_size=16", "gradient_accumulation_steps=2"])
    assert step_memory(parts, "float32", True).whole.activations == pytest.approx(small.activations, rel=0.05)


def test_planning_makes_nothing_real_and_leaves_no_trace():
    before = torch.get_default_device(), torch.is_autocast_enabled("cpu"), torch.initial_seed()
    memory = step_memory(replace(planned_config("dit-s-8"), loop=LoopConfig(batch_size=2)), "bfloat16", cpu=False)
    assert memory.parameters == pytest.approx(33e6, rel=0.03)  # DiT, table 4
    assert before == (torch.get_default_device(), torch.is_autocast_enabled("cpu"), torch.initial_seed())
    assert torch.ones(1).item() == 1.0
    assert torch.ones(1).device.type == "cpu"


@pytest.mark.parametrize("name", ["mnist", "mnist-masked", "emoji-32"])
def test_every_kind_of_run_is_planned(name):
    memory = step_memory(recipe(name), "float32", cpu=True)
    assert all(peak.total > 0 for peak in memory.peaks.values())
    assert set(memory.peaks) == {"forward", "backward", "update", "validation"}


def test_fsdp_divides_and_ddp_keeps_the_gradients():
    step = step_memory(SMALL, "float32", cpu=False)
    alone, ddp, fsdp = step.peaks["backward"], *(spread(step, 4, s)["backward"] for s in ("ddp", "fsdp"))
    assert spread(step, 1, "fsdp") == step.peaks
    assert (ddp.weights, ddp.optimizer, ddp.gradients) == (alone.weights, alone.optimizer, step.whole.gradients)
    for part in ("weights", "optimizer", "averages"):
        assert getattr(fsdp, part) == -(-getattr(alone, part) // 4)
    assert fsdp.activations == alone.activations
    assert fsdp.workspace - alone.workspace == step.outside_blocks + 3 * step.largest_block


def test_flops_are_the_registrys_and_what_pytorch_counts():
    config = apply_overrides(SMALL, ["optimizer=adamw"])
    plan = plan_run(config, Devices(ACCELERATORS["h100"]), Amount(steps=10))
    assert plan.forward_flops == forward_flops(config.model)
    state, batch = new_state(config, torch.device("cpu")), real_batch(config)
    with FlopCounterMode(display=False) as counted:
        state.model(batch.x0, batch.t.float(), batch.cond)
    assert plan.forward_flops * 8 == pytest.approx(counted.get_total_flops(), rel=0.01)
    assert plan.step_flops == 24 * plan.forward_flops
    again = apply_overrides(config, ["activation_checkpointing=true"])
    assert plan_run(again, plan.devices, Amount(steps=10)).executed_flops == pytest.approx(32 * plan.forward_flops)


def test_time_cost_and_amounts():
    devices = parse_devices("h100x8")
    config = apply_overrides(SMALL, ["precision=bfloat16"])

    def plan(amount, **options):
        return plan_run(config, devices, amount, utilisation=0.5, dataset_images=1000, **options)

    by_steps = plan(Amount(steps=1000), price_per_hour=2.0)
    assert by_steps.step_seconds == pytest.approx(by_steps.step_flops / (8 * 989.4e12 * 0.5))
    assert by_steps.seconds == pytest.approx(1000 * by_steps.step_seconds)
    assert by_steps.device_hours == pytest.approx(8 * by_steps.seconds / 3600)
    assert by_steps.cost == pytest.approx(2 * by_steps.device_hours)
    assert by_steps.passes == 8.0
    assert plan(Amount(images=8001)).steps == 1001
    assert plan(Amount(epochs=8.0)).steps == 1000
    assert plan(Amount(flops=1000 * by_steps.step_flops)).steps == 1000
    assert plan(Amount(minutes=1000 * by_steps.step_seconds / 60)).steps == 1000


def test_a_measured_run_counts_what_lies_between_its_steps():
    measured = MeasuredTraining(step=0.1, opening=2.0, validation=1.0, grid=5.0, checkpoint=0.5)
    loop = LoopConfig(validate_every=100, preview_every=1000, checkpoint_every=250)
    assert measured.run_seconds(loop, 300) == pytest.approx(2 + 30 + 3 * 1 + 5 + 2 * 0.5)


@pytest.mark.slow
def test_measuring_trains_for_a_moment(tmp_path):
    measured = measure_training(SMALL, tmp_path / "run", steps=5)
    assert measured.step > 0
    assert measured.opening >= 0
    assert measured.grid > 0
    assert not (tmp_path / "run").exists()
    plan = plan_run(SMALL, parse_devices("cpu"), Amount(steps=50), measured=measured)
    assert plan.seconds == measured.run_seconds(SMALL.loop, 50)
    assert plan.utilisation is None
    assert plan.cost is None


@pytest.mark.slow
def test_what_does_not_fit_says_what_would():
    small = replace(ACCELERATORS["l4"], memory=11 * 2**28)
    config = apply_overrides(SMALL, ["model.width=64", "depth=3", "loop.batch_size=4096", "precision=bfloat16"])
    plan = plan_run(config, Devices(small, 2), Amount(steps=1))
    assert not plan.fits
    assert any(line.startswith("--activation-checkpointing") for line in plan.advice)
    changed = replace(config, loop=replace(config.loop, activation_checkpointing=True))
    assert plan_run(changed, Devices(small, 2), Amount(steps=1)).fits
    nothing = plan_run(config, Devices(replace(small, memory=2**29)), Amount(steps=1)).advice
    assert len(nothing) == 1
    assert nothing[0].startswith("not even one picture")


@pytest.mark.parametrize(
    ("text", "amount"),
    [("1.3M", 1.3e6), ("400K", 4e5), ("400k", 4e5), ("1e18", 1e18), ("2B", 2e9), ("50_000", 5e4), ("1,000", 1e3)],
)
def test_amounts_as_people_write_them(text, amount):
    assert parse_amount(text, "--data") == pytest.approx(amount)


@given(st.floats(1, 9e17))
def test_amounts_are_read_back(amount):
    assert parse_amount(amount_text(amount), "x") == pytest.approx(amount, rel=0.006)


def test_units():
    assert (bytes_text(3 * 2**29), bytes_text(2**20)) == ("1.50 GiB", "1.0 MiB")
    assert [duration_text(s) for s in (0.25, 90, 5400, 36000, 864000)] == [
        "250 ms", "90.0 s", "90.0 minutes", "10.0 hours", "10.0 days",
    ]  # fmt: skip
    assert parse_count("1.3M", "--data") == 1_300_000


def test_devices_by_name():
    assert (parse_devices("h100x8").accelerator.name, parse_devices("h100x8").count) == ("h100", 8)
    assert str(parse_devices("RTX4090")) == "rtx4090"
    assert parse_devices("rtx4090x2").count == 2
    assert product_precision_on(ACCELERATORS["t4"], LoopConfig(precision="auto")) == "float32"
    assert product_precision_on(ACCELERATORS["a10"], LoopConfig(precision="auto")) == "bfloat16"


def test_models_by_their_papers_names():
    assert planned_config("DiT-XL/2") == planned_config("dit-xl-2")
    assert {"dit-b-4", "sd3-medium", "pixart-xl-2", "sana-0.6b"} <= set(trainable_models())


def called(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments])
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_the_command(capsys):
    code, out, _ = called(capsys, "--model", "dit-s-8", "--data", "1.3M", "--gpu", "h100x8")
    assert code == 0
    for words in (
        "h100 x 8, bfloat16, ddp",
        "400,000 steps",
        "78.8 passes over 1.3M",
        "dollars",
        "activations",
        "fits:",
    ):
        assert words in out


def test_the_command_as_json(capsys):
    arguments = ("--recipe", "mnist", "--no-measure", "--steps", "100", "--set", *TINY)
    code, out, _ = called(capsys, *arguments, "--json")
    body = json.loads(out)
    assert code == 0
    assert body["steps"] == 100
    assert body["devices"]["name"] == "cpu"
    assert body["memory"]["fits"]
    assert body["measured"] is None
    assert body["seconds"]["run"] > 0
    assert body["cost"] is None
    peak = body["memory"]["peaks"][body["memory"]["peak_moment"]]
    assert peak.pop("total") == sum(peak.values())


def test_the_command_on_a_run_and_its_options(capsys, trained_run):
    code, out, _ = called(
        capsys, "--recipe", str(trained_run), "--gpu", "l4", "--images", "1M", "--batch-size", "32", "--ema", "2",
        "--optimizer", "adamw", "--activation-checkpointing", "--price-per-hour", "0.5", "--mfu", "0.2", "--json",
    )  # fmt: skip
    body = json.loads(out)
    assert code == 0
    assert body["steps"] == 31_250
    assert body["utilisation"] == 0.2
    assert body["price_per_hour"] == 0.5
    assert body["config"]["ema"]["kind"] == "post_hoc"
    assert body["config"]["optimizer"]["kind"] == "adamw"
    assert body["flops"]["executed_step"] == pytest.approx(4 / 3 * body["flops"]["step"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "dit-xl-2", "--gpu", "h10x8"), "'h100'"),
        (("--model", "dit-xl-2", "--gpu", "h100x0"), "at least once"),
        (("--model", "dit-xl-3", "--gpu", "l4"), "'dit-xl-2'"),
        (("--model", "dit-s-8", "--data", "0", "--gpu", "l4"), "--data 0 must be above 0"),
        (("--model", "dit-s-8", "--images", "many", "--gpu", "l4"), "--images 'many' must be a number"),
        (("--model", "dit-s-8", "--epochs", "3", "--gpu", "l4"), "--data 1.3M"),
        (("--model", "dit-s-8", "--epochs", "-1", "--gpu", "l4"), "--epochs -1 must be above 0"),
        (("--model", "dit-s-8", "--epochs", "3", "--steps", "5", "--gpu", "l4"), "give one of --steps, --epochs"),
        (("--model", "dit-s-8", "--batch-size", "10", "--gpu", "l4x4"), "8 or 12"),
        (("--model", "dit-s-8", "--gpu", "l4", "--mfu", "35"), "--mfu 35 must lie in (0, 1]"),
        (("--model", "dit-s-8", "--gpu", "l4", "--price-per-hour", "-1"), "--price-per-hour -1"),
        (("--model", "dit-s-8", "--gpu", "t4", "--precision", "bfloat16"), "has float32, float16"),
        (("--model", "dit-s-8", "--gpu", "l4", "--ema", "0"), "--ema 0"),
        (("--gpu", "l4"), "one of them"),
        (("--model", "dit-s-8", "--recipe", "mnist"), "one of them"),
        (("--recipe", "mnst", "--gpu", "l4"), "'mnist'"),
        (("--recipe", "mnist", "--measure-steps", "2"), "--measure-steps 2"),
    ],
)
def test_a_mistake_is_told_in_one_line(capsys, arguments, words):
    code, _, err = called(capsys, *arguments)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


def test_budget_of_the_recipe_is_the_default(capsys):
    config = replace(SMALL, budget=Budget("steps", 7.0), optimizer=AdamWConfig())
    assert config.budget.unit == "steps"
    _, out, _ = called(capsys, "--recipe", "mnist", "--gpu", "l4", "--json")
    body = json.loads(out)
    assert body["seconds"]["run"] == pytest.approx(180, rel=0.01)
