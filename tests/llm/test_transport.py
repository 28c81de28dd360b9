"""One request and what comes of it: what is tried again, fails alone or stops the run, and whose key stays secret."""

from __future__ import annotations

import json
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from diptych import recipe as recipes
from diptych.errors import UsageError, UserError
from diptych.llm.cache import Cache
from diptych.llm.client import Client
from diptych.llm.endpoint import Endpoint
from diptych.llm.question import Outcome
from diptych.llm.vllm import Vllm
from llm.chat_server import Act, Call, Serve, refuse, say
from llm.counting import Make, number, number_of, right
from raising import raises

KEY = "sk-test-0123456789abcdef"


# ---- what passes, what does not


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 529])
def test_what_passes_is_tried_again(serve: Serve, endpoint: Make, status: int) -> None:
    server = serve(lambda call: right(call) if call.number == 2 else refuse(status, "wait"))
    with Client(endpoint(server)) as client:
        assert client.ask(number(1)).answer == {"number": 1}
    assert len(server.calls) == 3


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": 7}}]}',
        b'{"choices": [{"message": {"content": "{}"}}], "usage": {"prompt_tokens": 1e999}}',
        b'{"error": {"message": "overloaded"}}',
        b"[" * 100_000,
    ],
)
def test_a_reply_that_is_none_is_tried_again(serve: Serve, endpoint: Make, body: bytes) -> None:
    server = serve(lambda call: right(call) if call.number == 1 else Act(body))
    with Client(endpoint(server)) as client:
        assert client.ask(number(1)).answer == {"number": 1}
    assert len(server.calls) == 2


def test_a_count_of_tokens_beyond_reason_breaks_no_cache(serve: Serve, endpoint: Make, tmp_path: Path) -> None:
    def act(call: Call) -> Act:
        return Act(right(call).body.replace(b'"prompt_tokens": 100', b'"prompt_tokens": 9' + b"9" * 40))

    server = serve(act)
    with Cache(tmp_path / "a.sqlite") as cache, Client(endpoint(server), cache) as client:
        assert [client.ask(number(1)).cached for _ in range(2)] == [False, True]


def test_retry_after_is_honoured_by_all_calls(serve: Serve, endpoint: Make) -> None:
    server = serve(lambda call: refuse(429, "wait", {"Retry-After": "1"}) if call.number == 0 else right(call))
    with Client(endpoint(server, concurrency=1)) as client:
        client.ask_many(map(number, range(3)), lambda outcome: None)
    assert server.calls[1].time - server.calls[0].time >= 0.95


def test_a_bad_question_fails_alone(serve: Serve, endpoint: Make) -> None:
    server = serve(lambda call: refuse(400, "context too long") if number_of(call) == 2 else right(call))
    outcomes: dict[str, Outcome] = {}
    with Client(endpoint(server)) as client:
        questions = [number(n) for n in range(4)] + [number(4, b""), number(5, b"no picture")]
        client.ask_many(questions, lambda outcome: outcomes.__setitem__(outcome.tag, outcome))
    assert [outcomes[str(n)].status for n in range(6)] == [*["answered"] * 2, "failed", "answered", *["failed"] * 2]
    assert "400: context too long" in outcomes["2"].reason
    assert "0 bytes" in outcomes["4"].reason and "supported format" in outcomes["5"].reason
    assert len(server.calls) == 4


@pytest.mark.parametrize(
    ("reply", "code", "facts"),
    [
        (refuse(401, "bad key"), "endpoint_refused", ["bad key", "api_key_env"]),
        (refuse(403, "not yours"), "endpoint_refused", ["not yours"]),
        (refuse(404, "no such model"), "endpoint_model_unknown", ["'tiny'", "no such model"]),
        (refuse(402, "pay"), "endpoint_quota", ["pay"]),
        (refuse(429, "quota", code="insufficient_quota"), "endpoint_quota", ["429: quota"]),
        (refuse(429, "tomorrow", {"Retry-After": "86400"}), "endpoint_quota", ["24.0 hours"]),
        (refuse(400, "response_format is not supported"), "endpoint_unsuited", ["json_object or none"]),
        (
            Act(status=307, headers={"Location": "https://elsewhere/v1"}),
            "endpoint_unreachable",
            ["https://elsewhere/v1"],
        ),
    ],
)
def test_what_every_question_would_meet_stops_the_run_with_one_line(
    serve: Serve, endpoint: Make, reply: Act, code: str, facts: list[str]
) -> None:
    server = serve(lambda call: reply)
    outcomes: list[Outcome] = []
    with Client(endpoint(server)) as client, raises(code, *facts) as caught:
        client.ask_many(map(number, range(100)), outcomes.append)
    assert "\n" not in str(caught.value)
    assert len(server.calls) <= 4  # those in flight together
    assert outcomes == []


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_server_that_drips_outlives_no_time_out(serve: Serve, endpoint: Make, part: str) -> None:
    """Over a fresh connection and over one that is kept from an earlier answer."""
    server = serve(lambda call: right(call) if call.number == 0 else replace(right(call), drip=part))
    with Client(endpoint(server, timeout=0.5, retries=1)) as client:
        assert client.ask(number(1)).answer == {"number": 1}
        before = time.monotonic()
        outcome = client.ask(number(2))
    assert (outcome.status, outcome.lost) == ("failed", True) and "0.5 s" in outcome.reason
    assert 0.9 < time.monotonic() - before < 2.5 and len(server.calls) == 3


