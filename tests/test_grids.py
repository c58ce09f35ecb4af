"""Time grids: their ends, the published lists, and the shift that moves log-SNR exactly once."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from smalti.diffusion import make_process, process_names
from smalti.diffusion.timesteps import shift_timesteps
from smalti.errors import UserError
from smalti.sampling import make_plan
from smalti.sampling.grids import explicit_grid, spacings, time_grid


def noise_levels(process, times):
    """sigma / alpha."""
    return torch.exp(-process.log_snr(torch.tensor(times, dtype=torch.float64))).numpy()


@settings(max_examples=150, deadline=None)
@given(
    process_name=st.sampled_from(process_names()),
    spacing=st.sampled_from(spacings()),
    steps=st.integers(2, 40),
    ends=st.sampled_from([(None, None), (0.9, None), (0.9, 0.4), (1.0, 0.3)]),
)
def test_grids_fall_from_start_to_end(process_name, spacing, steps, ends):
    process = make_process(process_name)
    times = time_grid(process, steps, spacing, *ends)
    assert times.shape == (steps + 1,)
    assert (np.diff(times) < 0).all()
    assert times[0] == (process.t_max if ends[0] is None else ends[0])
    assert times[-1] == (0.0 if ends[1] is None else ends[1])


@settings(max_examples=200, deadline=None)
@given(
    process_name=st.sampled_from(process_names()),
    spacing=st.sampled_from(spacings()),
    solver=st.sampled_from(["ddim", "dpmpp_2m", "edm_euler", "unipc_2"]),
    steps=st.integers(2, 20),
    log_shift=st.floats(-1.5, 1.5),
    ends=st.sampled_from([(None, None), (0.9, None), (0.9, 0.4), (1.0, 0.3)]),
)
def test_shift_moves_log_snr_exactly_once(process_name, spacing, solver, steps, log_shift, ends):
    process = make_process(process_name)
    arguments = {"process": process, "num_inference_steps": steps, "spacing": spacing}
    arguments |= {"t_start": ends[0], "t_end": ends[1]}
    plain = make_plan(solver, **arguments)
    try:
        shifted = make_plan(solver, **arguments, shift=math.exp(log_shift))
    except UserError:
        assume(False)  # no room at an end
    assert shifted.times[0] == plain.times[0]
    assert shifted.next_times[-1] == plain.next_times[-1]
    before, after = (process.log_snr(torch.tensor(plan.times[1:])) for plan in (plain, shifted))
    torch.testing.assert_close(after, before - log_shift, rtol=0, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(shift=st.floats(0.1, 20.0), steps=st.integers(2, 50))
def test_shift_of_rectified_flow_is_that_of_its_training_times(shift, steps):
    """Through lambda here, by SD3's formula there: one shift."""
    times = time_grid(make_process("rectified_flow"), steps, "time", 1.0, shift=shift)
    np.testing.assert_allclose(times, shift_timesteps(np.linspace(1, 0, steps + 1), shift), rtol=0, atol=1e-12)


def test_shift_of_rectified_flow_is_that_of_sd3():
    """SD3 (Esser et al. 2024), eq. 23, at k = 3."""
    times = time_grid(make_process("rectified_flow"), 4, "time", 1.0, shift=3.0)
    np.testing.assert_allclose(times, [1.0, 0.9, 0.75, 0.5, 0.0], rtol=0, atol=1e-12)


def test_a_shift_without_room_is_refused():
    with pytest.raises(UserError, match=r"shift=3\.0 moves nodes"):
        time_grid(make_process("vp_linear"), 50, "lambda", shift=3.0)


