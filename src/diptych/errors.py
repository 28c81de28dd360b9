"""Errors meant for people: one clear line, a stable code, an exit code, and what to do next.

`UserError` is a task that failed for a reason its user can act on (a corrupt image, a gated model). `UsageError` is a
wrong request (a misspelt recipe key, a folder that another recipe made). The command line prints either without a
traceback. Broken invariants are `assert`s and stay ordinary exceptions.

Codes are stable and listed in `utils/errors.yaml`, each with its meaning and remedy; wording may change. Programs and
tests match the code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

TABLE = Path(__file__).parent / "utils" / "errors.yaml"
"""Every code with its meaning and remedy."""


class UserError(ValueError):
    """Something failed. Exit code 1.

    Args:
        code: a code of `utils/errors.yaml`, for instance `image_not_found`.
        message: what failed, the value and the place, and what to do next, in one line.
    """

    exit_code = 1
    stops = False
    """Whether all other rows would fail too (a server that is down): the run ends, and no row is marked as failed."""
    shared = False
    """Whether each of several processes has it, so that only one reports it."""

    def __init__(self, code: str, message: str):
        super().__init__(code, message)  # as arguments, so that it can be pickled
        self.code, self.message = code, message

    def __str__(self) -> str:
        return self.message


class UsageError(UserError):
    """The request itself is wrong, so trying again unchanged cannot help. Exit code 2."""

    exit_code = 2


@cache
def codes() -> Mapping[str, Mapping[str, str]]:
    """All error codes: `{code: {meaning, remedy}}`."""
    import yaml

    return yaml.safe_load(TABLE.read_text("utf8"))


def describe(error: BaseException, limit: int | None = 300, kind: bool = False) -> str:
    """The message of an exception in one line of at most `limit` characters, or its class if it has none.

    With `kind`, the class comes first in any case.
    """
    name, message = type(error).__name__, " ".join(str(error).split())
    return (f"{name}: {message or 'no message'}" if kind else message or name)[:limit]


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint to append to a message, `"; did you mean 'steps'?"`, or `""` if no choice is similar."""
    by_lower = {choice.lower(): choice for choice in choices}
    matches = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean '{by_lower[matches[0]]}'?" if matches else ""
