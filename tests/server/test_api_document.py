"""Schemathesis reads the OpenAPI document and asks everything that it allows, and what it does not.

SMALTI_API_CASES=2000 pytest tests/server/test_api_document.py asks that often; without it, enough for each change.
"""

import os

import hypothesis
import schemathesis
from schemathesis.specs.openapi.checks import negative_data_rejection
from server.double_service import DoubleService, card

from smalti.serving.access import parse_keys
from smalti.serving.app import create_app
from smalti.serving.server_settings import ServerSettings

KEY = "sk-schemathesis-0123456789"
CASES = int(os.environ.get("SMALTI_API_CASES", "160"))
DRAWING, READING = ["/v1/images/generations", "/v1/images/edits"], 6


def api_of(*cards):
    settings = ServerSettings(keys=parse_keys(f"{KEY} tester", "test"))
    api = schemathesis.openapi.from_asgi("/openapi.json", create_app(DoubleService(*cards, step_seconds=0.0), settings))
    # What a model can draw is not in the document: a request of the right form may ask for a class it does not have.
    api.config.checks.positive_data_acceptance.expected_statuses = [*range(200, 300), 400, 401, 404]

    @api.auth()
    class Bearer:
        def get(self, case, context):
            return KEY

        def set(self, case, key, context):
            case.headers["authorization"] = f"Bearer {key}"

    return api


def asked(cases: int):
    return hypothesis.settings(
        max_examples=max(cases, 1), deadline=None, suppress_health_check=list(hypothesis.HealthCheck), derandomize=True
    )


def check(case):
    # Anybody may add headers to HTTP; that an unknown one is let pass is no fault.
    unknown_header = "x-schemathesis-unknown-property" in (case.headers or {})
    case.call_and_validate(excluded_checks=[negative_data_rejection] if unknown_header else [])


digits = api_of(card())
words = api_of(card("words", "ba9876543210", num_classes=0, reads_prompts=True, takes_sizes=True))
reading = words.exclude(path=DRAWING)


# Of random names of models and solvers hardly one is there: without them, and with a prompt, most requests draw.
sound = api_of(card("words", "ba9876543210", num_classes=0, reads_prompts=True, takes_sizes=True))
sound.config.generation.modes = [schemathesis.GenerationMode.POSITIVE]


@sound.hook
def map_body(context, body):
    kept = {name: value for name, value in body.items() if name not in ("model", "solver", "class_label")}
    return kept | {"prompt": kept.get("prompt") or "a cat"}


@sound.include(path="/v1/images/generations").parametrize()
@asked(CASES // 6)
def test_requests_of_the_right_form(case):
    check(case)


@digits.include(path=DRAWING).parametrize()
@asked(CASES // 6)
def test_drawing_classes(case):
    check(case)


@words.include(path=DRAWING).parametrize()
@asked(CASES // 6)
def test_drawing_words(case):
    check(case)


@reading.parametrize()
@asked(CASES // 3 // READING)
def test_reading(case):
    check(case)
