"""The comparison lab: specs, plans, a small comparison to its end, and going on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_comparisons import SMALL, given_plan, small_spec

from smalti.cli import main
from smalti.comparison.budget import (
    FEWEST_SAMPLES,
    Speed,
    measure_speed,
    network_steps,
    plan_training,
    samples_after_training,
    sampling_seconds,
    training_flops,
)
from smalti.comparison.bundled import bundled_specs, find_spec
from smalti.comparison.memory import peak_memory
from smalti.comparison.pictures import grid_png
from smalti.comparison.report import render
from smalti.comparison.run import run_comparison
from smalti.comparison.scores import DigitsYardstick, proportion
from smalti.comparison.spec import ComparisonSpec, Contender, parameter_count, spec_from_json
from smalti.errors import UserError
from smalti.evaluation.cards import Extractor, Reference, card_from_json
from smalti.evaluation.judge import Judge
from smalti.models import build_model
from smalti.pipeline import Pipeline, load
from smalti.recipes import recipe_names
from smalti.run_folder import read_config, read_rows


def untrained_yardstick() -> DigitsYardstick:
    """A judge that knows nothing and takes no time; its features tell pictures apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = Judge().eval()
    real = np.random.default_rng(0).normal(size=(200, 64))
    return DigitsYardstick(judge, real, 0.1, Extractor("untrained", "0"), Reference("noise", 200, "0"))


# --- specs


def available(spec: ComparisonSpec) -> bool:
    return all(contender.recipe in recipe_names() for contender in spec.contenders)


@pytest.mark.parametrize("name", sorted(bundled_specs()))
def test_bundled_specs_fit_together(name):
    spec = find_spec(name)
    assert spec_from_json(json.loads(json.dumps(spec.to_json()))) == spec
    if available(spec):
        configs = spec.configs()
        assert not any(config.loop.compile or config.loop.writers for config in configs.values())


def test_the_bundled_contenders_differ_in_what_they_are_named_after():
    kinds = find_spec("adaln-zero-vs-adaln-vs-cross-attention-vs-in-context").configs()
    assert {name: config.model.conditioning for name, config in kinds.items()} == {
        name: name.replace("-", "_") for name in ("adaln-zero", "adaln", "cross-attention", "in-context")
    }
    assert [c.model.patch_size for c in find_spec("patch-size").configs().values()] == [2, 4, 7]
    processes = find_spec("dit-vs-sit-vs-edm").configs()
    assert len({c.process for c in processes.values()}) == 3
    assert len({c.model for c in processes.values()}) == 1
    unet, dit = find_spec("unet-vs-dit").configs().values()
    assert 0.4 < parameter_count(unet) / parameter_count(dit) < 1
    assert 1 < training_flops(unet) / training_flops(dit) < 1.6


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"calls": (4, 2)}, "calls=.* must rise"),
        ({"calls": ()}, "calls=.* must rise"),
        ({"num_samples": 50}, "num_samples=50 must be at least 100"),
        ({"match": "flop"}, "did you mean 'flops'"),
        ({"contenders": (Contender("a"),)}, "at least two"),
        ({"contenders": (Contender("a"), Contender("a"))}, "names twice: a, a"),
        ({"name": "../up"}, "letters, digits"),
    ],
)
def test_bad_specs_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        replace(small_spec(), **change)


@pytest.mark.parametrize(
    ("contender", "says"),
    [
        (Contender("a", recipe="mnits"), "contender 'a': unknown recipe 'mnits': did you mean 'mnist'"),
        (Contender("a", set=("depht=2",)), "contender 'a': unknown field 'depht'"),
        (Contender("a", recipe="emoji-32"), "contender 'a': data=folder"),
        (Contender("a", set=("num_classes=0", "label_dropout=0")), "0 classes: the judge reads"),
    ],
)
def test_contenders_that_do_not_fit_are_refused(contender, says):
    with pytest.raises(UserError, match=says):
        replace(small_spec(), contenders=(contender, Contender("b"))).configs()


