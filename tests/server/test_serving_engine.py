"""The engine: batching does not change pictures, faults stay with their own, and a checkpoint goes on where it was."""

import io

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from server.drawing_engine import DrawingEngine

from smalti.images import to_pil
from smalti.serving.checkpoint_slots import CheckpointSlots, anonymous_memory
from smalti.serving.exact_batching import FixedHeightLinear, shares_exactly
from smalti.serving.messages import Admitted, Draw, Failed, Finished, PictureOrder, Preview


@pytest.fixture(scope="module")
def drawing(trained_run):
    return DrawingEngine(trained_run, allow_faults=True, max_rows=8, checkpoint_every=2)


def picture_file(size=(28, 28), shade=200):
    file = io.BytesIO()
    Image.new("L", size, shade).save(file, "png")
    return file.getvalue()


orders = st.builds(
    PictureOrder,
    seed=st.integers(0, 2**63 - 1),
    class_label=st.integers(0, 9),
    num_inference_steps=st.integers(2, 9),
    guidance_scale=st.sampled_from([0.0, 1.0, 1.5, 4.0]),
    solver=st.sampled_from(["ddim", "dpmpp_2m", "dpmpp_sde_2m", "unipc_2", "flow_heun", "flow_rk4"]),
    tenant=st.sampled_from(["a", "b", "c"]),
    source=st.sampled_from([None, None, picture_file()]),
    output_format=st.sampled_from(["png", "jpeg", "webp"]),
).map(lambda order: order if order.source is None else _edited(order))


def _edited(order):
    import msgspec

    return msgspec.structs.replace(order, strength=0.5, mask=picture_file(shade=255) if order.seed % 2 else None)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=[Phase.generate])
@given(st.lists(orders, min_size=2, max_size=7))
def test_batching_does_not_change_pictures(drawing, mix):
    alone = [drawing.draw(order)[0] for order in mix]
    together = drawing.draw(*mix)
    assert [end.image for end in together] == [end.image for end in alone]


def test_a_picture_is_the_pipelines(drawing, trained_pipeline):
    """Up to rounding: the pipeline's products are not made in pieces."""
    torch.set_num_threads(1)
    order = PictureOrder(seed=7, class_label=3, num_inference_steps=6, guidance_scale=2.0)
    (end,) = drawing.draw(order)
    output = trained_pipeline([3], seed=7, num_inference_steps=6, guidance_scale=2.0)
    ours = np.asarray(Image.open(io.BytesIO(end.image))).astype(int)
    assert np.abs(ours - np.asarray(to_pil(output.tensor)[0]).astype(int)).max() <= 1
    assert (end.width, end.height, end.calls, end.resumed_from) == (28, 28, 6, 0)


def test_forwards_are_shared(drawing):
    mix = [PictureOrder(seed=i, class_label=1, num_inference_steps=9 + i, guidance_scale=1.5) for i in range(4)]
    for number, order in enumerate(mix):
        drawing.engine.draw(Draw(number, order, 0))
    rows = []
    while not drawing.engine.idle:
        rows.append(drawing.engine.tick().rows)
    assert rows == [8] * 9 + [6, 4, 2]
    drawing.told.clear()


def test_events_come_in_order(drawing):
    drawing.engine.draw(Draw(5, PictureOrder(class_label=1, num_inference_steps=9, partial_images=2), 0))
    drawing.run()
    admitted, first, second, end = drawing.events(5)
    assert isinstance(admitted, Admitted)
    assert admitted.calls == 9
    assert [(p.index, p.call) for p in (first, second)] == [(0, 3), (1, 6)]
    assert all(isinstance(p, Preview) and Image.open(io.BytesIO(p.image)).size == (28, 28) for p in (first, second))
    assert isinstance(end, Finished)
    drawing.told.clear()


@pytest.mark.parametrize(
    ("fault", "code"), [("nan", "not_finite"), ("error", "internal_error"), ("out_of_memory", "out_of_memory")]
)
def test_a_fault_fails_its_picture_alone(drawing, fault, code):
    good = [PictureOrder(seed=i, class_label=i, num_inference_steps=6) for i in range(3)]
    alone = [drawing.draw(order)[0].image for order in good]
    ends = drawing.draw(good[0], PictureOrder(class_label=4, num_inference_steps=6, fault=fault), *good[1:])
    assert [end.image for end in ends if isinstance(end, Finished)] == alone
    assert [end.code for end in ends if isinstance(end, Failed)] == [code]


def test_out_of_memory_halves_later_forwards(trained_run):
    drawing = DrawingEngine(trained_run, allow_faults=True, max_rows=8)
    orders = [PictureOrder(class_label=1, num_inference_steps=4, guidance_scale=1.0) for _ in range(7)]
    drawing.draw(*orders, PictureOrder(class_label=1, num_inference_steps=4, fault="out_of_memory", guidance_scale=1.0))
    for number, order in enumerate(orders):
        drawing.engine.draw(Draw(number, order, 0))
    assert drawing.engine.tick().rows == 1  # what was last found to suffice


def test_memory_that_was_short_is_tried_again_later(trained_run, monkeypatch):
    monkeypatch.setattr("smalti.serving.engine._MEMORY_STAYS_SHORT", 5)
    drawing = DrawingEngine(trained_run, allow_faults=True, max_rows=8)
    orders = [PictureOrder(class_label=1, num_inference_steps=9, guidance_scale=1.0) for _ in range(4)]
    for number, order in enumerate([*orders, msgspec.structs.replace(orders[0], fault="out_of_memory")]):
        drawing.engine.draw(Draw(number, order, 0))
    rows = [drawing.engine.tick().rows for _ in range(12)]
    # The fault is of the fifth call; the four short ticks end the oldest picture.
    assert rows == [5] * 5 + [1] * 4 + [3] * 3


