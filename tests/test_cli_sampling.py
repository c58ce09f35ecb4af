"""The sampling commands beyond the plain call: options, editing, explaining, tuning."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from training_runs import tiny_config

from smalti import rng
from smalti.checkpoint import list_checkpoints
from smalti.cli import main
from smalti.data.digits import load_digits
from smalti.data.rows import to_signed_unit
from smalti.diffusion import make_process
from smalti.errors import UserError
from smalti.evaluation.digits import evaluate_run
from smalti.evaluation.ems import estimate_run_ems
from smalti.evaluation.frechet import frechet_distance
from smalti.evaluation.judge import Judge, judge_features
from smalti.evaluation.tune import (
    Setting,
    candidates,
    frontier_calls,
    read_tune,
    steps_for_calls,
    tune_run,
)
from smalti.pipeline import load
from smalti.sampling import GuidanceOptions, make_plan, solver_names
from smalti.sampling.ems import estimate_ems
from smalti.sampling.plot import plot_plan
from smalti.training.display import PlainDisplay
from smalti.training.loop import train
from smalti.types import Condition


@pytest.fixture(scope="module")
def run(trained_run, tmp_path_factory):
    """A copy of the trained run, to write into."""
    return shutil.copytree(trained_run, tmp_path_factory.mktemp("copy") / "run")


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


def test_eval_judges_the_samples_that_its_flags_ask_for(trained_run, tmp_path, capsys, monkeypatch):
    """With a judge of random weights: what is judged is the point here."""
    torch.manual_seed(0)
    judge = Judge().eval()
    monkeypatch.setattr("smalti.evaluation.digits.load_judge", lambda progress: judge)
    run = shutil.copytree(trained_run, tmp_path / "run")
    arguments = [
        "eval", run, "--num-images", 100, "--process", "edm", "--solver", "edm_heun", "--num-inference-steps", 2,
        "--solver-options", "s_churn=1", "--guidance-scale", 3,
    ]  # fmt: skip
    distances = []
    for interval in ([], ["--guidance-interval", 0.2, 0.9]):
        assert called(*arguments, *interval) == 0
        distances.append(json.loads((run / "evaluation.json").read_text())["frechet"]["value"])
        said = capsys.readouterr().out
        assert "edm_heun on edm, 3 network calls, guidance 3" in said
        assert ("interval (0.2, 0.9)" in said) == bool(interval)
    assert distances[0] != distances[1]
    pipe = load(run).on_process("edm")
    guidance = GuidanceOptions(interval=(0.2, 0.9))
    labels = [i % 10 for i in range(100)]
    drawn = pipe(labels, num_inference_steps=2, solver="edm_heun", guidance_scale=3.0, guidance=guidance, s_churn=1)
    features, _ = judge_features(judge, drawn.tensor)
    real, _ = judge_features(judge, to_signed_unit(load_digits()[1].images))
    expected = frechet_distance(features.double().numpy(), real.double().numpy())
    assert distances[1] == pytest.approx(expected, rel=1e-3)


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


@pytest.fixture(scope="module")
def ems(run):
    """The run's statistics at guidance 3, where tune looks for them."""
    measured = called(
        "ems", run, "--num-images", 6, "--num-nodes", 3, "--batch-size", 4, "--seed", 1, "--guidance-scale", 3
    )
    assert measured == 0
    return run / "ems.npz"


def test_ems_measures_what_dpm_solver_v3_samples_with(run, ems, tmp_path, capsys):
    out = tmp_path / "samples"
    command = ["sample", run, "--solver", "dpm_solver_v3", "--num-inference-steps", 3, "--class-labels", 0]
    command += ["--num-images-per-label", 1, "--solver-options", f"ems={ems}", "order=3", "--out", out]
    assert called(*command, "--guidance-scale", 3) == 0
    assert "guidance" not in capsys.readouterr().err
    (row,) = rows_of(out)
    assert (row["solver"], row["network_calls"], row["ems"]) == ("dpm_solver_v3", 3, str(ems))
    origin = row["ems_origin"]
    checkpoint = list_checkpoints(run / "checkpoints")[-1].name
    assert (origin["guidance_scale"], origin["checkpoint"], origin["num_samples"]) == (3.0, checkpoint, 6)
    assert (origin["process"], origin["prediction_type"]) == ("rectified_flow", "velocity")
    # At another scale it samples too, and says so.
    assert called(*command, "--guidance-scale", 2) == 0
    assert "measured at guidance 3" in capsys.readouterr().err