def test_what_is_the_same_for_all_is_not_set():
    with pytest.raises(UserError, match="no compiling"):
        Contender("a", set=("compile=true",))
    with pytest.raises(UserError, match=r"differ by more than 10% \(narrow .*, wide .*\)"):
        replace(small_spec(), match="parameters").configs()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[", "is no JSON"),
        ("[]", "must be an object"),
        ('{"name": "a", "question": "?", "contender": []}', "unknown key 'contender'"),
        ('{"name": "a", "contenders": []}', "question is missing"),
        (
            '{"name": "a", "question": "?", "contenders": [{"name": "b", "set": "depth=1"}]}',
            r"contenders\[0\]: set must",
        ),
        ('{"name": "a", "question": "?", "contenders": [{"recipe": "mnist"}]}', r"contenders\[0\]: name=None"),
        ('{"name": "a", "question": "?", "contenders": [], "calls": [2.5]}', "calls must be a list of whole numbers"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, says):
    (tmp_path / "spec.json").write_text(text)
    with pytest.raises(UserError, match=says):
        find_spec(str(tmp_path / "spec.json"))


def test_unknown_specs_name_the_nearest(capsys):
    with pytest.raises(SystemExit) as left:
        main(["compare", "unet-vs-dits"])
    assert left.value.code == 2
    assert "did you mean 'unet-vs-dit'" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot read"):
        find_spec("missing.json")


# --- plans

SPEEDS = st.builds(Speed, st.floats(1e-3, 0.5), st.floats(1e-6, 1e-3), st.floats(1e6, 1e11), st.floats(0, 2))


@settings(max_examples=60, deadline=None)
@given(
    speeds=st.lists(SPEEDS, min_size=2, max_size=4), minutes=st.floats(2, 60), scoring=st.floats(0.01, 2),
    match=st.sampled_from(["flops", "parameters", "minutes"]),
)  # fmt: skip
def test_plans_fill_the_budget_and_keep_it(speeds, minutes, scoring, match):
    spec, named = small_spec(match=match, num_samples=1000), {str(i): speed for i, speed in enumerate(speeds)}
    try:
        plan = plan_training(spec, named, scoring, minutes, spent=10.0)
    except UserError as error:
        assert "is too short here" in str(error)  # noqa: PT017 (a plan or a refusal)
        return
    training = sum(
        60 * plan.minutes if plan.minutes is not None else plan.steps[name] * speed.step_seconds
        for name, speed in named.items()
    )
    sampling = sampling_seconds(spec, named, scoring, plan.samples)
    whole = 10.0 + training + sampling + sum(speed.run_seconds for speed in speeds)
    assert whole <= 0.93 * 60 * minutes + 1e-6
    assert whole >= 0.93 * 60 * minutes - sum(speed.step_seconds for speed in speeds) - 1e-6  # whole steps
    assert FEWEST_SAMPLES <= plan.samples <= 1000
    if match == "flops":
        flops = [plan.steps[name] * speed.step_flops for name, speed in named.items()]
        assert max(flops) - min(flops) <= max(speed.step_flops for speed in speeds)
    if match == "parameters":
        assert len(set(plan.steps.values())) == 1


def test_pictures_become_fewer_when_training_took_longer():
    spec, speeds = small_spec(num_samples=1000), {"a": Speed(0.1, 1e-2, 1e9), "b": Speed(0.1, 1e-2, 1e9)}
    counts = [samples_after_training(spec, speeds, 0.5, 5.0, spent, 1000) for spent in (0, 200, 280, 400)]
    assert counts[0] == 1000
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == FEWEST_SAMPLES
    assert 280 + sampling_seconds(spec, speeds, 0.5, counts[2]) <= 1.08 * 300


def test_speeds_are_measured(tmp_path):
    config = small_spec().configs()["narrow"]
    speed = measure_speed(config, tmp_path / "probe", 4)
    assert 0 < speed.step_seconds < 5
    assert 0 < speed.call_seconds < 0.5
    assert speed.step_flops == training_flops(config)
    assert 0 < speed.run_seconds < 10
    assert not (tmp_path / "probe").exists()


def test_calls_of_solvers_that_call_twice():
    config = small_spec().configs()["narrow"]
    pipe = Pipeline(build_model(config.model), config)
    assert network_steps(pipe, 8) == 8
    twice = replace(pipe, config=replace(config, sampling=replace(config.sampling, solver="edm_heun")))
    assert twice.plan(network_steps(twice, 8)).num_calls <= 8
    assert twice.plan(network_steps(twice, 8) + 1).num_calls > 8


def test_peak_memory_is_of_the_work_inside():
    with peak_memory() as idle:
        pass
    with peak_memory() as busy:
        block = torch.ones(2**26)
        del block
    if busy.bytes is None:
        pytest.skip("this system does not tell")
    assert idle.bytes < 2**25
    assert 0.99 * 2**28 < busy.bytes < 1.25 * 2**28  # resident pages are counted, some late


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 2000), share=st.floats(0, 1))
def test_intervals_of_shares(count, share):
    right = round(share * count)
    estimate = proportion(right, count)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.high - estimate.low > 0.75 / count  # also where all are right


