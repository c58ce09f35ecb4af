"""What a pipeline call can ask for: mixed batches, editing, other processes, guidance options, and their errors."""

import numpy as np
import pytest
import torch
from needed_options import needed_options
from training_runs import tiny_config

from smalti.errors import UserError
from smalti.models import build_model
from smalti.pipeline import ImageRequest, Pipeline
from smalti.pipeline_editing import Editing
from smalti.sampling import GuidanceOptions, solver_names


@pytest.fixture(scope="module")
def pipe(trained_pipeline):
    return trained_pipeline


REQUESTS = [
    ImageRequest(3, 11, "dpmpp_2m", 6, "time", 2.0),
    ImageRequest(7, 12, "ddim", 9, None, 1.0),
    ImageRequest(0, 13, "ddpm", 5, None, 3.5),
    ImageRequest(9, 14, "unipc_2", 4, "karras", 1.5),
    ImageRequest(3, 15, "edm_heun", 4, None, 2.0, {"s_churn": 2.0, "t_start": 0.98}),
    ImageRequest(1, 16, "dpmpp_2m", 6, "time", 2.5),
    ImageRequest(2, 17, "flow_rk4", 2, None, 1.0, {"shift": 2.0}),
]


def test_members_of_a_mixed_batch_get_the_picture_they_get_alone(pipe):
    together = pipe.mixed(REQUESTS).tensor
    for request, picture in zip(REQUESTS, together, strict=True):
        alone = pipe(
            [request.class_label],
            seed=request.seed,
            solver=request.solver,
            num_inference_steps=request.num_inference_steps,
            spacing=request.spacing,
            guidance_scale=request.guidance_scale,
            **request.solver_options,
        ).tensor[0]
        assert (picture - alone).abs().max() < 1e-4, request


def test_requests_of_one_plan_share_it_and_of_two_do_not(pipe):
    grid = np.array([0.999, 0.6, 0.3, 0.0])
    other = np.array([0.999, 0.6 + 1e-10, 0.3, 0.0])  # which an array's text does not tell apart
    options = [{"times": times} for times in (grid, grid.tolist(), other, other.tolist())]
    output = pipe.mixed([ImageRequest(i, solver="ddim", solver_options=o) for i, o in enumerate(options)])
    first, same, second, again = output.plans
    assert first is same
    assert second is again
    assert second is not first


def test_a_request_needs_no_options_and_is_a_value():
    assert ImageRequest(3) == ImageRequest(3, solver_options={})
    assert len({ImageRequest(3), ImageRequest(3), ImageRequest(3, solver_options={"eta": 1.0})}) == 2


def test_a_mixed_batch_shares_its_forwards(pipe):
    calls = []
    network = pipe.backbone
    handle = network.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    try:
        output = pipe.mixed(REQUESTS)
    finally:
        handle.remove()
    assert len(calls) == max(plan.num_calls for plan in output.plans)


@pytest.mark.parametrize("solver", solver_names())
def test_every_solver_draws_from_a_pipeline(pipe, solver):
    picture = pipe([5], solver=solver, num_inference_steps=4, **needed_options(solver)).tensor
    assert torch.isfinite(picture).all()


@pytest.mark.parametrize("process", ["edm", "vp_cosine", "gvp", "vp_linear", "interpolant"])
def test_sampling_on_another_process_goes_to_the_same_picture(pipe, process):
    """The probability-flow ODE from one start ends at one picture on every process of equal log-SNR."""
    fine = {"solver": "dpmpp_2m", "num_inference_steps": 200, "spacing": "lambda", "guidance_scale": 1.0}
    trained = pipe.process
    other = pipe.on_process(process)
    t_start = 0.9
    log_snr = trained.log_snr(torch.tensor(t_start, dtype=torch.float64))
    there = float(other.process.t_of_log_snr(log_snr))
    here = pipe([5], t_start=t_start, **fine).tensor
    assert (other([5], t_start=there, **fine).tensor - here).abs().max() < 2e-2


def test_image_to_image_keeps_more_of_the_picture_at_lower_strength(pipe):
    image = pipe([4], seed=3).tensor[0]
    gaps = []
    for strength in (0.1, 0.5, 0.9):
        output = pipe([4], editing=Editing(image, strength=strength), num_inference_steps=8, guidance_scale=1.0)
        gaps.append(float((output.tensor[0] - image).abs().mean()))
    assert gaps[0] < gaps[1] < gaps[2]


def test_a_picture_of_which_nothing_would_be_left_is_refused(pipe):
    image = torch.zeros(1, 28, 28)
    with pytest.raises(UserError, match=r"strength=1\.0 leaves nothing of the image"):
        Editing(image)
    # With a mask the strength of 1 is right: what is painted owes nothing to what was there.
    mask = torch.ones(28, 28)
    painted = pipe([4], editing=Editing(image, mask=mask), num_inference_steps=4).tensor
    assert torch.equal(painted, pipe([4], num_inference_steps=4).tensor)


def test_inpainting_keeps_what_the_mask_keeps(pipe):
    image = pipe([4], seed=3).tensor[0]
    mask = torch.zeros(28, 28)
    mask[:, 14:] = 1
    output = pipe([4, 8], editing=Editing(image, mask=mask), num_inference_steps=8).tensor
    assert (output[:, :, :, :14] - image[:, :, :14]).abs().max() < 1e-5
    assert (output[:, :, :, 14:] - image[:, :, 14:]).abs().max() > 0.1


