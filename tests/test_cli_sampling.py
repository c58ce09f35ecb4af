"""The sampling commands beyond the plain call: options, editing, explaining, tuning."""

import json

import pytest
import torch
from PIL import Image
from training_runs import tiny_config

from smalti.cli import main
from smalti.diffusion import make_process
from smalti.evaluation.tune import candidates, frontier_calls, steps_for_calls, tune_run
from smalti.pipeline import load
from smalti.sampling import make_plan, solver_names
from smalti.sampling.plot import plot_plan
from smalti.training.display import PlainDisplay
from smalti.training.loop import train
from smalti.types import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny_config(6), path, display=PlainDisplay(1e9))
    return path


def called(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return stop.value.code or 0


def rows_of(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def test_sample_takes_solver_options_process_and_guidance(run, tmp_path, capsys):
    out = tmp_path / "out"
    code = called(
        "sample", run, "--class-labels", 1, "--num-images-per-label", 2, "--process", "edm", "--solver", "edm_heun",
        "--num-inference-steps", 3, "--solver-options", "s_churn=1", "s_noise=1.003", "--guidance-scale", 3,
        "--guidance-interval", 0.2, 0.9, "--negative-class-labels", 7, "--out", out,
    )  # fmt: skip
    assert code == 0
    row = rows_of(out)[0]
    assert (row["process"], row["s_churn"], row["s_noise"], row["network_calls"]) == ("edm", 1, 1.003, 5)
    assert row["guidance"]["interval"] == [0.2, 0.9]


def test_sample_edits_a_picture(run, tmp_path):
    image = tmp_path / "image.png"
    mask = tmp_path / "mask.png"
    Image.new("L", (28, 28), 200).save(image)
    half = Image.new("L", (28, 28), 0)
    half.paste(255, (14, 0, 28, 28))
    half.save(mask)
    out = tmp_path / "out"
    arguments = ["sample", run, "--class-labels", 1, "--num-images-per-label", 1, "--num-inference-steps", 4]
    assert called(*arguments, "--image", image, "--mask", mask, "--out", out) == 0
    painted = Image.open(out / "00000.png")
    assert {painted.getpixel((x, y)) for x in range(14) for y in range(28)} == {200}
    assert called(*arguments, "--image", image, "--strength", 0.4, "--out", out) == 0
    assert rows_of(out)[0]["strength"] == 0.4


def test_explain_lists_every_solver_and_draws_a_plan(tmp_path, capsys):
    assert called("explain", "--solver", "list") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in solver_names())
    path = tmp_path / "plan.png"
    assert called("explain", "--solver", "unipc_2", "--steps", 5, "--process", "vp_cosine", "--plot", path) == 0
    assert Image.open(path).size[0] > 500


def test_a_plot_of_an_unknown_format_is_refused(tmp_path):
    plan = make_plan("ddim", process=make_process("edm"), num_inference_steps=4)
    with pytest.raises(UserError, match="--plot"):
        plot_plan(plan, tmp_path / "plan.nothing")


def test_the_search_spends_no_more_than_the_calls_given(run):
    pipe = load(run)
    for calls in (4, 10):
        settings = candidates(pipe, calls)
        assert len({s.solver for s in settings}) >= 5
        for s in settings:
            assert pipe.plan(s.num_inference_steps, s.solver, s.spacing).num_calls <= calls
    assert steps_for_calls(pipe, "edm_heun", "karras", 9) == 5  # the last step costs one call
    assert steps_for_calls(pipe, "dpmpp_3m", "lambda", 2) is None
    assert frontier_calls(10) == [3, 4, 6, 8, 10]


@pytest.mark.slow
def test_tune_prints_a_frontier_and_a_command_that_runs(run, tmp_path):
    torch.manual_seed(0)
    result = tune_run(run, budget=3, num_images=100)
    assert [s.network_calls for s in result.frontier] == sorted(s.network_calls for s in result.frontier)
    assert all(s.network_calls <= 3 for s in result.frontier)
    written = json.loads((run / "tune.json").read_text())
    assert len(written["tried"]) == len(result.tried)
    assert Image.open(result.picture).size[0] > 500
    command = result.command(run).split()[1:]
    assert called(*command, "--num-images-per-label", 1, "--out", tmp_path / "out") == 0
