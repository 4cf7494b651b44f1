"""The client against a local endpoint: retries, limits, the cache, re-asking, and a key that stays secret."""

import asyncio
import json
import time

import pytest

from megatron_eagle.eagle_video.client import Client, DryRun, for_each
from megatron_eagle.eagle_video.schema import example, parse_answer
from megatron_eagle.eagle_video.transport import Endpoint
from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem
from tests.eagle_video.server import serving

SCHEMA = {
    "type": "object",
    "required": ["n"],
    "properties": {"n": {"type": "integer"}, "words": {"type": "array", "items": {"type": "string"}}},
}
KEY = "sk-very-secret"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(lambda request: '{"n": 7}') as running:
        yield running


def _ask(server, cache, questions=("one?",), *, reasks=2, **settings):
    """Values (or problems) and usage of asking all questions at once."""
    endpoint = Endpoint(server.url, "tiny", first_wait=0.01, **settings)

    async def run():
        with Client(endpoint, cache, reasks=reasks) as client:
            asked = (client.ask(q, SCHEMA) for q in questions)
            return await asyncio.gather(*asked, return_exceptions=True), client.usage

    return asyncio.run(run())


def test_answer_usage_and_cache(server, tmp_path):
    (answer,), usage = _ask(server, tmp_path, input_price=2.0, output_price=10.0)
    assert answer.value == {"n": 7}
    assert (usage.requests, usage.input_tokens, usage.output_tokens) == (1, 100, 10)
    assert usage.cost == pytest.approx((100 * 2 + 10 * 10) / 1e6)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    (again,), usage = _ask(server, tmp_path)
    assert again == answer and (usage.requests, usage.cached, usage.cost) == (0, 1, 0)
    assert len(server.requests) == 1
    _ask(server, tmp_path, ["two?"])  # another request is another key
    assert len(server.requests) == 2


def test_the_same_question_at_once_is_paid_once(server, tmp_path):
    answers, usage = _ask(server, tmp_path, ["one?"] * 5)
    assert len(set(a.key for a in answers)) == 1 and usage.requests == len(server.requests) == 1


@pytest.mark.parametrize(
    "fault",
    [
        ("status", 500, {}),
        ("status", 429, {}),
        ("sleep", 0.6),
        ("body", b"<html>"),
        ("body", b'{"choices": []}'),
        ("cut", b'{"choices": [{"mess'),
    ],
    ids=str,
)
def test_passing_faults_are_retried(fault, server, tmp_path):
    server.faults = [fault, fault]
    (answer,), usage = _ask(server, tmp_path, timeout=0.25)
    assert answer.value == {"n": 7} and usage.retries == 2 and len(server.requests) == 3


def test_retry_after_holds_for_all(server, tmp_path):
    server.faults = [("status", 429, {"Retry-After": "0.4"})]
    _, usage = _ask(server, tmp_path, ["one?", "two?"], concurrency=1)
    assert usage.retries == 1 and server.times[1] - server.times[0] >= 0.39


def test_rate_limit(server, tmp_path):
    _ask(server, tmp_path, ["1", "2", "3"], requests_per_minute=600)
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert min(gaps) > 0.07  # a tenth of a second between starts, less what the way to the server varies


def test_token_limit(server, tmp_path):
    """Four requests of 8 + 1024 tokens each, at 60 times 5160 a minute: 0.2 s between starts."""
    questions = [f"{i}" * 32 for i in range(4)]
    start = time.monotonic()
    answers, _ = _ask(server, tmp_path, questions, tokens_per_minute=60 * 5160)
    assert len(answers) == 4 and time.monotonic() - start >= 3 * 1032 / 5160
    with pytest.raises(UserError, match="tokens_per_minute must be positive"):
        Endpoint(server.url, "m", tokens_per_minute=0)


