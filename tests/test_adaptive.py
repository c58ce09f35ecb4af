"""The adaptive solver: as exact as asked, one sample's steps are its own."""

import pytest
import torch
from gaussian import GaussianDenoiser

from smalti import rng
from smalti.diffusion import make_process
from smalti.errors import UserError
from smalti.sampling import solve_adaptive
from smalti.types import Condition

MEAN, VARIANCE = torch.tensor([[0.7, -0.3], [0.09, 0.5]], dtype=torch.float64)
X = rng.normal((2,), seed=torch.arange(6), purpose="adaptive", dtype=torch.float64)


@pytest.mark.parametrize("process_name", ["rectified_flow", "vp_linear", "vp_cosine"])
def test_the_error_follows_the_tolerance(process_name):
    process = make_process(process_name)
    denoiser = GaussianDenoiser(process, MEAN, VARIANCE)
    exact = denoiser.exact_flow(X, 0.95, 0.05)
    errors, calls = [], []
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        end, used = solve_adaptive(process, denoiser, X, rtol=tolerance, atol=tolerance, t_start=0.95, t_end=0.05)
        errors.append(float((end - exact).abs().max()))
        calls.append(used)
    assert all(error < 30 * tolerance for error, tolerance in zip(errors, (1e-3, 1e-5, 1e-7, 1e-9), strict=True)), (
        errors
    )
    assert calls == sorted(calls)
    assert calls[-1] < 400


def test_a_sample_does_not_depend_on_its_batch_mates():
    process = make_process("vp_cosine")
    denoiser = GaussianDenoiser(process, MEAN, VARIANCE)

    def shifted(x, t, cond):
        return denoiser(x, t) + cond.class_labels[:, None]

    labels = torch.arange(6)
    together, calls = solve_adaptive(process, shifted, X * labels[:, None], Condition(class_labels=labels))
    alone = [
        solve_adaptive(process, shifted, X[i : i + 1] * i, Condition(class_labels=labels[i : i + 1])) for i in range(6)
    ]
    torch.testing.assert_close(together, torch.cat([x for x, _ in alone]), rtol=1e-12, atol=1e-12)
    assert len({used for _, used in alone}) > 1  # they do differ
    assert calls >= max(used for _, used in alone)


def test_it_ends_on_the_estimate_from_pure_noise():
    process = make_process("rectified_flow")
    end, _ = solve_adaptive(process, lambda x, t, cond: torch.full_like(x, 0.25), X, t_start=1.0)
    torch.testing.assert_close(end, torch.full_like(X, 0.25), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rtol": 0.0}, "rtol=0.0 must be above 0"),
        ({"t_start": 0.2, "t_end": 0.4}, "t_end < t_start"),
        ({"process": make_process("vp_linear_discrete")}, "process 'vp_linear_discrete' is a table of steps"),
        ({"x": X / 0}, "x has entries"),
    ],
)
def test_mistakes_are_refused(arguments, says):
    arguments = {"process": make_process("vp_linear"), "denoiser": lambda x, t, cond: x, "x": X, **arguments}
    with pytest.raises(UserError, match=says):
        solve_adaptive(**arguments)
