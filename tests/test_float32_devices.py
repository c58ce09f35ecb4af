"""A device without float64, as mps is: nothing makes a float64 tensor there. The meta device plays its part."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smalti import rng
from smalti.diffusion import make_process
from smalti.diffusion.denoiser import NetworkDenoiser
from smalti.diffusion.processes import Interpolant, process_names
from smalti.models.video_dit import VideoDiTConfig, rotary_axes, sincos_positions_3d
from smalti.nn.positions import rescaled_sincos_grid, rope_angles, rope_grid


class _NoFloat64(TorchDispatchMode):
    """Refuses what mps refuses."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type == "meta" and value.dtype == torch.float64:
                raise TypeError(f"{function} makes a float64 tensor")
        return result


@pytest.fixture(autouse=True)
def _no_float64(monkeypatch):
    monkeypatch.setattr(rng, "_WITHOUT_FLOAT64", ("mps", "meta"))
    with _NoFloat64():
        yield


def given_interpolant():
    return Interpolant(lambda t: 1 - t, lambda t: t, lambda t: torch.sqrt(t * (1 - t)))


PROCESSES = [*(lambda name=name: make_process(name) for name in process_names()), given_interpolant]


def test_the_device_refuses_float64():
    with pytest.raises(TypeError, match="float64"):
        torch.ones(2, device="meta").double()
    assert torch.ones(2).double().dtype == torch.float64


@pytest.mark.parametrize("process_of", PROCESSES, ids=[*process_names(), "given"])
def test_a_process_is_asked_there(process_of):
    process = process_of()
    t = torch.full((3,), 0.5, device="meta")
    for function in (
        process.alpha, process.sigma, process.alpha_dot, process.sigma_dot, process.log_snr, process.t_of_log_snr,
        process.network_time,
    ):  # fmt: skip
        assert function(t).dtype == torch.float32
    x = torch.ones(3, 1, 4, 4, device="meta")
    assert NetworkDenoiser(lambda x, t, cond: x, process, "v")(x, t).dtype == torch.float32


@pytest.mark.parametrize("name", process_names())
def test_a_float32_table_gives_the_same_to_rounding(name, monkeypatch):
    """On the CPU, with and without float64."""
    t = torch.tensor([0.0123, 0.3456, 0.7812, 0.95])
    values = []
    for kinds in (("mps", "cpu"), ("mps",)):
        monkeypatch.setattr(rng, "_WITHOUT_FLOAT64", kinds)
        process = make_process(name)
        values.append([process.alpha(t), process.sigma(t), process.t_of_log_snr(process.log_snr(t))])
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)


def test_positions_are_built_there():
    config = VideoDiTConfig()
    device = torch.device("meta")
    for table in (
        rope_grid((2, 3), (4, 4), 100.0, "meta"),
        rope_angles(torch.ones(3, 1, device="meta"), (4,), 100.0),
        rescaled_sincos_grid(8, 2, 3, (4, 4), 1.0, "meta"),
        *rotary_axes(config, (2, 4, 6), device),
        *rotary_axes(VideoDiTConfig(patch_frames=2), (2, 4, 6), device),
        sincos_positions_3d(config, (2, 4, 6), device),
    ):
        assert table.device.type == "meta"
        assert table.dtype == torch.float32