# ---- keys


@pytest.mark.parametrize(
    "reply",
    [
        refuse(401, f"{'x' * 190} wrong key {KEY}"),
        refuse(500, f"who is {KEY}?"),
        Act(f"not json {KEY}".encode()),
        Act(status=307, headers={"Location": f"https://elsewhere/{KEY}"}),
        say({"number": 1, "key": KEY}),
        say(f"your key is {KEY}"),
        say(None, refusal=f"not for {KEY}"),
    ],
)
def test_a_key_that_a_server_echoes_is_written_nowhere(
    serve: Serve, endpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: Act, caplog: Any
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("TEST_KEY", KEY)
    server = serve(lambda call: reply)
    settings = endpoint(server, api_key_env="TEST_KEY", retries=0)
    seen = [repr(settings), settings.model_dump_json()]
    with Cache(tmp_path / "a.sqlite") as cache, Client(settings, cache, keep_undecided=True) as client:
        seen += [repr(client), repr(client._transport)]
        try:
            seen.append(repr(client.ask(number(1))))
        except UserError:
            seen.append(traceback.format_exc())
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert server.calls[0].headers["Authorization"] == f"Bearer {KEY}"
    for piece in (KEY, KEY[:12]):
        assert piece not in "\n".join(seen)
        assert piece not in caplog.text
        assert piece.encode() not in files


@pytest.mark.parametrize("value", ["", "  ", "two words-000000", "nul\nline-secret", "schlüssel-00000"])
def test_a_key_that_is_none_stops_before_anything_is_sent(
    serve: Serve, endpoint: Make, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("TEST_KEY", value)
    server = serve(right)
    with (
        Client(endpoint(server, api_key_env="TEST_KEY")) as client,
        raises("endpoint_refused", "TEST_KEY") as caught,
    ):
        client.ask(number(1))
    assert not value.strip() or value.strip() not in str(caught.value)
    assert server.calls == []


@pytest.mark.parametrize(
    "extra",
    [
        {"api_key": "abc"},
        {"apiKey": "abc"},
        {"x-api-key": "abc"},
        {"authorization": "abc"},
        {"headers": {"Authorization": f"Bearer {KEY}"}},
        {"extra_headers": {"X-Custom": "abc"}},
        {"metadata": {"deep": [{"client_secret": "abc"}]}},
        {"provider": {"name": KEY}},
        {"stop": ["x", f"Bearer {KEY}"]},
        {"password": "abc"},
        {"hf_token": "hf_abcdefghijklmnopqrst"},
    ],
)
def test_a_key_among_the_extra_settings_is_refused_and_not_shown(extra: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        Endpoint(base_url="http://localhost:1/v1", model="m", extra=extra)
    assert "api_key_env" in str(caught.value) and KEY not in str(caught.value)
    with pytest.raises(ValidationError, match="API key"):
        Vllm(model="m", extra=extra)
    with pytest.raises(UsageError, match=r"write\.endpoint\.extra") as said:
        recipes.load(
            "pocket", [f"write.endpoint={json.dumps({'base_url': 'http://a/v1', 'model': 'm', 'extra': extra})}"]
        )
    assert KEY not in str(said.value) and "\n" not in str(said.value)


def test_what_servers_take_beside_keys_is_no_key() -> None:
    extra = {
        "max_completion_tokens": 4000,
        "seed": 1,
        "stop": ["</s>", "sk-"],
        "eos_token": "</s>",
        "min_tokens": 1,
        "valid_tokens": [1],
        "prompt_cache_key": "a run",
        "logit_bias": {"50256": -100},
        "reasoning": {"effort": "low", "max_tokens": 9},
        "skip_special_tokens": True,
        "chat_template_kwargs": {"enable_thinking": False},
        "provider": {"order": ["skylark-together-ai"]},
    }
    assert Endpoint(base_url="http://localhost:1/v1", model="m", extra=extra).extra == extra
