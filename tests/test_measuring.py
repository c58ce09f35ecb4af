"""`smalti eval` makes cards of any run with pictures, and `smalti compare-cards` compares them."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from training_runs import tiny_config

from smalti.cli import main
from smalti.data.digits import load_digits
from smalti.data.rows import PicturesInMemory
from smalti.errors import UserError
from smalti.evaluation.cards import read_cards
from smalti.evaluation.features import pixel_features
from smalti.evaluation.judge import Judge
from smalti.evaluation.measuring import MEASURED, DataRows, Measuring, measure, nearest_picture


def called(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    out, error = capsys.readouterr()
    return exit_.value.code, out, error


@pytest.fixture(scope="module")
def few():
    training, held_out = load_digits()
    part = lambda rows, n: PicturesInMemory(rows.images[:n], rows.class_labels[:n])  # noqa: E731
    return DataRows(part(training, 400), part(held_out, 120), "a few digits")


@pytest.fixture
def digits_run(trained_run, tmp_path, few, monkeypatch):
    """A copy of the trained run, a judge of random weights, and few rows to compare with."""
    torch.manual_seed(0)
    judge = Judge().eval()
    monkeypatch.setattr("smalti.evaluation.digits.load_judge", lambda progress: judge)
    monkeypatch.setattr("smalti.evaluation.digits.load_digits", lambda: (few.training, few.held_out))
    return shutil.copytree(trained_run, tmp_path / "run")


def test_eval_writes_the_cards_of_what_it_prints_and_draws_the_nearest_rows(digits_run, tmp_path, capsys):
    code, said, error = called(capsys, "eval", digits_run, "--num-images", 100, "--seed", 3, "--reference", "held-out")
    assert code == 0, error
    cards = read_cards(digits_run / "evaluation.json")
    assert [card.metric for card in cards] == [*MEASURED, "memorisation"]
    assert all(card.text() in said for card in cards)
    assert "judge accuracy" in said
    body = json.loads((digits_run / "evaluation.json").read_text())
    assert cards[0].value == pytest.approx(body["frechet"]["value"], rel=1e-6)
    drawing = cards[0].drawing
    assert (drawing.network_calls, drawing.guidance_scale, drawing.seed) == (4, 2.0, 3)
    assert len(drawing.weights) == 64
    assert cards[0].reference.rows == 120
    with Image.open(digits_run / "nearest.png") as picture:
        assert picture.size == (2 * (16 * 30 + 2), 2 * (3 * 30 + 2))

    other = tmp_path / "other.json"
    shutil.copy(digits_run / "evaluation.json", other)
    code, said, error = called(capsys, "compare-cards", digits_run, other)
    assert code == 0, error
    assert "fd: not told apart" in said
    changed = json.loads(other.read_text())
    changed["cards"][0]["extractor"]["fingerprint"] = "00"
    other.write_text(json.dumps(changed))
    code, _, error = called(capsys, "compare-cards", digits_run, other)
    assert (code, error.count("\n")) == (2, 1)
    assert "they differ in extractor" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--features", "dinov2", "--weights", "./nowhere"], "features=dinov2: './nowhere' is not to be had"),
        (["--features", "clip", "--weights", "./nowhere"], "features=clip: weights='./nowhere': there is no such"),
        (["--features", "inception", "--weights", "./nowhere.pth"], "'./nowhere.pth': there is no such file"),
        (["--weights", "x"], "weights='x' has no effect with features=judge"),
        (["--reference", "held-out", "--metrics", "fd", "--features", "pixels"], "785 are needed"),
    ],
)
def test_mistakes_are_one_clear_line(digits_run, capsys, arguments, says):
    code, _, error = called(capsys, "eval", digits_run, "--num-images", 100, *arguments)
    assert (code, error.count("\n")) == (2, 1)
    assert says in error


def test_cards_of_a_folder_with_and_without_classes(tmp_path, capsys, monkeypatch):
    """Pictures of one's own, of another size than digits, in colour."""
    from smalti.training.display import PlainDisplay
    from smalti.training.loop import train

    monkeypatch.setenv("SMALTI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("smalti.evaluation.judge._FEWEST_STEPS", 8)
    generator = torch.Generator().manual_seed(0)
    for name in ("dark", "light"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(70):
            pixels = torch.randint(0, 100, (16, 16, 3), generator=generator) + (150 if name == "light" else 0)
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / "data" / name / f"{i}.png")
    common = ["data=folder", f"data.path={tmp_path / 'data'}", "data.held_out=0.4", "model.in_channels=3",
              "model.image_size=16,16", "patch_size=4"]  # fmt: skip
    for classes in (2, 0):
        run = tmp_path / f"run{classes}"
        try:
            config = tiny_config(3, *common, f"num_classes={classes}")
        except UserError as error:
            pytest.fail(str(error))
        train(config, run, display=PlainDisplay(1e9))
        code, said, error = called(capsys, "eval", run, "--num-images", 60)
        if classes:
            assert code == 0, error
            assert "judge accuracy" in said
            assert "left out: metric 'fd' of 60 samples: at least 100" in said
            assert {card.extractor.name for card in read_cards(run / "evaluation.json")} == {"judge", "pixels"}
        else:
            assert code == 2
            assert "has no classes for a judge to learn; take inception" in error
            code, said, error = called(capsys, "eval", run, "--num-images", 60, "--features", "pixels")
            assert code == 0, error
        cards = read_cards(run / "evaluation.json")
        assert "kid" in {card.metric for card in cards}
        assert {card.drawing.guidance_scale for card in cards} == {1.5 if classes else 1.0}  # 1: nothing to guide by
        with Image.open(run / "nearest.png") as picture:
            assert picture.width == 2 * (16 * 18 + 2)


def test_what_is_asked_for_is_measured_or_refused_and_the_rest_left_out_with_a_note(few):
    network = pixel_features(few.training.shape)
    samples = few.training.read(torch.arange(60))
    everything = measure(samples, network, few, Measuring("pixels"), replicates=20)
    assert everything.cards[0].reference.rows == 400  # training rows, since fewer than 500 are held out
    assert [card.metric for card in everything.cards] == [m for m in MEASURED if m != "fd"]
    assert "'fd' of 60 samples: at least 785" in everything.notes[0]
    assert "'kid'" in everything.notes[0]
    with pytest.raises(UserError, match="singular below 785 rows"):
        measure(samples, network, few, Measuring("pixels", metrics=("fd",)))
    asked = measure(samples, network, few, Measuring("pixels", metrics=("kid",), reference="held-out"), replicates=20)
    assert [(card.metric, card.reference.rows) for card in asked.cards] == [("kid", 120)]
    assert "held-out" in asked.cards[0].reference.name
    assert nearest_picture(samples, few.training, asked) is None
    nothing_held_out = replace(few, held_out=PicturesInMemory(few.held_out.images[:0]))
    left = measure(samples, network, nothing_held_out, Measuring("pixels"), replicates=20)
    assert "memorisation" not in {card.metric for card in left.cards}
    with pytest.raises(UserError, match="did you mean 'recall'"):
        Measuring(metrics=("recal",))


def test_copies_are_found_and_shown_above_the_rows_that_they_copy(few):
    samples = torch.cat([few.held_out.read(torch.arange(50)), few.training.read(torch.tensor([7, 30]))])
    found = measure(samples, pixel_features((1, 28, 28)), few, Measuring("pixels", metrics=("memorisation",)))
    assert set(found.in_pixels.worst[:2].tolist()) == {50, 51}
    picture = nearest_picture(samples, few.training, found)
    top, below = (picture.crop((4, y, 60, y + 56)).tobytes() for y in (4, 64))
    assert top == below
