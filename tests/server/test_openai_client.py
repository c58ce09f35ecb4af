"""The real `openai` client against a real server: its contract is the truth."""

import base64
import io
import logging
import time

import openai
import pytest
from PIL import Image
from server.double_service import DoubleService, card, picture
from server.live_server import live_server, wait_until

from smalti.serving.access import parse_keys
from smalti.serving.app import create_app
from smalti.serving.messages import Failed, PictureOrder
from smalti.serving.server_settings import ServerSettings

KEY = "sk-right-0123456789abcdef"
SCARCE_KEY = "sk-scarce-0123456789abcdef"


class PickyService(DoubleService):
    """A double whose workers find an order unsound only when they look at it."""

    async def _draw(self, ticket, order):
        if order.guidance_scale == 99:
            ticket.add(Failed(ticket.number, "invalid_request", "guidance_scale=99 is too much", "guidance_scale"))
        await super()._draw(ticket, order)


@pytest.fixture(scope="module")
def service():
    return PickyService(card(), card("words", "ba9876543210", num_classes=0, reads_prompts=True), room=12)


@pytest.fixture(scope="module")
def address(service):
    settings = ServerSettings(keys=parse_keys(f"{KEY} studio 2\n{SCARCE_KEY} scarce", "test"), allow_faults=True)
    with live_server(create_app(service, settings)) as address:
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=10) as client:
        yield client


def image_file(mode="RGB", size=(28, 28)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "png")
    return file.getvalue()


def test_generates(client, service):
    answer = client.images.generate(model="digits", prompt="7", n=2, size="28x28", extra_body={"seed": 5})
    assert [image.seed for image in answer.data] == [5, 6]
    wanted = [picture(PictureOrder(seed=seed, class_label=7), "0123456789ab") for seed in (5, 6)]
    assert [base64.b64decode(image.b64_json) for image in answer.data] == wanted
    assert (answer.size, answer.output_format, answer.quality) == ("28x28", "png", "medium")
    assert abs(answer.created - time.time()) < 5
    assert answer.usage.output_tokens == 2 * 49 * 20
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer._request_id.startswith("req_")
    order = service.orders[-1][1]
    assert (order.tenant, order.weight, order.request_id, order.index) == ("studio", 2.0, answer._request_id, 1)


def test_takes_the_fields_that_its_clients_send(client, service):
    client.images.generate(
        model="words@ba9876543210",
        prompt="a cat",
        background="transparent",
        moderation="low",
        style="vivid",
        user="somebody",
        quality="hd",
        output_format="webp",
        output_compression=50,
        extra_body={"negative_prompt": "a dog", "guidance_scale": 3, "solver": "ddim"},
    )
    key, order = service.orders[-1]
    assert key == "words@ba9876543210"
    assert (order.prompt, order.negative_prompt, order.class_label) == ("a cat", "a dog", None)
    assert (order.num_inference_steps, order.guidance_scale, order.solver) == (40, 3.0, "ddim")
    assert (order.output_format, order.output_compression) == ("webp", 50)


def test_a_random_seed_is_told_and_draws_the_same_again(client):
    first = client.images.generate(model="digits", prompt="7").data[0]
    again = client.images.generate(model="digits", prompt="7", extra_body={"seed": first.seed}).data[0]
    assert again.b64_json == first.b64_json
    assert client.images.generate(model="digits", prompt="7").data[0].seed != first.seed


def test_streams_previews_and_pictures(client):
    events = list(client.images.generate(model="digits", prompt="3", stream=True, partial_images=3))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    assert len({event.b64_json for event in events}) == 4
    assert events[-1].usage.output_tokens == 49 * 20
    assert events[-1].size == "28x28"


def test_streams_several_pictures(client):
    events = list(client.images.generate(model="digits", prompt="3", n=3, stream=True, partial_images=1))
    done = [event for event in events if event.type == "image_generation.completed"]
    assert sorted(event.image_index for event in done) == [0, 1, 2]
    assert len(events) == 6


