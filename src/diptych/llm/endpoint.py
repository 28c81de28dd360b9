"""The settings of an OpenAI-compatible endpoint, as a recipe can hold them. No key is ever among them: only the name
of the environment variable that has it.
"""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

JsonMode = Literal["json_schema", "json_object", "none"]
# What `extra` cannot say, because a setting of its own does, or because the client lives by it.
RESERVED = frozenset({"model", "messages", "response_format", "temperature", "max_tokens", "stream", "n"})


# Names of secrets, without case and punctuation, by how they end; and how the keys of common services begin.
_SECRET_NAME = re.compile(
    r".*(?:apikey|authorization|credentials?|passw(?:or)?d|secret|cookies?|headers?|(?:access|private|secret|"
    r"subscription|account|license)key|(?:access|auth|bearer|hf|api|user|secret|session)token)|auth|token|key|bearer"
)
_SECRET_VALUE = re.compile(
    r"\s*(?:(?i:bearer|basic|token)\s+\S{8,}|(?:sk|pk|rk|hf|gsk|xai|nvapi|ghp|gho|glpat|pplx|fw|r8)[-_][\w-]{16,}|"
    r"AIza[\w-]{30,}|eyJ[\w-]+\.[\w.-]{16,})\s*"
)


def secret(value: Any, name: str = "") -> str:
    """The name under which nested settings hold a key or a password; "" if they seem to hold none."""
    if isinstance(value, dict):
        plain = {key: re.sub(r"[^a-z0-9]", "", str(key).lower()) for key in value}
        named = next((str(key) for key, text in plain.items() if _SECRET_NAME.fullmatch(text)), "")
        return named or next((found for key, one in value.items() if (found := secret(one, str(key)))), "")
    if isinstance(value, list):
        return next((found for one in value if (found := secret(one, name))), "")
    return (name or "a list") if isinstance(value, str) and _SECRET_VALUE.fullmatch(value) else ""


class Endpoint(BaseModel):
    """Where a model answers, how it samples, and how hard it may be pushed."""

    # `strict`: no bool where a number is asked. `hide_input_in_errors`: somebody may paste a key into the wrong line.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    base_url: str
    """Up to where /chat/completions follows, mostly ending in /v1: `http://localhost:8000/v1`."""
    model: str = Field(min_length=1)
    """The server's name for it."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; null sends none."""
    json_mode: JsonMode = "json_schema"
    """How the server is asked for JSON: by schema, as any JSON, or in words only. The answer is checked here anyway."""
    temperature: float | None = Field(default=0.0, ge=0)
    """Of sampling; null leaves it to the server (some reasoning models refuse any)."""
    max_tokens: int | None = Field(default=2048, ge=1)
    """Longest answer; null leaves it to the server."""
    extra: dict[str, Any] = {}
    """More keys of the request's body: `{seed: 1}`, `{max_completion_tokens: 4000}`, what the server knows."""
    timeout: float = Field(default=120.0, gt=0)
    """Seconds for one request, from connecting to the last byte."""
    concurrency: int = Field(default=16, ge=1, le=1024)
    """Requests under way at once."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """Most requests this process sends, evenly spaced; null is no limit."""
    tokens_per_minute: float | None = Field(default=None, gt=0)
    """Most tokens this process spends, in and out; null is no limit."""
    retries: int = Field(default=6, ge=0, le=100)
    """Further tries after 429, 5xx, a time-out, a lost connection or a reply that is none."""
    backoff: float = Field(default=1.0, gt=0)
    """Seconds before the first of them, doubled each time, at most a minute, half of it at random."""
    stop_after: int = Field(default=20, ge=0)
    """Questions in a row without an answer after which the run stops, as the server is down; 0 is never."""
    input_price: float | None = Field(default=None, ge=0)
    """Money for a million tokens in."""
    output_price: float | None = Field(default=None, ge=0)
    """Money for a million tokens out."""

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an address such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("must be a plain address; a key belongs in the environment variable api_key_env names")
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
            raise ValueError(f"cannot hold {', '.join(taken)}: they have settings of their own, or are fixed")
        if name := secret(value):
            raise ValueError(
                f"holds a key in '{name}', and recipes, runs and reports are shown to others: put it into an "
                "environment variable, and that one's name into api_key_env"
            )
        return value

    def sampling(self) -> dict[str, Any]:
        """The keys of a request's body that bear on the answer, besides model and messages."""
        own = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return {key: value for key, value in own.items() if value is not None} | self.extra

    def cost(self, input_tokens: int, output_tokens: int) -> float | None:
        """Money for so many tokens, in the currency of the prices; None without prices."""
        if self.input_price is None and self.output_price is None:
            return None
        return (input_tokens * (self.input_price or 0.0) + output_tokens * (self.output_price or 0.0)) / 1e6
