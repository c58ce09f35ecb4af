"""Masked models in the engine: batched with others of their kind, from checkpoints, edited, to the same bytes."""

import io

import pytest
import torch
from PIL import Image
from server.drawing_engine import DrawingEngine

from smalti.pipeline import load
from smalti.serving.checkpoint_slots import CheckpointSlots, anonymous_memory
from smalti.serving.messages import Draw, Failed, Finished, PictureOrder, Preview


@pytest.fixture(scope="module")
def drawing(masked_run):
    torch.set_num_threads(1)
    return DrawingEngine(masked_run, allow_faults=True, max_rows=8, checkpoint_every=2)


def file(picture):
    written = io.BytesIO()
    picture.save(written, "png")
    return written.getvalue()


ORDERS = [
    PictureOrder(seed=0, class_label=1, num_inference_steps=3, guidance_scale=1.0),
    PictureOrder(seed=1, class_label=4, num_inference_steps=7, guidance_scale=3.0, partial_images=2),
    PictureOrder(seed=2, class_label=4, num_inference_steps=5, solver_options={"choice_temperature": 6.0}),
    PictureOrder(
        seed=3, class_label=9, num_inference_steps=4, source=file(Image.new("L", (28, 28), 200)),
        mask=file(Image.new("L", (28, 28), 255)),
    ),
]  # fmt: skip


def test_pictures_are_those_drawn_alone(drawing):
    alone = [drawing.draw(order)[0] for order in ORDERS]
    assert all(isinstance(end, Finished) for end in alone)
    together = drawing.draw(*ORDERS[::-1])[::-1]
    assert [end.image for end in together] == [end.image for end in alone]


def test_a_served_picture_is_the_pipelines(drawing, masked_run):
    (end,) = drawing.draw(ORDERS[0])
    expected = load(masked_run)([1], seed=0, num_inference_steps=3, guidance_scale=1.0, batch_size=1).images[0]
    served = Image.open(io.BytesIO(end.image)).convert("L")
    unequal = sum(a != b for a, b in zip(served.tobytes(), expected.convert("L").tobytes(), strict=True))
    assert unequal < 8  # the engine's products are done in pieces of 8 rows, and round otherwise


def test_a_picture_goes_on_from_its_checkpoint(drawing):
    order = PictureOrder(seed=11, class_label=5, num_inference_steps=9)
    (whole,) = drawing.draw(order)
    slots = CheckpointSlots(anonymous_memory(CheckpointSlots.size_of(1, 100_000)), 1, 100_000)
    drawing.engine.slots = slots
    drawing.engine.draw(Draw(0, order, 0))
    drawing.run(ticks=5)
    drawing.engine.cancel(0)
    drawing.told.clear()
    drawing.engine.slots = None
    (again,) = drawing.draw(order, resume=slots.read(0, 0))
    assert again.resumed_from == 4
    assert again.image == whole.image


def test_previews_are_whole_pictures(drawing):
    drawing.engine.draw(Draw(0, ORDERS[1], 0))
    drawing.run()
    previews = [event for event in drawing.events(0) if isinstance(event, Preview)]
    assert len(previews) == 2
    assert Image.open(io.BytesIO(previews[0].image)).size == (28, 28)
    drawing.told.clear()


def test_logits_that_are_not_finite_end_their_picture_alone(drawing):
    bad = PictureOrder(seed=5, class_label=1, num_inference_steps=6, fault="nan")
    (good,) = drawing.draw(ORDERS[0])
    ends = drawing.draw(bad, ORDERS[0])
    assert isinstance(ends[0], Failed)
    assert ends[1].image == good.image


def test_a_solver_for_noise_is_refused(drawing):
    (end,) = drawing.draw(PictureOrder(class_label=1, solver="ddim"))
    assert isinstance(end, Failed)
    assert (end.code, end.param) == ("invalid_request", "solver")


def test_the_card_names_the_one_solver(drawing):
    assert drawing.engine.card.solvers == ("masked",)
    assert drawing.engine.card.image_size == (28, 28)
    assert drawing.engine.card.channels == 1