def test_edits(client, service):
    source, mask = image_file(), image_file("RGBA")
    client.images.edit(model="digits", prompt="7", image=source, mask=mask, n=2, extra_body={"seed": 1})
    order = service.orders[-1][1]
    assert (order.source, order.mask, order.strength, order.seed) == (source, mask, 1.0, 2)
    client.images.edit(model="digits", prompt="7", image=[source], extra_body={"strength": 0.3})
    assert service.orders[-1][1].strength == 0.3
    stream = client.images.edit(model="digits", prompt="7", image=source, stream=True, partial_images=1)
    assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]
    assert service.orders[-1][1].strength == 0.6


def test_urls_serve_the_picture_for_a_while(client):
    image = client.images.generate(model="digits", prompt="7", response_format="url", extra_body={"seed": 4}).data[0]
    url = image.url
    assert (image.seed, image.b64_json) == (4, None)
    answer = client._client.get(url, headers={"authorization": ""})
    assert answer.headers["content-type"] == "image/png"
    assert answer.content == picture(PictureOrder(seed=4, class_label=7), "0123456789ab")
    assert client._client.get(url[:-1] + "_").status_code == 404


def test_lists_models(client):
    assert [model.id for model in client.models.list()] == ["digits", "words"]
    model = client.models.retrieve("digits")
    assert (model.created, model.owned_by, model.num_classes) == (1_700_000_000, "smalti", 10)
    assert client.models.retrieve("digits@0123456789ab").id == "digits@0123456789ab"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "a cat"}, "prompt"),
        ({"prompt": "10"}, "prompt"),
        ({"prompt": "7", "n": 11}, "n"),
        ({"prompt": "7", "n": 10**6}, "n"),
        ({"prompt": "7", "size": "64x64"}, "size"),
        ({"prompt": "7", "size": "1000000x1000000"}, "size"),
        ({"prompt": "7", "quality": "best"}, "quality"),
        ({"prompt": "7", "output_format": "gif"}, "output_format"),
        ({"prompt": "7", "extra_body": {"num_inference_steps": 10**6}}, "num_inference_steps"),
        ({"prompt": "7", "extra_body": {"seed": -1}}, "seed"),
        ({"prompt": "7", "n": 2, "extra_body": {"seed": 2**63 - 1}}, "seed"),
        ({"prompt": "7", "extra_body": {"guidance_scale": "high"}}, "guidance_scale"),
        ({"prompt": "7", "extra_body": {"solver": "ddpm"}}, "solver"),
        ({"prompt": "7", "extra_body": {"class_label": 10}}, "class_label"),
        ({"prompt": "7", "extra_body": {"negative_prompt": "a dog"}}, "negative_prompt"),
        ({"prompt": "7", "extra_body": {"sed": 1}}, "sed"),
        ({"prompt": "7", "extra_headers": {"x-smalti-deadline": "-1"}}, "x-smalti-deadline"),
        ({"prompt": "7", "extra_headers": {"x-smalti-fault": "nann"}}, "x-smalti-fault"),
    ],
)
def test_a_wrong_request_is_told_by_its_field(client, service, fields, param):
    accepted = len(service.orders)
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(model="digits", **fields)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert param in caught.value.message
    assert len(service.orders) == accepted