def test_a_checkpoint_goes_on_where_it_was(drawing):
    order = PictureOrder(seed=3, class_label=5, num_inference_steps=9, solver="dpmpp_sde_2m", partial_images=2)
    (whole,) = drawing.draw(order)
    slots = CheckpointSlots(anonymous_memory(CheckpointSlots.size_of(2, 100_000)), 2, 100_000)
    drawing.engine.slots = slots
    drawing.engine.draw(Draw(9, order, 1))
    drawing.run(ticks=5)
    drawing.engine.cancel(9)
    drawing.told.clear()
    drawing.engine.slots = None
    state = slots.read(1, 9)
    assert state is not None
    assert slots.read(0, 9) is None
    assert slots.read(1, 8) is None
    drawing.engine.draw(Draw(10, order, 0, state))
    drawing.run()
    events = drawing.events(10)
    assert events[-1].image == whole.image
    assert events[-1].resumed_from == 4
    assert [e.index for e in events if isinstance(e, Preview)] == [1]
    drawing.told.clear()
    slots.close()


def test_a_torn_checkpoint_leaves_the_one_before():
    slots = CheckpointSlots(anonymous_memory(CheckpointSlots.size_of(1, 50)), 1, 50)
    assert slots.write(0, 1, b"first")
    assert slots.write(0, 1, b"second")
    assert slots.read(0, 1) == b"second"
    place = slots._memory.find(b"second")
    slots._memory[place] = 0
    assert slots.read(0, 1) == b"first"
    assert not slots.write(0, 1, bytes(51))
    assert slots.read(0, 1) == b"first"
    slots.close()


@pytest.mark.parametrize(
    ("order", "names"),
    [
        (PictureOrder(class_label=10), "class_labels"),
        (PictureOrder(), "class_labels"),
        (PictureOrder(class_label=1, prompt="seven"), "prompts"),
        (PictureOrder(class_label=1, solver="dpmpp_2n"), "dpmpp_2m"),
        (PictureOrder(class_label=1, num_inference_steps=0), "num_inference_steps"),
        (PictureOrder(class_label=1, num_inference_steps=10**6), "num_inference_steps"),
        (PictureOrder(class_label=1, guidance_scale=float("nan")), "guidance_scale"),
        (PictureOrder(class_label=1, seed=-1), "seed"),
        (PictureOrder(class_label=1, mask=b"x"), "source"),
        (PictureOrder(class_label=1, source=b"no picture", strength=0.5), "source"),
        (PictureOrder(class_label=1, source=picture_file((30, 28)), strength=0.5), "30x28"),
        (PictureOrder(class_label=1, source=picture_file(), strength=0.0), "strength"),
        (PictureOrder(class_label=1, solver_options={"no_such": 1}), "no_such"),
        (PictureOrder(class_label=1, weight=0.0), "weight"),
    ],
)
def test_unsound_orders_are_refused_by_name(drawing, order, names):
    (end,) = drawing.draw(order)
    assert end.code == "invalid_request"
    assert names in end.message


def test_faults_are_refused_unless_allowed(trained_run):
    (end,) = DrawingEngine(trained_run).draw(PictureOrder(class_label=1, fault="abort"))
    assert end.code == "invalid_request"


def test_a_damaged_checkpoint_is_refused(drawing):
    (end,) = drawing.draw(PictureOrder(class_label=1, num_inference_steps=4), resume=b"nonsense")
    assert (end.code, end.message.split(":")[0]) == ("invalid_request", "resume")


def test_deadlines_and_cancels_end_pictures(trained_run):
    now = [0.0]
    drawing = DrawingEngine(trained_run)
    drawing.engine.clock = lambda: now[0]
    drawing.engine.draw(Draw(1, PictureOrder(class_label=1, deadline_seconds=5.0), 0))
    drawing.engine.draw(Draw(2, PictureOrder(class_label=1), 0))
    drawing.engine.tick()
    drawing.engine.cancel(2)
    drawing.engine.cancel(77)
    now[0] = 6.0
    drawing.engine.tick()
    assert drawing.engine.idle
    assert [drawing.events(n)[-1].code for n in (1, 2)] == ["deadline_exceeded", "cancelled"]
    assert "1 of 4 network calls" in drawing.events(1)[-1].message


def test_rows_that_share_inexactly_are_seen():
    """Plain layers take another kernel for one row than for many on most machines; a sum over rows always differs."""
    x, t = torch.randn(6, 64), torch.zeros(6)
    assert not shares_exactly(lambda x, t, cond: x + x.sum(), x, t, None, (2, 4))
    layer = FixedHeightLinear(64, 64)
    assert shares_exactly(lambda x, t, cond: layer(x), x, t, None, (2, 3, 5, 6))


def test_an_inexact_network_shares_no_forward(trained_run, monkeypatch):
    monkeypatch.setattr("smalti.serving.loading.shares_exactly", lambda *arguments, **sizes: False)
    drawing = DrawingEngine(trained_run)
    sizes = []
    network = drawing.engine.network
    drawing.engine.network = lambda x, t, cond: sizes.append(len(x)) or network(x, t, cond)
    drawing.draw(*[PictureOrder(class_label=1, num_inference_steps=3, guidance_scale=2.0)] * 2)
    assert sizes == [2] * 6