# --- a comparison


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small comparison, to its end."""
    torch.set_num_threads(2)
    out = tmp_path_factory.mktemp("comparison")
    spec = small_spec(num_samples=400)
    given_plan(spec, out)
    told = []
    run_comparison(
        spec, out, minutes=1.0, yardstick=untrained_yardstick, progress=lambda text, share: told.append((text, share))
    )
    return spec, out, told


def test_everything_is_in_one_file(finished):
    spec, out, told = finished
    body = json.loads((out / "comparison.json").read_text())
    assert spec_from_json(body["spec"]) == spec
    assert [(row["name"], row["calls"]) for row in body["scores"]] == [
        (name, calls) for name in ("narrow", "wide") for calls in (2, 3)
    ]
    for row in body["scores"]:
        assert row["samples"] == 400
        assert set(row["figures"]) == {"accuracy", "fd", "kid"}
        cards = {card.metric: card for card in map(card_from_json, row["cards"])}
        assert cards["fd"].value == row["figures"]["fd"]["value"]
        assert cards["fd"].num_samples == 400
        assert (cards["kid"].drawing.network_calls, cards["kid"].drawing.run) == (row["calls"], row["name"])
        assert row["seconds_per_picture"] > 0
    assert [(row["name"], row["share"], row["step"], row["samples"]) for row in body["curves"]] == [
        (name, share, step, 100) for name in ("narrow", "wide") for share, step in ((0.25, 4), (0.5, 8), (0.75, 12))
    ]
    for contender in body["contenders"]:
        assert contender["training"]["steps"] == 16
        assert contender["images"] == 128
        assert contender["training_flops"] == 16 * 3 * 8 * contender["forward_flops"]
        assert contender["losses"][-1][0] == 16
    assert all(0 <= share <= 1 for _, share in told)
    assert "training wide (2 of 2): step 16" in [text for text, _ in told]
    # A run of a comparison is a run like any other.
    assert read_config(out / "runs" / "wide").sampling.num_inference_steps == 20


def test_pictures_do_not_depend_on_the_contender_s_place(finished):
    """Labels and seeds are the same for all."""
    _, out, _ = finished
    grids = {row["name"]: row["grid"] for row in read_rows(out / "rows.jsonl") if row.get("calls") == 3}
    pipe = load(out / "runs" / "wide")
    again = pipe(torch.arange(400) % 10, num_inference_steps=3, batch_size=100).tensor
    assert grid_png(again) == grids["wide"] != grids["narrow"]


def test_what_is_done_is_not_done_again(finished, tmp_path):
    spec, out, _ = finished
    rows = (out / "rows.jsonl").read_text()
    run_comparison(spec, out, minutes=1.0, yardstick=untrained_yardstick)
    assert (out / "rows.jsonl").read_text() == rows


def test_another_comparison_in_the_same_place_is_refused(finished, tmp_path):
    spec, out, _ = finished
    with pytest.raises(UserError, match="holds another comparison \\(small\\)"):
        run_comparison(replace(spec, calls=(2,)), out, minutes=1.0, yardstick=untrained_yardstick)
    with pytest.raises(UserError, match="was planned for --minutes 1"):
        run_comparison(spec, out, minutes=2.0, yardstick=untrained_yardstick)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match="holds runs but no comparison"):
        run_comparison(spec, tmp_path, minutes=1.0, yardstick=untrained_yardstick)
    with pytest.raises(UserError, match="must be above 0"):
        run_comparison(spec, tmp_path, minutes=0.0)


def test_a_contender_that_diverges_is_left_out(tmp_path):
    wild = Contender("wild", set=(*SMALL, "optimizer=adamw", "optimizer.learning_rate=1e30", "warmup_steps=0"))
    spec = replace(small_spec(calls=(2,)), contenders=(small_spec().contenders[0], wild))
    given_plan(spec, tmp_path, steps=8)
    run_comparison(spec, tmp_path, minutes=1.0, yardstick=untrained_yardstick)
    body = json.loads((tmp_path / "comparison.json").read_text())
    assert "step" in body["contenders"][1]["training"]["diverged"]
    assert {row["name"] for row in body["scores"]} == {"narrow"}


def test_a_contender_of_learned_tokens_gets_its_tokenizer_first(tmp_path):
    tokens = Contender("tokens", recipe="mnist-tokens", set=SMALL, tokenizer_share=0.03)
    spec = replace(small_spec(calls=(2,)), contenders=(small_spec().contenders[0], tokens))
    given_plan(spec, tmp_path, steps=4)
    run_comparison(spec, tmp_path, minutes=1.0, yardstick=untrained_yardstick)
    body = json.loads((tmp_path / "comparison.json").read_text())
    row = body["contenders"][1]["tokenizer"]
    assert body["contenders"][0]["tokenizer"] is None
    assert 1.5 < row["seconds"] < 30
    assert row["codes_used"] > 0
    kinds = [line["kind"] for line in read_rows(tmp_path / "rows.jsonl")]
    assert kinds.index("tokenizer") < kinds.index("training")
    assert "The tokenizer of tokens was trained first" in render(body)
    rows = (tmp_path / "rows.jsonl").read_text()
    run_comparison(spec, tmp_path, minutes=1.0, yardstick=untrained_yardstick)
    assert (tmp_path / "rows.jsonl").read_text() == rows


@pytest.mark.parametrize(
    ("recipe", "share", "says"),
    [
        ("mnist-tokens", 0.0, "tokenizer_share=0 with autoencoder=tokenizer"),
        ("mnist-masked", 0.1, "tokenizer_share=0.1 with autoencoder=pixel_levels"),
        ("mnist-tokens", 0.9, r"must lie in 0 \.\. 0\.5"),
    ],
)
def test_tokenizers_get_time_where_there_is_one_to_train(recipe, share, says):
    with pytest.raises(UserError, match=says):
        Contender("a", recipe=recipe, tokenizer_share=share).config()


PROGRAM = """
import sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(2)
from pathlib import Path
from small_comparisons import small_spec
from test_comparison import untrained_yardstick
from smalti.comparison.pictures import grid_png
from smalti.comparison.report import render
from smalti.comparison.run import run_comparison
run_comparison(small_spec(), Path({out!r}), minutes=1.0, yardstick=untrained_yardstick,
               progress=lambda text, share: print(text, flush=True))