def test_an_unknown_field_names_the_near_ones(client):
    with pytest.raises(openai.BadRequestError, match="did you mean guidance_scale"):
        client.images.generate(model="digits", prompt="7", extra_body={"guidance_scal": 1})


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_worker_refuses_is_a_bad_request_too(client, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(model="digits", prompt="7", n=2, stream=stream, extra_body={"guidance_scale": 99})
    assert caught.value.param == "guidance_scale"


def test_keys(address):
    for key in ("sk-wrong-0123456789abcdef", f"{KEY}x", KEY[:-1]):
        with (
            openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as client,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            client.models.list()
        assert (caught.value.code, caught.value.type) == ("invalid_api_key", "authentication_error")


def test_unknown_models(client):
    for ask in (lambda: client.images.generate(model="digit", prompt="7"), lambda: client.models.retrieve("digit")):
        with pytest.raises(openai.NotFoundError, match="did you mean 'digits'") as caught:
            ask()
        assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("fault", "status", "code", "retry"),
    [
        ("nan", 500, "not_finite", "false"),
        ("out_of_memory", 503, "out_of_memory", "true"),
        ("error", 500, "internal_error", "false"),
    ],
)
def test_failures_of_pictures(client, fault, status, code, retry):
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(model="digits", prompt="7", n=3, extra_headers={"x-smalti-fault": fault})
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert caught.value.response.headers["x-should-retry"] == retry
    with pytest.raises(openai.APIError) as caught:
        list(client.images.generate(model="digits", prompt="7", stream=True, extra_headers={"x-smalti-fault": fault}))
    assert caught.value.code == code


def test_a_full_queue_is_a_rate_limit(client, service):
    stream = client.images.generate(
        model="digits", prompt="7", n=10, stream=True, extra_body={"num_inference_steps": 1000}
    )
    with stream, pytest.raises(openai.RateLimitError) as caught:
        client.images.generate(model="digits", prompt="7", n=10)
    assert caught.value.code == "queue_full"
    assert caught.value.response.headers["retry-after"] == "2"
    wait_until(lambda: not service.live)  # the stream that was closed took its pictures along


def test_rate_limits_hold_a_key_and_are_waited_for(service):
    settings = ServerSettings(keys=parse_keys(f"{KEY} studio\n{SCARCE_KEY} scarce", "test"), rate_limit="2/2 seconds")
    with (
        live_server(create_app(service, settings)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=1) as client,
        openai.OpenAI(base_url=f"{address}/v1", api_key=SCARCE_KEY, max_retries=0) as other,
    ):
        began = time.monotonic()
        for _ in range(2):
            client.images.generate(model="digits", prompt="7")
        with pytest.raises(openai.RateLimitError) as caught:
            client.with_options(max_retries=0).images.generate(model="digits", prompt="7")
        assert caught.value.code == "rate_limit_exceeded"
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 2
        client.models.list()  # reading is not limited
        other.images.generate(model="digits", prompt="7")
        client.images.generate(model="digits", prompt="7")  # retried by the client, after the time it was told
        assert 2 <= time.monotonic() - began < 5


def test_keys_and_prompts_are_not_logged(service, caplog):
    settings = ServerSettings(keys=parse_keys(f"{KEY} studio", "test"))
    caplog.set_level(logging.INFO)
    logging.getLogger("uvicorn").propagate = True
    with live_server(create_app(service, settings)) as address:
        for key in (KEY, "sk-wrong-0123456789abcdef"):
            with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as client:
                try:
                    url = client.images.generate(model="words", prompt="a secret", response_format="url").data[0].url
                    client._client.get(url)
                    client.images.generate(model="words", prompt="a secret", extra_body={"secret": KEY})
                except openai.APIStatusError:
                    pass
    told = [record for record in caplog.records if record.name == "smalti.serving.access"]
    assert [(record.status, record.tenant, record.code) for record in told] == [
        (200, "studio", ""),
        (200, "", ""),
        (400, "studio", "unknown_parameter"),
        (401, "", "invalid_api_key"),
    ]
    text = "\n".join(f"{record.getMessage()} {record.__dict__}" for record in caplog.records if "smalti" in record.name)
    for secret in (KEY, KEY[-8:], "sk-wrong", "a secret", url.rpartition("/")[2]):
        assert secret not in text
    assert all(record.request_id.startswith("req_") and record.seconds >= 0 for record in told)
