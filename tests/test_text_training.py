"""From a folder of captioned pictures to prompted samples, with the real commands."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from shape_pictures import write_shapes
from test_cli import called
from training_runs import final_bytes

import smalti
from smalti.config import RunConfig, apply_overrides, from_json, to_json
from smalti.errors import UserError
from smalti.recipes import recipe, recipe_names

SMALL = [
    "model.image_size=16,16", "model.width=48", "model.depth=2", "model.num_heads=2", "text.width=32",
    "text.depth=1", "text.num_heads=2", "text.vocab_size=300", "text.max_tokens=12", "model.text_width=32",
    "model.pooled_width=32", "batch_size=16", "log_every=5", "checkpoint_every=10", "validate_every=20",
    "preview_every=1000", "sampling.num_inference_steps=4", "warmup_steps=2", "compile=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes")


def settings(pictures):
    return [f"data.path={pictures}", *SMALL]


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    from dataclasses import replace

    from smalti.config import Budget
    from smalti.training.display import PlainDisplay
    from smalti.training.loop import train

    torch.set_num_threads(2)
    out = tmp_path_factory.mktemp("runs") / "shapes"
    config = replace(apply_overrides(recipe("emoji-32"), settings(pictures)), budget=Budget("steps", 400))
    train(config, out, display=PlainDisplay(1e9))
    return out


def test_captions_condition_masked_tokens(pictures, tmp_path):
    """An MM-DiT with its own text encoder, of pixels as tokens of 64 colours."""
    from dataclasses import replace

    from smalti.config import Budget
    from smalti.training.display import SilentDisplay
    from smalti.training.loop import train

    tokens = [
        "autoencoder=pixel_levels", "autoencoder.levels=4", "autoencoder.channels=3", "process=masked_arccos",
        "objective.prediction_type=tokens", "sampling.solver=masked", "timesteps=uniform", "model.in_channels=8",
    ]  # fmt: skip
    config = apply_overrides(recipe("emoji-32"), [*settings(pictures), *tokens])
    train(replace(config, budget=Budget("steps", 20)), tmp_path / "run", display=SilentDisplay())
    pipe = smalti.load(tmp_path / "run")
    drawn = pipe(prompts=["a red circle", "a blue square"], num_inference_steps=3, guidance_scale=2.0).tensor
    assert drawn.shape == (2, 3, 16, 16)
    assert not torch.equal(drawn[0], drawn[1])


def mean_colour(pictures):
    """Of the pixels that are not near white: [batch, 3]."""
    ink = (pictures.amin(1, keepdim=True) < 0.3).float()
    return (pictures * ink).sum((2, 3)) / ink.sum((2, 3)).clamp_min(1)


def test_pictures_follow_their_prompts(run):
    pipe = smalti.load(run)
    prompts = ["a red square", "a green square", "a blue square"]
    output = pipe(prompts=prompts * 8, guidance_scale=3.0, num_inference_steps=8)
    assert output.prompts == tuple(prompts * 8)
    strongest = mean_colour(output.tensor).argmax(1)
    assert (strongest == torch.arange(3).repeat(8)).float().mean() > 0.8


def test_the_validation_loss_can_be_taken_again(run):
    from smalti.interop.load import load_backbone
    from smalti.training.validation import validation_of_run

    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row["validation_loss"] for row in logged if "validation_loss" in row][-1]
    assert validation_of_run(run)(load_backbone(run)) == pytest.approx(last, rel=1e-6)


def test_a_picture_depends_on_its_own_prompt_and_seed_alone(run):
    pipe = smalti.load(run)
    prompts = ["a red circle", "a yellow bar, an unseen word", "", "a blue square"]
    together = pipe(prompts=prompts, seed=3).tensor
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(pipe(prompts=prompt, seed=[3 + i]).tensor[0], together[i], atol=1e-4, rtol=0)
    assert not torch.equal(together, pipe(prompts=prompts, seed=3, negative_prompt="a red circle").tensor)
    mixed = pipe.mixed([smalti.pipeline.ImageRequest(prompt=p, seed=3 + i) for i, p in enumerate(prompts)]).tensor
    torch.testing.assert_close(mixed, together, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "prompts is missing"),
        ({"class_labels": [1], "prompts": "a"}, "class_labels has no effect"),
        ({"prompts": ["a", "b"], "num_images": 3}, "num_images=3 contradicts"),
        ({"prompts": []}, "one or more texts"),
        ({"prompts": "a", "negative_class_labels": [1]}, "negative_class_labels has no effect"),
        ({"prompts": ["a"] * 4, "negative_prompt": ["b"] * 3}, "3 entries for 4"),
    ],
)
def test_bad_prompts_are_refused(run, arguments, says):
    with pytest.raises(UserError, match=says):
        smalti.load(run)(**arguments)


def test_prompts_have_no_effect_on_a_network_of_labels(trained_pipeline):
    with pytest.raises(UserError, match="reads no text"):
        trained_pipeline(prompts="a three")
    with pytest.raises(UserError, match="reads no text"):
        trained_pipeline([3], negative_prompt="a four")


def test_sample_command_takes_prompts(run, tmp_path, capsys):
    out = tmp_path / "samples"
    code, _, error = called(
        capsys, "sample", run, "--prompts", "a red circle", "a blue bar", "--num-images-per-prompt", 3,
        "--negative-prompt", "green", "--out", out,
    )  # fmt: skip
    assert code == 0, error
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a red circle"] * 3 + ["a blue bar"] * 3
    assert rows[0]["negative_prompt"] == "green"
    code, _, error = called(capsys, "sample", run, "--out", out)
    assert (code, error.count("\n")) == (2, 1)
    assert "prompts is missing" in error


def test_a_killed_text_run_ends_as_the_uninterrupted_one(pictures, tmp_path):
    """Weights of network and text encoder, average, optimiser and metrics, byte for byte; the tokenizer is kept."""
    command = [sys.executable, "-m", "smalti", "train", "emoji-32", "--steps", "40", "--resume", "--threads", "1"]
    ends = ["--set", *settings(pictures)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, "--out", str(whole), *ends], check=True, capture_output=True, timeout=300)
    process = subprocess.Popen([*command, "--out", str(killed), *ends], stdout=subprocess.DEVNULL)
    while len(list(killed.glob("checkpoints/step_*/state.json"))) < 1 and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run([*command, "--out", str(killed), *ends], check=True, capture_output=True, timeout=300)
    assert final_bytes(killed) == final_bytes(whole)
    assert (killed / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()


def test_doctor_says_what_it_found(pictures, capsys, tmp_path):
    code, said, error = called(capsys, "doctor", "emoji-32", "--set", *settings(pictures))
    assert code == 0, error
    for words in ("pictures:", "captions:", "null condition:", "values:", "a step:", "verdict: ready"):
        assert words in said
    broken = write_shapes(tmp_path / "broken", each=2)
    (broken / "red-bar-0.png").write_bytes(b"no picture")
    code, said, _ = called(capsys, "doctor", "emoji-32", "--set", *settings(broken), "captions.dropout=0")
    assert code == 1
    assert "1 skipped" in said
    assert "do not start yet: null condition" in said


def spoiled(folder, what):
    """A folder of shapes with something wrong in it."""
    write_shapes(folder, each=1)
    rows = (folder / "metadata.jsonl").read_text().splitlines()
    if what == "nothing":
        for file in folder.iterdir():
            file.unlink()
    elif what == "no captions":
        (folder / "metadata.jsonl").unlink()
    elif what == "missing":
        (folder / "metadata.jsonl").write_text("\n".join([*rows, '{"file_name": "gone.png", "text": "gone"}']))
    elif what == "1 pixel":
        for file in folder.glob("*.png"):
            Image.new("RGB", (1, 1)).save(file)
    elif what == "100 megapixels":
        for file in folder.glob("*.png"):
            Image.new("1", (12_000, 10_000)).save(file)
    return folder


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("nothing", "pictures"),
        ("no captions", "no captions"),
        ("missing", "gone.png"),
        ("1 pixel", "none of"),
        ("100 megapixels", "none of"),
        ("nowhere", "nowhere"),
    ],
)
def test_data_that_cannot_be_trained_on_is_one_line_before_any_training(what, says, tmp_path, capsys):
    folder = tmp_path / "nowhere" if what == "nowhere" else spoiled(tmp_path / "pictures", what)
    code, _, error = called(
        capsys, "train", "emoji-32", "--steps", 2, "--out", tmp_path / "run", "--set", *settings(folder)
    )
    assert (code, error.count("\n")) == (2, 1), error
    assert says in error
    assert not (tmp_path / "run").exists()


def test_an_encoder_that_is_not_to_be_had_offline_is_one_line(pictures, tmp_path, capsys):
    small = [s for s in settings(pictures) if not s.startswith("text.")]
    code, _, error = called(
        capsys, "train", "emoji-32", "--steps", 2, "--out", tmp_path / "run", "--set", *small, "text=t5",
        "text.t5=nobody/no-encoder",
    )  # fmt: skip
    assert (code, error.count("\n")) == (2, 1), error
    assert "nobody/no-encoder" in error
    assert "folder" in error
    assert not (tmp_path / "run").exists()


def test_a_caption_of_ten_thousand_characters_is_cut_and_counted(tmp_path, capsys):
    folder = write_shapes(tmp_path / "pictures", each=1)
    rows = (folder / "metadata.jsonl").read_text().splitlines()
    rows[0] = json.dumps({"file_name": json.loads(rows[0])["file_name"], "text": "a red circle " * 770})
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    code, said, error = called(capsys, "doctor", "emoji-32", "--set", *settings(folder))
    assert code == 0, error
    assert "lose their ends" in said
    code, _, error = called(
        capsys, "train", "emoji-32", "--steps", 1, "--out", tmp_path / "run", "--set", *settings(folder)
    )
    assert code == 0, error


def test_text_and_network_must_fit():
    mmdit = ["model=mmdit", "in_channels=1", "image_size=28,28"]
    for overrides, says in (
        (mmdit, "text=tiny"),
        (["text=tiny"], "reads no text"),
        ([*mmdit, "text=tiny"], "text_width=4096 must be text.width=192"),
    ):
        with pytest.raises(UserError, match=says):
            apply_overrides(recipe("mnist"), overrides)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_survives_json(name):
    config = recipe(name)
    assert from_json(RunConfig, json.loads(json.dumps(to_json(config)))) == config


def test_configs_of_before_there_were_sources_read():
    body = to_json(recipe("mnist")) | {"data": "digits"}
    assert from_json(RunConfig, {k: v for k, v in body.items() if k not in ("text", "captions")}) == recipe("mnist")


def test_eval_ranks_the_own_prompts_and_draws_them(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SMALTI_CACHE", str(tmp_path))
    monkeypatch.setattr("smalti.evaluation.prompts.NUM_CANDIDATES", 12)
    code, said, error = called(capsys, "eval", run, "--num-images", 24, "--guidance-scale", 3)
    assert code == 0, error
    assert "own prompt among the first 10 of 12" in said
    report = json.loads((run / "evaluation.json").read_text())
    assert report["real_top1"]["value"] > 0.5  # the judge tells shapes and colours apart
    assert report["top1"]["value"] > 2 / 12
    with Image.open(run / "prompts.png") as picture:
        assert picture.width > 8 * 3 * 16
    code, _, error = called(capsys, "eval", run, "--num-images", 25)
    assert (code, error.count("\n")) == (2, 1)
