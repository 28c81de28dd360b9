"""The settings of an OpenAI-compatible endpoint, as a recipe has them.

They never include the API key, only the name of its environment variable.
"""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

JsonMode = Literal["json_schema", "json_object", "none"]
# Keys that `extra` cannot have, because they are settings here or the client depends on them.
RESERVED = frozenset({"model", "messages", "response_format", "temperature", "max_tokens", "stream", "n"})

# Names of secrets, without case and punctuation, by their ends; and the beginnings of the keys of common services.
_SECRET_NAME = re.compile(
    r".*(?:apikey|authorization|credentials?|passw(?:or)?d|secret|cookies?|headers?|(?:access|private|secret|"
    r"subscription|account|license)key|(?:access|auth|bearer|hf|api|user|secret|session)token)|auth|token|key|bearer"
)
_SECRET_VALUE = re.compile(
    r"\s*(?:(?i:bearer|basic|token)\s+\S{8,}|(?:sk|pk|rk|hf|gsk|xai|nvapi|ghp|gho|glpat|pplx|fw|r8)[-_][\w-]{16,}|"
    r"AIza[\w-]{30,}|eyJ[\w-]+\.[\w.-]{16,})\s*"
)


def secret(value: Any, name: str = "") -> str:
    """Return the name under which nested settings have a key or a password; "" if they seem to have none."""
    if isinstance(value, dict):
        plain = {key: re.sub(r"[^a-z0-9]", "", str(key).lower()) for key in value}
        named = next((str(key) for key, text in plain.items() if _SECRET_NAME.fullmatch(text)), "")
        return named or next((inner for key, one in value.items() if (inner := secret(one, str(key)))), "")
    if isinstance(value, list):
        return next((inner for one in value if (inner := secret(one, name))), "")
    return (name or "a list") if isinstance(value, str) and _SECRET_VALUE.fullmatch(value) else ""


class Endpoint(BaseModel):
    """A server's address, its sampling settings, and its limits."""

    # `strict`: a bool is not a number. `hide_input_in_errors`: somebody may paste a key into the wrong line.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    base_url: str
    """Address of the API without `/chat/completions`, mostly ending in /v1: `http://localhost:8000/v1`."""
    model: str = Field(min_length=1)
    """Name of the model on the server."""
    api_key_env: str | None = None
    """Name of the environment variable with the API key. Null sends no key."""
    json_mode: JsonMode = "json_schema"
    """How JSON is requested from the server: by schema, as any JSON object, or in the prompt only. The answer is
    validated in any case."""
    temperature: float | None = Field(default=0.0, ge=0)
    """Sampling temperature. Null leaves it to the server; some reasoning models reject any value."""
    max_tokens: int | None = Field(default=2048, ge=1)
    """Maximum length of an answer, in tokens. Null leaves it to the server."""
    extra: dict[str, Any] = {}
    """Further keys of the request's body that the server supports: `{seed: 1}`, `{max_completion_tokens: 4000}`."""
    timeout: float = Field(default=120.0, gt=0)
    """Time-out of one request in seconds, from connecting to the last byte."""
    concurrency: int = Field(default=16, ge=1, le=1024)
    """Maximum number of requests in flight."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """Maximum requests a minute, evenly spaced, of all workers of the stage together. Null sets no limit."""
    tokens_per_minute: float | None = Field(default=None, gt=0)
    """Maximum tokens a minute, input and output, of all workers of the stage together. Null sets no limit."""
    retries: int = Field(default=6, ge=0, le=100)
    """Further tries after 429, 5xx, a time-out, a lost connection, or a reply that is not a chat completion."""
    backoff: float = Field(default=1.0, gt=0)
    """Seconds before the first retry. They double each time, up to a minute, and up to half of them is random."""
    stop_after: int = Field(default=20, ge=0)
    """Questions in a row without an answer after which the run stops, because the server is down. 0 never stops."""
    input_price: float | None = Field(default=None, ge=0)
    """Price of a million input tokens, in any currency."""
    output_price: float | None = Field(default=None, ge=0)
    """Price of a million output tokens, in the same currency."""

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an address such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("must be a plain address; put a key into the environment variable that api_key_env names")
        return value.rstrip("/").removesuffix("/chat/completions")

    @field_validator("api_key_env")
    @classmethod
    def _name_not_key(cls, value: str | None) -> str | None:
        # Upper case only: most keys would pass for a name otherwise.
        if value is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", value):
            raise ValueError("must be the name of an environment variable, such as OPENAI_API_KEY, not the key itself")
        return value

    @field_validator("extra")
    @classmethod
    def _not_reserved(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(RESERVED & value.keys()):
            raise ValueError(f"cannot have {', '.join(taken)}; they are fixed or separate settings")
        if name := secret(value):
            raise ValueError(
                f"has an API key in '{name}', and recipes, runs and reports are shared; put the key into an "
                "environment variable and the variable's name into api_key_env"
            )
        return value

    def sampling(self) -> dict[str, Any]:
        """Return the keys of a request's body that change the answer, besides model and messages."""
        values = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return {key: value for key, value in values.items() if value is not None} | self.extra

    def cost(self, input_tokens: int, output_tokens: int) -> float | None:
        """Return the price of tokens, in the currency of the prices; None without prices."""
        if self.input_price is None and self.output_price is None:
            return None
        return (input_tokens * (self.input_price or 0.0) + output_tokens * (self.output_price or 0.0)) / 1e6