@pytest.mark.parametrize("name", ["vp_linear", "rectified_flow"])
def test_karras_grid_is_the_published_ramp(name):
    process, rho, steps = make_process(name), 7.0, 18
    times = time_grid(process, steps, "karras")
    high, low = (s ** (1 / rho) for s in noise_levels(process, [process.t_max, process.t_min]))
    ramp = (high + np.arange(steps) / (steps - 1) * (low - high)) ** rho  # Karras et al. 2022, eq. 5
    np.testing.assert_allclose(noise_levels(process, times[:-1]), ramp, rtol=1e-6)
    assert times[-1] == 0.0


def test_lambda_and_exponential_are_the_same():
    process = make_process("vp_cosine")
    np.testing.assert_array_equal(time_grid(process, 9, "lambda"), time_grid(process, 9, "exponential"))
    assert np.allclose(np.diff(np.log(noise_levels(process, time_grid(process, 9, "exponential")[:-1])), 2), 0)


def test_align_your_steps_is_the_published_list():
    published = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152]
    process = make_process("vp_linear")
    start = float(process.t_of_log_snr(torch.tensor(-math.log(published[0]), dtype=torch.float64)))
    np.testing.assert_allclose(noise_levels(process, time_grid(process, 10, "ays", start)[:-1]), published, rtol=1e-9)
    twenty = noise_levels(process, time_grid(process, 20, "ays", start)[:-1])
    np.testing.assert_allclose(twenty[::2], published, rtol=1e-9)
    np.testing.assert_allclose(twenty[1:-2:2] ** 2, twenty[:-2:2] * twenty[2::2], rtol=1e-9)  # even in the logarithm


def test_beta_grid_is_dense_at_both_ends():
    times = time_grid(make_process("rectified_flow"), 20, "beta", 1.0)
    np.testing.assert_allclose(times, 1 - times[::-1], atol=1e-12)
    assert times[0] - times[1] < 0.3 * (times[10] - times[11])


def test_zero_snr_tables_start_at_pure_noise():
    """Where lambda is infinite at t_max a ramp in lambda begins beside it, and the grid still at t_max."""
    for name in process_names():
        process = make_process(name)
        if math.isfinite(float(process.log_snr(torch.tensor(process.t_max, dtype=torch.float64)))):
            continue
        for spacing in spacings():
            plan = make_plan("dpmpp_2m", process=process, num_inference_steps=6, spacing=spacing)
            assert plan.times[0] == process.t_max
            assert np.isfinite(plan.matrices).all()


def test_explicit_times_are_the_grid():
    plan = make_plan("ddim", process=make_process("vp_linear"), times=[0.9, 0.5, 0.1])
    assert [*plan.times, plan.next_times[-1]] == [0.9, 0.5, 0.1]
    np.testing.assert_array_equal(explicit_grid((1.0, 0.0)), [1.0, 0.0])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"times": [0.5, 0.5]}, "times=.*must be two or more"),
        ({"times": [0.1, 0.5]}, "fall strictly"),
        ({"times": [1.2, 0.5]}, "within"),
        ({"times": [0.5, float("nan")]}, "fall strictly"),
        ({"times": [0.5]}, "two or more"),
        ({"times": [0.5, 0.1], "num_inference_steps": 3}, "num_inference_steps=3 contradicts"),
        ({"times": [0.5, 0.1], "spacing": "time"}, "spacing='time' has no effect"),
        ({"times": [0.5, 0.1], "shift": 2.0}, "shift=2.0 has no effect"),
        ({}, "num_inference_steps is missing"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5"),
        ({"num_inference_steps": 5, "shift": 0.0}, "shift=0.0 must be above 0"),
        ({"num_inference_steps": 5, "spacing": "karas"}, "did you mean 'karras'"),
        ({"num_inference_steps": 5, "t_start": 0.0005, "spacing": "lambda"}, "t_start=0.0005"),
        ({"num_inference_steps": 5, "t_start": 1.5}, "t_start=1.5"),
    ],
)
def test_bad_grids_are_refused(arguments, says):
    with pytest.raises(UserError, match=says):
        make_plan("ddim", process=make_process("vp_linear"), **arguments)