def test_guidance_options_change_the_picture_and_scale_one_does_not(pipe):
    plain = pipe([4], guidance_scale=3.0, num_inference_steps=6).tensor
    for options in (
        GuidanceOptions(interval=(0.3, 0.8)),
        GuidanceOptions(schedule="cosine"),
        GuidanceOptions(rescale=0.7),
        GuidanceOptions(apg_eta=0.0),
        GuidanceOptions(pag_scale=1.0, pag_layers=(1,)),
    ):
        assert not torch.equal(pipe([4], guidance_scale=3.0, guidance=options, num_inference_steps=6).tensor, plain)
    off = pipe([4], guidance_scale=1.0, num_inference_steps=6).tensor
    assert torch.equal(
        pipe([4], guidance_scale=1.0, guidance=GuidanceOptions(rescale=0.7), num_inference_steps=6).tensor, off
    )


def test_a_negative_label_stands_in_the_null_labels_place(pipe):
    null = pipe([4], guidance_scale=3.0, num_inference_steps=6).tensor
    same = pipe([4], guidance_scale=3.0, num_inference_steps=6, negative_class_labels=[4]).tensor
    plain = pipe([4], guidance_scale=1.0, num_inference_steps=6).tensor
    assert (same - plain).abs().max() < 1e-5  # away from itself: nowhere
    assert (null - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"solver": "dpmpp2m"}, "did you mean 'dpmpp_2m'"),
        ({"spacing": "kerras"}, "did you mean 'karras'"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"solver": "dpmpp_3m", "num_inference_steps": 2}, "at least 3"),
        ({"editing": Editing(torch.zeros(1, 28, 28), mask=torch.zeros(27, 28))}, "mask has shape"),
        ({"editing": Editing(torch.zeros(3, 28, 28), strength=0.5)}, "editing.image has shape"),
        ({"editing": Editing(torch.zeros(1, 28, 28), strength=1.5)}, "strength=1.5"),
        ({"editing": Editing(torch.full((1, 28, 28), float("nan")), strength=0.5)}, "editing.image has entries .* NaN"),
        # All of it is painted, so that no NaN of it would be in the start.
        ({"editing": Editing(torch.full((1, 28, 28), float("nan")), mask=torch.ones(28, 28))}, "editing.image has"),
        ({"editing": Editing(torch.zeros(3, 1, 28, 28), strength=0.5)}, "editing.image has shape .* for 1 pictures"),
        ({"editing": Editing(torch.zeros(28, 28), strength=0.5)}, "editing.image has shape"),
        ({"editing": Editing(torch.zeros(1, 28, 28), mask=torch.ones(2, 1, 28, 28))}, "editing.mask has shape"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"process": "edm"}, "'process' has no effect on solver 'dpmpp_2m'"),
        ({"name": "ddim"}, "'name' has no effect"),
        ({"negative_class_labels": [11]}, r"^negative_class_labels=\[11\] must lie in 0 \.\. 9"),
        ({"negative_class_labels": [0.5]}, r"^negative_class_labels=\[0\.5\] must be"),
        ({"editing": Editing(torch.zeros(1, 28, 28), strength=0.5), "t_start": 0.7}, r"t_start=0\.7 and strength=0\.5"),
        ({"guidance": GuidanceOptions(pag_scale=1.0, pag_layers=(7,))}, "7"),
    ],
)
def test_bad_requests_are_refused_in_one_line(pipe, arguments, says):
    with pytest.raises(UserError, match=says) as caught:
        pipe([1], **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["solver", "process", "num_inference_steps", "seed"])
def test_solver_options_of_a_request_name_no_other_argument(pipe, option):
    with pytest.raises(UserError, match=f"option '{option}' has no effect on solver 'ddim': .*it takes eta .*t_start"):
        pipe.mixed([ImageRequest(1, solver="ddim", solver_options={option: 3})])


def test_one_picture_to_edit_serves_every_batch(pipe):
    image = torch.zeros(1, 1, 28, 28)
    editing = [Editing(i, strength=0.5) for i in (image, image[0])]
    drawn = [pipe([4, 5], editing=e, num_inference_steps=2, batch_size=1).tensor for e in editing]
    assert torch.equal(*drawn)


def unconditional_pipeline():
    config = tiny_config(1, "num_classes=0")
    return Pipeline(build_model(config.model).eval(), config)


def test_guidance_asked_of_an_unconditional_network_is_refused():
    with pytest.raises(UserError, match="guidance_scale=2"):
        unconditional_pipeline()(num_images=1, guidance_scale=2.0)


def test_negative_labels_of_an_unconditional_network_are_refused():
    with pytest.raises(UserError, match="negative_class_labels has no effect"):
        unconditional_pipeline()(num_images=1, negative_class_labels=[1])


@pytest.mark.parametrize(
    "arguments",
    [
        {"rescale": 0.5, "apg_eta": 0.0},
        {"interval": (0.8, 0.2)},
        {"interval": (0.2, 0.8), "schedule": "linear"},
        {"pag_scale": 1.0},
    ],
)
def test_contradicting_guidance_options_are_refused(arguments):
    with pytest.raises(UserError, match="guidance"):
        GuidanceOptions(**arguments)
