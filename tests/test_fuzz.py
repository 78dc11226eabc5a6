"""Whatever is sent to the API, by its own schema or beside it: no server error, and a refusal that clients can read."""

import json
from collections import Counter

import pytest
from helpers import byte_tokenizer, random_model, serving, small_config
from hypothesis import HealthCheck, given, settings

from nanochat.api import Settings
from nanochat.engine import Engine
from nanochat.engine_worker import EngineWorker

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")


OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/health"),
    ("GET", "/stats"),
]


@pytest.fixture(scope="module")
def schema():
    tokenizer = byte_tokenizer()
    model = random_model(small_config(tokenizer.vocab_size, sequence_len=128))
    worker = EngineWorker(Engine(model, tokenizer, max_rows=8))
    with serving([worker], tokenizer, 128, defaults=Settings(max_tokens=4)) as (address, _):
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")
        assert not worker.failure and not worker.load


def test_every_operation_is_fuzzed(schema):
    operations = [result.ok() for result in schema.get_all_operations()]
    assert sorted((each.method.upper(), each.path) for each in operations) == sorted(OPERATIONS)


def answer_to(case):
    """Send it; whatever comes back is an answer or a refusal that can be read."""
    response = case.call()
    assert response.status_code < 500, response.text
    assert response.headers["content-security-policy"]
    if response.status_code >= 400:
        error = json.loads(response.text)["error"]
        assert error["message"] and error["type"] == "invalid_request_error"
    return response.status_code


def fuzz(schema, method, path, mode, change=lambda case: None) -> Counter:
    statuses = Counter()

    @settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(schema[path][method].as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
    def run(case):
        change(case)
        statuses[answer_to(case)] += 1

    run()
    return statuses


@pytest.mark.parametrize("method, path", OPERATIONS)
def test_no_request_by_the_schema_makes_a_server_error(schema, method, path):
    fuzz(schema, method, path, "POSITIVE")


@pytest.mark.parametrize("method, path", OPERATIONS[:2])
def test_no_request_against_the_schema_makes_a_server_error(schema, method, path):
    assert set(fuzz(schema, method, path, "NEGATIVE")) <= {400, 413}


@pytest.mark.parametrize("method, path", OPERATIONS[:2])
def test_with_a_plain_question_the_other_fields_reach_the_engine(schema, method, path):
    """Most conversations that the schema allows are refused, whatever else is asked."""

    def plain(case):
        case.body["messages"] = [{"role": "user", "content": "hi"}]
        case.body.pop("model", None)
        if case.body.get("top_logprobs") is not None:
            case.body["logprobs"] = True

    assert fuzz(schema, method, path, "POSITIVE", plain)[200] >= 10
