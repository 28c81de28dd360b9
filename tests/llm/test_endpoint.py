"""An endpoint's settings."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from diptych.llm.endpoint import Endpoint

LOCAL = "http://localhost:8000/v1"


@pytest.mark.parametrize("key", ["sk-proj-abc123", "AIzaSyA1b2c3", "hf_AbCdEf", "Bearer X", "lowercase"])
def test_a_key_in_the_place_of_its_variables_name_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Endpoint(base_url=LOCAL, model="m", api_key_env=key)
    assert "OPENAI_API_KEY" in str(caught.value)
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host/v1", "http://me:secret9@host/v1", "https://host/v1?key=secret9", ""]
)
def test_an_address_is_plain_http_without_secrets(url: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Endpoint(base_url=url, model="m")
    assert "secret9" not in str(caught.value)


@pytest.mark.parametrize("url", [LOCAL, f"{LOCAL}/", f"{LOCAL}/chat/completions"])
def test_an_address_may_end_as_people_write_it(url: str) -> None:
    assert Endpoint(base_url=url, model="m").base_url == LOCAL


@pytest.mark.parametrize("wrong", [{"retrys": 3}, {"timeout": True}, {"concurrency": 0}, {"json_mode": "xml"}])
def test_unknown_and_senseless_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Endpoint.model_validate({"base_url": LOCAL, "model": "m", **wrong})


def test_extra_cannot_say_what_a_setting_says() -> None:
    with pytest.raises(ValidationError, match="temperature"):
        Endpoint(base_url=LOCAL, model="m", extra={"temperature": 1})


def test_sampling_is_what_is_set_and_extra() -> None:
    endpoint = Endpoint(base_url=LOCAL, model="m", temperature=None, max_tokens=9, extra={"seed": 1})
    assert endpoint.sampling() == {"max_tokens": 9, "seed": 1}


def test_money_is_counted_by_the_million_and_unknown_without_prices() -> None:
    assert Endpoint(base_url=LOCAL, model="m").cost(10, 10) is None
    priced = Endpoint(base_url=LOCAL, model="m", input_price=2.0, output_price=8.0)
    assert priced.cost(1_000_000, 500_000) == pytest.approx(6.0)