def test_nonsense_is_asked_again_and_given_up(server, tmp_path):
    server.faults = [("text", "no json"), ("text", '{"n": "7"}')]
    (answer,), usage = _ask(server, tmp_path)
    assert answer.value == {"n": 7} and usage.invalid == 2
    assert "not JSON" in server.requests[1]["messages"][-1]["content"]
    assert "answer.n must be of type integer" in server.requests[2]["messages"][-1]["content"]

    server.faults = [("length", '{"n"')] * 9
    (problem,), usage = _ask(server, tmp_path, ["again?"], reasks=1)
    assert isinstance(problem, Problem) and problem.kind == "no valid answer" and usage.requests == 2
    (problem,), usage = _ask(server, tmp_path, ["again?"], reasks=1)  # and is not paid for a second time
    assert isinstance(problem, Problem) and (usage.requests, usage.cached) == (0, 2)


def test_an_endpoint_that_stays_broken(server, tmp_path):
    server.faults = [("status", 503, {})] * 9
    (problem,), _ = _ask(server, tmp_path, attempts=3)
    assert problem.kind == "endpoint failed" and "status 503" in str(problem) and KEY not in str(problem)
    assert len(server.requests) == 3


def test_key_is_nowhere(server, tmp_path):
    server.faults = [("status", 401, {}), ("status", 400, {})]
    (refused,), _ = _ask(server, tmp_path)
    assert isinstance(refused, UserError) and "OPENAI_API_KEY" in str(refused) and KEY not in str(refused)
    (refused,), _ = _ask(server, tmp_path)
    assert isinstance(refused, Problem) and "***" in str(refused) and KEY not in str(refused)
    _ask(server, tmp_path)
    files = [p.read_text() for p in tmp_path.rglob("*.json")]
    assert files and not any(KEY in text for text in files)


def test_redirects_are_not_followed(server, tmp_path):
    server.faults = [("status", 302, {"Location": f"{server.url}/elsewhere"})]
    (refused,), _ = _ask(server, tmp_path)
    assert isinstance(refused, UserError) and len(server.requests) == 1


def test_wrong_endpoints():
    for url in ("localhost:80", "ftp://a/v1", "http://user:word@host/v1"):
        with pytest.raises(UserError) as error:
            Endpoint(url, "m")
        assert "word" not in str(error.value).replace("password", "")
    with pytest.raises(UserError, match="attempts must be positive"):
        Endpoint("http://a/v1", "m", attempts=0)


def test_dry_run_counts_without_asking():
    client = DryRun(Endpoint("http://127.0.0.1:9/v1", "m", input_price=1.0, output_price=2.0))
    picture = {"type": "image_url", "image_url": {"url": "data:"}}
    content = [{"type": "text", "text": "a" * 40}, picture, picture]
    assert asyncio.run(client.ask(content, SCHEMA, max_tokens=100)).value == {"n": 0, "words": ["x"]}
    assert (client.usage.requests, client.usage.input_tokens, client.usage.output_tokens) == (1, 610, 50)
    assert client.usage.cost == pytest.approx((610 + 100) / 1e6)


def test_for_each_keeps_order():
    async def double(n):
        await asyncio.sleep(0.01 * (3 - n))
        return [2 * n]

    assert asyncio.run(for_each([0, 1, 2], double, 2)) == [[0], [2], [4]]


def test_schema():
    assert parse_answer('```json\n{"n": 1}\n```', SCHEMA) == {"n": 1}
    for text, problem in (
        ('{"n": true}', "type integer"),
        ("{}", "no 'n'"),
        ('{"n": 1, "words": [2]}', r"words\[0\] must be of type string"),
        ("[" * 100_000, "not JSON"),
    ):
        with pytest.raises(ValueError, match=problem):
            parse_answer(text, SCHEMA)
    limits = {"type": "array", "minItems": 2, "items": {"enum": ["a", "b"]}}
    assert parse_answer(json.dumps(example(limits)), limits) == ["a", "a"]
    with pytest.raises(ValueError, match="has 1 items"):
        parse_answer('["a"]', limits)
    with pytest.raises(ValueError, match="one of a, b"):
        parse_answer('["a", "c"]', limits)
