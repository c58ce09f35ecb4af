"""The coordinate check and the transfer study: activations that ignore the width, studies that go on after a stop."""

import dataclasses
import json
import math

import pytest
import torch
from PIL import Image
from training_runs import tiny_config

import smalti.optim.mup as mup
from smalti.cli import main
from smalti.config import apply_overrides
from smalti.errors import UserError
from smalti.models import DiTConfig, MMDiTConfig, UViTConfig
from smalti.recipes import recipe
from smalti.training import transfer as transfer_module
from smalti.training.coordinates import FLAT, check_coordinates, log_slope
from smalti.training.transfer import (
    Cell,
    Curve,
    Grid,
    Transfer,
    cell_config,
    cell_key,
    gather,
    read_results,
    run_transfer,
)
from smalti.training.widths import at_width

STUDIED = tiny_config(4, "optimizer=adamw", "batch_size=16", "checkpoint_every=2")
SMALL = {"image_size": (28, 28), "patch_size": 7, "width": 64, "num_heads": 4}


def studied_on(model, **changes):
    config = dataclasses.replace(STUDIED, model=model)
    if isinstance(model, MMDiTConfig):
        text = apply_overrides(recipe("emoji-32"), []).text
        config = dataclasses.replace(config, text=dataclasses.replace(text, width=16, num_heads=1, depth=1))
    return dataclasses.replace(config, **changes)


NETWORKS = {
    "dit": DiTConfig(**SMALL, depth=1, initialisation="wide"),
    "mmdit": MMDiTConfig(
        **SMALL, depth=2, in_channels=1, text_width=16, pooled_width=16, position_grid=4, initialisation="wide"
    ),
    "uvit": UViTConfig(**SMALL, depth=2),
}


def check_of(kind, widths=(32, 64, 128, 256)):
    torch.set_num_threads(1)
    return check_coordinates(studied_on(NETWORKS[kind]), widths, base_width=32, steps=3, seeds=1, learning_rate=2**-7)


@pytest.mark.parametrize("kind", NETWORKS)
def test_activations_and_updates_are_flat_under_mup_and_not_under_the_standard_parametrisation(kind):
    check = check_of(kind)
    assert abs(check.steepest("mup")[1]) <= FLAT, check.slopes("mup")
    assert abs(check.steepest("standard")[1]) > 2 * FLAT, check.slopes("standard")


def test_log_slope_is_the_power():
    assert log_slope([1, 2, 4], [3.0, 6.0, 12.0]) == pytest.approx(1)
    assert log_slope([2, 4, 8, 16], [5 * w**-0.5 for w in (2, 4, 8, 16)]) == pytest.approx(-0.5)
    assert log_slope([1, 2], [1.0, math.nan]) == math.inf
    assert math.isnan(log_slope([1, 2], [0.0, 1.0]))


@pytest.mark.parametrize(
    ("kind", "broken"),
    [
        ("uvit", {(True, True): "input"}),  # hidden matrices at the full rate
        ("uvit", {(True, False): "fixed"}),  # a readout that is neither scaled nor slowed
        ("dit", {(False, True): "readout"}),  # inputs that shrink
    ],
)
def test_the_check_finds_a_role_that_is_wrong(kind, broken, monkeypatch):
    monkeypatch.setattr(mup, "_ROLES", mup._ROLES | broken)
    if kind == "dit":
        monkeypatch.setattr(mup, "_root_mean_square", lambda tensor: 1.0)  # initial weights stay xavier's
    assert abs(check_of(kind, (32, 256)).steepest("mup")[1]) > FLAT


def test_at_width_scales_heads_or_their_width():
    more = at_width(STUDIED, 128, "mup", 32).model
    assert (more.num_heads, more.attention_scale) == (8, 1.0)
    wider = at_width(STUDIED, 128, "mup", 32, keep_heads=True)
    assert (wider.model.num_heads, wider.model.attention_scale) == (2, 0.5)
    assert wider.parametrisation == mup.MuP(32, 16)
    assert at_width(STUDIED, 128, "standard", 32, keep_heads=True).model.attention_scale == 1.0
    assert at_width(STUDIED, 32, "mup", 32) == at_width(STUDIED, 32, "standard", 32)


GRID = Grid((32, 64), (2.0**-9, 2.0**-7), steps=2, base_width=32)


def test_a_study_that_was_stopped_goes_on_and_runs_no_cell_twice(tmp_path, monkeypatch):
    trained, real = [], transfer_module.train

    def counting(config, folder, **options):
        trained.append(folder.name)
        return real(config, folder, **options)

    monkeypatch.setattr(transfer_module, "train", counting)
    first = run_transfer(STUDIED, GRID, tmp_path / "a", max_cells=4)
    assert (first.missing, len(trained)) == (2, 4)
    with (tmp_path / "a" / "results.jsonl").open("a") as file:
        file.write('{"key": "torn')  # a kill in the middle of a line
    seen = []
    whole = run_transfer(STUDIED, GRID, tmp_path / "a", progress=lambda done, total: seen.append((done, total)))
    assert whole.missing == 0
    assert len(set(trained)) == len(trained) == 6  # at the base width both parametrisations are one run
    assert (seen[0], seen[-1]) == ((9, 12), (12, 12))
    assert list((tmp_path / "a" / "cells").glob("*[!k]")) == []
    assert whole.curves["mup"][0] == whole.curves["standard"][0]
    assert whole.curves["mup"][1] != whole.curves["standard"][1]


