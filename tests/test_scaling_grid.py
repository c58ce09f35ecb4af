"""Which runs a study consists of, and how its budget is shared out."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scaling_studies import tiny_spec

from smalti.config import Budget
from smalti.errors import UserError
from smalti.scaling.budget import StepTimes, StudyBudget, parse_budget, smallest_budget, study_seconds
from smalti.scaling.grid import (
    FEWEST_STEPS,
    Cell,
    affordable,
    cell_config,
    cell_key,
    expected_layout,
    layout,
    lowest_point,
    sizes_around,
)
from smalti.scaling.spec import ScalingSpec, Size, bundled_specs, find_spec, size_of, with_overrides

LADDER = tuple(Size(width, 77 * width**2, 200.0 * width**2, 16) for width in (24, 32, 48, 64, 96, 128, 192, 256, 384))
SPEC = ScalingSpec("law", widths=tuple(size.width for size in LADDER), slices=4, sizes_per_slice=4)


def completed(spec, smallest, loss):
    """The layout of a study whose losses are loss(parameters, images), run from beginning to end."""
    results = {}
    for _ in range(1000):
        planned = layout(spec, LADDER, smallest, results)
        missing = [c for c in planned.cells if (c.slice_number, c.size.width) not in results]
        if not missing:
            return planned, results
        cell = missing[0]
        results[cell.slice_number, cell.size.width] = loss(cell.size.parameters, cell.images)
    raise AssertionError("it does not end")


@given(
    alpha=st.floats(0.2, 0.8), beta=st.floats(0.2, 0.8), balance=st.floats(-2.0, 2.0), smallest=st.floats(1e10, 1e13)
)
@settings(deadline=None, max_examples=60)
def test_each_slice_brackets_its_minimum_wherever_the_widths_allow_it(alpha, beta, balance, smallest):
    def loss(n, d):
        return 0.1 + (n / 1e5) ** -alpha + math.exp(balance) * (d / 1e5) ** -beta

    planned, results = completed(SPEC, smallest, loss)
    assert len(planned.slices) == SPEC.slices
    assert planned.held_out is not None
    assert planned.held_out.budget == pytest.approx(smallest * SPEC.compute_range)
    for part in planned.slices:
        assert part.complete
        widths = [cell.size.width for cell in part.cells]
        ladder = [size.width for size in affordable(LADDER, part.budget)]
        first = ladder.index(widths[0])
        assert widths == ladder[first : first + len(widths)]  # neighbours, none left out
        best = min(ladder, key=lambda w: loss(77 * w**2, Cell(0, part.budget, LADDER[ladder.index(w)]).images))
        assert part.best is not None
        if part.edge is None:
            assert widths[0] < part.best.size.width < widths[-1]
            assert part.best.size.width == best  # of a loss with one minimum, the lowest of the ladder
            assert widths[0] * widths[0] * 77 < lowest_point(part) < widths[-1] * widths[-1] * 77
        else:
            assert part.best.size.width in (ladder[0], ladder[-1])
        assert all(cell.steps >= FEWEST_STEPS or cell.size is LADDER[0] for cell in part.cells)
    assert all((part.number, cell.size.width) in results for part in planned.slices for cell in part.cells)


def test_a_slice_whose_minimum_the_widths_do_not_reach_says_so():
    planned, _ = completed(SPEC, 1e12, lambda n, d: float(n))
    assert planned.slices[0].edge == "its lowest loss is at its smallest size, width 24"
    planned, _ = completed(SPEC, 1e12, lambda n, d: 1 / n)
    assert planned.slices[0].edge is not None
    assert "largest size" in planned.slices[0].edge


def test_failed_runs_do_not_stop_a_study():
    planned, _ = completed(SPEC, 1e12, lambda n, d: None)
    assert [part.edge for part in planned.slices] == ["no run of it finished"] * SPEC.slices
    assert planned.held_out is None
    planned, _ = completed(SPEC, 1e12, lambda n, d: None if n > 77 * 64**2 else abs(math.log(n / 3e5)))
    assert all(part.complete for part in planned.slices)


@given(st.randoms(use_true_random=False), st.floats(0.0, 0.1))
@settings(deadline=None, max_examples=40)
def test_the_order_in_which_runs_end_does_not_matter(random, noise):
    """Whichever of the wanted runs ends next, the same study comes out, and no run was in vain."""

    def loss(n, d):
        draw = math.sin(n * 12.9898 + d * 78.233)
        return (0.1 + (n / 1e5) ** -0.4 + (d / 1e5) ** -0.4) * (1 + noise * draw)

    whole, _ = completed(SPEC, 1e12, loss)
    results = {}
    while missing := [
        c for c in layout(SPEC, LADDER, 1e12, results).cells if (c.slice_number, c.size.width) not in results
    ]:
        cell = random.choice(missing)
        results[cell.slice_number, cell.size.width] = loss(cell.size.parameters, cell.images)
    assert layout(SPEC, LADDER, 1e12, results) == whole
    assert set(results) == {(cell.slice_number, cell.size.width) for cell in whole.cells}


def test_a_slice_need_not_wait_for_the_sizes_that_the_one_below_adds():
    results = {}
    while True:
        known = layout(SPEC, LADDER, 1e14, results)
        first = known.slices[0]
        if len(known.slices) == 2:
            break
        for cell in first.cells:
            results[0, cell.size.width] = float(cell.size.parameters)  # its best size lies below all
    assert not first.complete
    assert len(first.cells) == len(first.first_widths) + 1
    assert known.slices[1].cells


def test_sizes_around_a_number_of_parameters():
    sizes = sizes_around(LADDER, 77 * 64**2, 3)
    assert [size.width for size in sizes] == [48, 64, 96]
    assert [size.width for size in sizes_around(LADDER, 1.0, 3)] == [24, 32, 48]
    assert [size.width for size in sizes_around(LADDER, 1e12, 3)] == [192, 256, 384]
    assert len(sizes_around(LADDER[:2], 1e5, 4)) == 2


def test_a_cell_trains_what_its_budget_buys():
    spec = tiny_spec()
    config = spec.config()
    size = size_of(config, 24, spec.base_width)
    cell = Cell(0, 1e9, size)
    assert cell.flops == pytest.approx(1e9, rel=0.5 / cell.steps)
    run = cell_config(config, cell, spec.base_width)
    assert run.budget == Budget("steps", float(cell.steps))
    assert run.model.width == 24
    assert run.parametrisation is not None
    assert run.schedule.warmup_steps <= cell.steps / 10
    assert cell_key(run) == cell_key(cell_config(config, cell, spec.base_width))
    assert cell_key(run) != cell_key(replace(run, seed=1))


def test_flops_and_parameters_are_the_models_own():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from smalti.diffusion.processes import make_process
    from smalti.models.registry import build_model, count_parameters
    from smalti.training.batch import training_batch
    from smalti.training.data import open_run_data

    spec = tiny_spec()
    size = size_of(spec.config(), 24, spec.base_width)
    config = cell_config(spec.config(), Cell(0, 1e9, size), spec.base_width)
    network = build_model(config.model, 0)
    assert size.parameters == sum(count_parameters(network).values())
    data = open_run_data(config, torch.device("cpu"), None)
    batch = training_batch(config, make_process(config.process), data.training, 0)
    with FlopCounterMode(display=False) as counter:
        network(batch.x0, batch.t.float(), batch.cond)
    forward = counter.get_total_flops() / len(batch.x0)
    assert size.flops_per_image == 3 * forward  # a backward counts as two forwards


@pytest.mark.parametrize(
    ("text", "unit", "amount"),
    [
        ("60min", "seconds", 3600), ("2h", "seconds", 7200), ("90s", "seconds", 90), ("0.5 h", "seconds", 1800),
        ("1e15", "flops", 1e15), ("2.5e12flops", "flops", 2.5e12), ("1E15", "flops", 1e15),
    ],
)  # fmt: skip
def test_budgets(text, unit, amount):
    assert parse_budget(text) == StudyBudget(unit, amount)


@pytest.mark.parametrize("text", ["", "an hour", "-5min", "0", "5 parsecs", "1e400", "1..2min", "min"])
def test_what_is_no_budget(text):
    with pytest.raises(UserError, match="--budget"):
        parse_budget(text)


def too_little(seconds, times, slots):
    """Whether the time is refused, in the words that say so."""
    try:
        smallest_budget(SPEC, LADDER, StudyBudget("seconds", seconds), times, slots)
    except UserError as error:
        return "too small" in str(error)
    return False


@given(seconds=st.floats(600, 1e5), step=st.floats(1e-3, 1e-1), slots=st.integers(1, 8))
@settings(deadline=None, max_examples=25)
def test_a_study_fits_in_its_time(seconds, step, slots):
    times = StepTimes((1e5, 1e8), (step, 4 * step), 2.0)
    if too_little(seconds, times, slots):
        return
    smallest = smallest_budget(SPEC, LADDER, StudyBudget("seconds", seconds), times, slots)
    planned = expected_layout(SPEC, LADDER, smallest)
    took = study_seconds(planned, SPEC, times, slots)
    assert took <= seconds
    assert took > 0.6 * seconds  # and uses it
    assert len(planned.cells) >= 3 * SPEC.slices + 1  # the smallest slices may afford no more


def test_step_times_are_a_line_between_sizes():
    times = StepTimes((1e5, 1e6, 1e7), (0.01, 0.02, 0.1), 1.0)
    size = Size(1, 1, 5.5e5, 1)
    assert times.step(size) == pytest.approx(0.015)
    assert times.step(replace(size, flops_per_image=1e4)) == 0.01
    assert times.step(replace(size, flops_per_image=1e8)) == pytest.approx(1.0)


def test_bundled_studies_are_sound():
    for spec in bundled_specs().values():
        sizes = spec.sizes()
        assert [size.parameters for size in sizes] == sorted(size.parameters for size in sizes)
    assert find_spec("digits") == bundled_specs()["digits"]


def test_a_study_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"name": "mine", "widths": [32, 64, 128], "sizes_per_slice": 3, "set": ["batch_size=8"]}')
    spec = find_spec(str(path))
    assert spec.widths == (32, 64, 128)
    assert with_overrides(spec, ["seed=3"]).set == ("batch_size=8", "seed=3")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"name": "a", "widths": [64, 32, 128]}', "widths=\\(64, 32, 128\\) must rise"),
        ('{"name": "a", "widths": [32, 64]}', "must rise and be at least 3"),
        ('{"name": "a", "slices": 1}', "slices=1 must be at least 2"),
        ('{"name": "a", "compute_range": 1}', "compute_range=1 must be above 1"),
        ('{"name": "a", "samples": 7}', "samples=7 must be 0 or at least 100"),
        ('{"name": "a b"}', "must be letters"),
        ('{"name": "a", "sizes_per_slice": 2}', "sizes_per_slice=2 must lie in 3"),
        ('{"name": "a", "wdiths": [1]}', "unknown key wdiths"),
        ("{", "is no JSON"),
        ("[]", "must be an object with at least a name"),
    ],
)
def test_what_is_no_study(tmp_path, body, words):
    path = tmp_path / "bad.json"
    path.write_text(body)
    with pytest.raises(UserError, match=words):
        find_spec(str(path))


def test_what_cannot_be_scaled_is_said():
    with pytest.raises(UserError, match="did you mean"):
        find_spec("digit")
    with pytest.raises(UserError, match="muP: there are rules for"):
        tiny_spec(set=("model=unet",)).sizes()
    with pytest.raises(UserError, match="parametrisation is the study's own"):
        tiny_spec(set=("parametrisation=mup",)).sizes()
    with pytest.raises(UserError, match="scaling study 'tiny'"):
        tiny_spec(set=("no_such_field=1",)).sizes()
    with pytest.raises(UserError, match=r"does not exist|cannot read"):
        find_spec("nowhere.json")