def test_ems_of_a_run_are_those_of_its_denoiser_on_its_digits(run):
    """Each argument counts; a picture's label is its own."""
    first = list_checkpoints(run / "checkpoints")[0].name
    measured = {"num_nodes": 2, "secant_width": 0.2, "seed": 5, "batch_size": 3}
    ticks = []
    ems = estimate_run_ems(
        run, num_images=4, guidance_scale=3.0, checkpoint=first, progress=lambda *tick: ticks.append(tick), **measured
    )
    assert ticks == [(done, 6) for done in range(1, 7)]
    assert (ems.origin.guidance_scale, ems.origin.checkpoint, ems.origin.num_samples) == (3.0, first, 4)
    pictures, _ = load_digits()
    x0, labels = pictures.labelled(rng.permutation(len(pictures), seed=5, purpose="ems/rows")[:4])
    pipe = load(run, checkpoint=first)
    expected = estimate_ems(
        lambda rows: pipe.denoiser(len(rows), 3.0), pipe.process, x0, Condition(class_labels=labels), **measured
    )
    for name in ("log_snrs", "l", "s", "b"):
        torch.testing.assert_close(getattr(ems, name), getattr(expected, name), rtol=1e-9, atol=1e-9)
    assert estimate_run_ems(run, num_images=3, num_nodes=2).origin.guidance_scale == pipe.config.sampling.guidance_scale
    with pytest.raises(UserError, match="num_images=2 must lie in 3"):
        estimate_run_ems(run, num_images=2)


def test_explain_prints_coefficients_per_element(ems, capsys):
    options = ["--process", "vp_cosine", "--steps", 4, "--solver-options", f"ems={ems}"]
    assert called("explain", "--solver", "dpm_solver_v3", *options) == 0
    said = capsys.readouterr().out
    assert "4 network calls" in said
    assert "+c x0" in said


def test_tune_tries_dpm_solver_v3_where_the_statistics_are(run, ems):
    pipe = load(run)
    assert not any(s.solver == "dpm_solver_v3" for s in candidates(pipe, 4))
    tried = [s for s in candidates(pipe, 4, ems) if s.solver == "dpm_solver_v3"]
    assert {s.spacing for s in tried} == {"time", "lambda", "karras"}
    for s in tried:
        assert pipe.plan(s.num_inference_steps, s.solver, s.spacing, **dict(s.solver_options)).num_calls == 4


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