def test_a_diverged_cell_is_recorded_and_left_out_of_the_best(tmp_path):
    grid = Grid((32, 64), (2.0**-9, 1e30), steps=3, base_width=32)
    study = run_transfer(STUDIED, grid, tmp_path, max_cells=2)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["loss"] is None for row in rows] == [False, True]
    curve = study.curves["standard"][0]
    assert math.isnan(curve.losses[1])
    assert curve.best == 0
    key = cell_key(cell_config(STUDIED, grid, Cell("mup", 64, 2.0**-9)))
    assert key not in read_results(tmp_path)
    assert gather(STUDIED, grid, tmp_path).missing == 4
    seeds = dataclasses.replace(grid, seeds=2)
    assert gather(STUDIED, seeds, tmp_path).missing == 10  # a second seed leaves the first one's results
    assert cell_config(STUDIED, seeds, Cell("mup", 64, 2.0**-9, 1)).seed == STUDIED.seed + 1


def test_a_study_says_how_far_the_best_rate_moved_and_what_that_costs():
    rates = (0.25, 0.5, 1.0, 2.0)
    narrow = Curve(64, rates, ((5.0,), (3.0,), (2.0,), (3.0,)))
    wide = Curve(256, rates, ((1.5,), (1.0,), (1.5,), (math.nan,)))
    study = Transfer(
        Grid((64, 256), rates, steps=1, base_width=64), {"standard": (narrow, wide), "mup": (narrow, narrow)}, 0
    )
    assert (study.moved("standard"), study.drift("standard"), study.penalty("standard")) == (-1, -1, 0.5)
    assert (study.moved("mup"), study.drift("mup"), study.penalty("mup")) == (0, 0, 0)
    assert study.to_json(STUDIED)["standard"]["best"] == {"64": 1.0, "256": 0.5}


def test_the_lowest_point_of_a_curve():
    rates = (0.25, 0.5, 1.0, 2.0)
    exact = [(math.log2(rate) + 0.75) ** 2 + 3 for rate in rates]
    curve = Curve(64, rates, tuple((loss - 0.5, loss + 0.5) for loss in exact))
    assert curve.losses == pytest.approx(exact)
    assert curve.best == 1
    assert curve.vertex == pytest.approx(-0.75)
    assert Curve(64, rates, ((1.0,), (2.0,), (3.0,), (4.0,))).vertex == -2
    assert Curve(64, rates, ((1.0, math.nan), (2.0, 2.0), (3.0, 3.0), (4.0, 4.0))).vertex == -1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"widths": (64,)}, "--widths 64: give at least two"),
        ({"widths": (64, 64)}, "give at least two different"),
        ({"learning_rates": (0.1, 0.1)}, "--learning-rates: give at least two different"),
        ({"learning_rates": (0.1, -0.1)}, "all must be above 0"),
        ({"learning_rates": (0.1, math.nan)}, "all must be above 0"),
        ({"steps": 0}, "--steps 0 must be at least 1"),
        ({"seeds": 0}, "--seeds 0 must be at least 1"),
        ({"widths": (32, 40)}, "--widths 40: must divide by the width of a head, 16"),
        ({"widths": (32, 64), "base_width": 8}, "base_width=8 must divide by the head width, 16"),
        ({"widths": (32, 6), "base_width": 32, "keep_heads": True}, "--widths 6: model.width=6 must divide by 4"),
    ],
)
def test_mistakes_in_a_grid_are_named(options, says, tmp_path):
    with pytest.raises(UserError, match=says):
        run_transfer(STUDIED, dataclasses.replace(GRID, **options), tmp_path)


def called(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return stop.value.code or 0, *capsys.readouterr()


TINY = ["--set", "image_size=28,28", "patch_size=7", "depth=1", "model.width=32", "num_heads=2", "batch_size=8"]


def test_the_commands_write_numbers_and_pictures(tmp_path, capsys):
    code, said, error = called(
        capsys, "mup", "coord-check", "--widths", 32, 64, "--base-width", 32, "--steps", 2, "--seeds", 1, "--out",
        tmp_path, *TINY,
    )  # fmt: skip
    assert code in (0, 1), error
    assert "mup: flat (steepest:" in said or code == 1
    body = json.loads((tmp_path / "coord-check.json").read_text())
    assert body["widths"] == [32, 64]
    assert set(body["mup"]["output"]) == {"before", "after", "change", "slope_after", "slope_change"}
    arguments = [
        "mup", "transfer", "--widths", 32, 64, "--base-width", 32, "--steps", 2, "--learning-rates", 0.001, 0.01,
        "--out", tmp_path, *TINY,
    ]  # fmt: skip
    code, said, error = called(capsys, *arguments, "--max-cells", 1)
    assert (code, "5 runs are left" in said) == (0, True), error
    code, said, error = called(capsys, *arguments)
    assert code == 0, error
    assert "mup, width 64: best rate" in said
    assert "mup: the best rate moved by" in said
    body = json.loads((tmp_path / "transfer.json").read_text())
    assert len(body["standard"]["losses"]["64"]) == 2
    for name in ("coord-check.png", "transfer.png"):
        assert Image.open(tmp_path / name).size[0] > 500


def test_the_commands_refuse_what_they_cannot_study(tmp_path, capsys):
    code, _, error = called(capsys, "mup", "transfer", "mnist", "--set", "parametrisation=mup", "--out", tmp_path)
    assert (code, "give --base-width" in error) == (2, True)
    code, _, error = called(capsys, "mup", "transfer", "mnist", "--set", "optimizer=lion", "--out", tmp_path)
    assert (code, "optimizer='lion' must be one of adamw, muon" in error) == (2, True)
    code, _, error = called(capsys, "mup", "transfer", "mnist", "--max-cells", "0", "--out", tmp_path)
    assert (code, "--max-cells 0 must be at least 1" in error) == (2, True)
    (tmp_path / "file").write_text("")
    code, _, error = called(capsys, "mup", "coord-check", "mnist", "--out", tmp_path / "file")
    assert (code, "cannot write to --out" in error) == (2, True)