"""


def test_going_on_after_kills(tmp_path):
    """A process that is killed in the middle of a training, then one in the middle of the scores: the third ends it,
    and nothing that a row says is done is done again."""
    spec = small_spec()
    given_plan(spec, tmp_path, steps=48)
    program = PROGRAM.format(path=[str(Path(__file__).parent)], out=str(tmp_path))
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}

    def run_until(text: str | None) -> list[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
        )  # fmt: skip
        seen = []
        assert process.stdout is not None
        for line in process.stdout:
            seen.append(line.strip())
            if text is not None and line.startswith(text):
                os.kill(process.pid, signal.SIGKILL)
                break
        process.stdout.close()
        assert process.wait(60) == (0 if text is None else -signal.SIGKILL)
        return seen

    run_until("training wide (2 of 2): step 30")
    deadline = time.monotonic() + 10
    while not list((tmp_path / "runs" / "wide" / "checkpoints").glob("step_*")):
        assert time.monotonic() < deadline
    kept = read_rows(tmp_path / "rows.jsonl")
    assert [row["name"] for row in kept if row["kind"] == "training"] == ["narrow"]
    seen = run_until("sampling wide at 2 calls")
    trained = [int(line.rsplit(" ", 1)[1]) for line in seen if line.startswith("training")]
    assert not any("training narrow" in line for line in seen)
    assert trained[0] > 1  # from a checkpoint, not from the beginning
    assert trained[-1] == 48
    kept = (tmp_path / "rows.jsonl").read_text()
    seen = run_until(None)
    assert not any(line.startswith(("training", "measuring the speed of", "sampling narrow at")) for line in seen[4:])
    assert (tmp_path / "rows.jsonl").read_text().startswith(kept)
    body = json.loads((tmp_path / "comparison.json").read_text())
    assert len(body["scores"]) == 4
    assert [c["training"]["steps"] for c in body["contenders"]] == [48, 48]
    assert [c["training"]["resumed"] for c in body["contenders"]] == [False, True]
