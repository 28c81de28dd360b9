"""Requests that are refused although nothing is wrong with them."""

from __future__ import annotations

from diptych.errors import UserError


class Busy(UserError):
    """Not now: the queue is full, the key asked too often, or the server starts or stops. `seconds` says when."""

    def __init__(self, message: str, seconds: float, status: int = 429) -> None:
        super().__init__(message)
        self.seconds, self.status = max(1, round(seconds + 0.5)), status


class OverQuota(UserError):
    """The owner's results and references take all the room that one may have."""
