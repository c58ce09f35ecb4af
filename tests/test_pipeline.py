"""Pipelines: calls share nothing, threads change nothing, compiling changes rounding alone."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch


def test_calls_from_eight_threads_give_the_bytes_of_calls_in_turn(trained_pipeline):
    solvers = ["dpmpp_2m", "ddim", "ddpm", "flow_euler"]

    def call(i):
        return trained_pipeline(
            [i % 10, (i + 3) % 10],
            seed=i,
            solver=solvers[i % 4],
            num_inference_steps=4 + i % 5,
            guidance_scale=1.0 + i % 3,
        ).tensor

    in_turn = [call(i) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(call, range(24)))
    for one, other in zip(in_turn, at_once, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_a_compiled_pipeline_is_one_graph_and_serves_every_guidance_scale(trained_run):
    """In a process of its own: the run-time shape checks of these tests are nothing to compile."""
    script = """
import sys, torch, smalti
pipe = smalti.load(sys.argv[1])
compiled = pipe.compiled()
for scale in (2.0, 1.5, 3.0):
    arguments = {"class_labels": [3, 7], "num_inference_steps": 6, "guidance_scale": scale}
    torch.testing.assert_close(compiled(**arguments).tensor, pipe(**arguments).tensor, rtol=1e-4, atol=1e-5)
counters = torch._dynamo.utils.counters
assert not counters["graph_break"], counters["graph_break"]
assert counters["stats"]["unique_graphs"] == 1, counters["stats"]
"""
    subprocess.run([sys.executable, "-c", script, str(trained_run)], check=True)