def strict_json(path):
    """As other languages read it: NaN and Infinity are no numbers."""

    def refuse(word):
        raise AssertionError(f"{word} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_samplers_that_diverged_are_null_in_json_and_infinite_again(run, tmp_path, monkeypatch):
    """A judge that finds every sample infinitely far."""
    judge = Judge().eval()
    copy = shutil.copytree(run, tmp_path / "run")
    for module in ("tune", "digits"):
        monkeypatch.setattr(f"smalti.evaluation.{module}.load_judge", lambda progress=None: judge)
        monkeypatch.setattr(f"smalti.evaluation.{module}.frechet_distance", lambda a, b: float("inf"))
    two = [Setting("ddim", 2, "time", 2.0), Setting("edm_euler", 2, "time", 2.0, (0.2, 0.9), (("s_churn", 1.0),))]
    monkeypatch.setattr("smalti.evaluation.tune.candidates", lambda pipe, calls, ems: two)
    result = tune_run(copy, budget=2, num_images=100)
    assert strict_json(copy / "tune.json")["own"]["frechet"] is None
    assert read_tune(copy) == result
    assert result.own.frechet == float("inf")
    evaluate_run(copy, num_images=100, num_inference_steps=2)
    assert strict_json(copy / "evaluation.json")["frechet"]["value"] is None
    (copy / "tune.json").write_text("{}")
    with pytest.raises(UserError, match=r"tune\.json is damaged"):
        read_tune(copy)
    with pytest.raises(UserError, match=r"tune\.json is missing"):
        read_tune(tmp_path)


def test_an_infinite_option_is_null_in_the_manifest(run, tmp_path):
    options = ["--solver", "edm_euler", "--solver-options", "s_churn=1", "s_tmax=Infinity"]
    out = tmp_path / "out"
    assert called("sample", run, "--class-labels", 1, "--num-images-per-label", 1, *options, "--out", out) == 0
    assert strict_json(out / "manifest.jsonl")["s_tmax"] is None


@pytest.mark.slow
def test_tune_prints_a_frontier_and_a_command_that_runs(run, ems, tmp_path):
    result = tune_run(run, budget=3, num_images=100)
    assert [s.network_calls for s in result.frontier] == sorted(s.network_calls for s in result.frontier)
    assert all(s.network_calls <= 3 for s in result.frontier)
    written = json.loads((run / "tune.json").read_text())
    assert len(written["tried"]) == len(result.tried)
    assert any(s.setting.solver == "dpm_solver_v3" for s in result.tried)
    assert Image.open(result.picture).size[0] > 500
    assert read_tune(run) == result
    v3 = Setting("dpm_solver_v3", 3, "time", 2.0, solver_options=(("ems", str(ems)), ("order", 2)))
    by_v3 = replace(result, frontier=(replace(result.best, setting=v3),))
    for found in (result, by_v3):
        command = found.command(run).split()[1:]
        assert called(*command, "--num-images-per-label", 1, "--out", tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("arguments", "field", "says"),
    [
        (["--solver", "dpmp_2m"], "solver", "did you mean 'dpmpp_2m'"),
        (["--spacing", "kerras"], "spacing", "did you mean 'karras'"),
        (["--num-inference-steps", 0], "num_inference_steps=0", "at least 1"),
        (["--num-inference-steps", 2, "--solver", "dpmpp_3m"], "num_inference_steps=2", "at least 3"),
        (["--solver", "flow_heun", "--process", "vp_linear_discrete"], "process 'vp_linear_discrete'", "'vp_linear'"),
        (["--image", "PICTURE", "--mask", "OTHER"], "mask has shape", "28, 28"),
        (["--image", "OTHER", "--strength", 0.5], "editing.image has shape", "28, 28"),
        (["--image", "PICTURE", "--strength", "nan"], "strength=nan", "(0, 1]"),
        (["--guidance-scale", "nan"], "guidance_scale=nan", "finite"),
        (["--solver-options", "t_start=NaN"], "t_start=nan", "a number"),
    ],
)
def test_a_bad_sampler_is_one_line_that_names_the_field(run, tmp_path, capsys, arguments, field, says):
    for name, size in (("PICTURE", (28, 28)), ("OTHER", (27, 28))):
        Image.new("L", size, 200).save(tmp_path / f"{name}.png")
    pictures = [tmp_path / f"{a}.png" if a in ("PICTURE", "OTHER") else a for a in arguments]
    assert called("sample", run, *pictures, "--class-labels", 1, "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert field in line
    assert says in line


def test_guidance_of_an_unconditional_run_exits_with_2(tmp_path, capsys):
    train(tiny_config(1, "num_classes=0"), tmp_path / "run", display=PlainDisplay(1e9))
    assert called("sample", tmp_path / "run", "--guidance-scale", 2, "--out", tmp_path / "out") == 2
    assert "guidance_scale=2.0: this network is unconditional" in capsys.readouterr().err
