"""Rate limits and waits, by a clock that the tests turn."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from diptych.llm.pace import MAX_PAUSE, Pace, pause, retry_after


class Clock:
    """Seconds, turned by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def send(pace: Pace, clock: Clock, calls: int, spent: int = 0) -> list[float]:
    """When each of some calls goes out, one after the other."""
    times = []
    for _ in range(calls):
        wait, booked = pace.book(0)
        clock.now += wait
        times.append(clock.now)
        pace.correct(booked, spent)
    return times


def test_no_minute_holds_more_requests_than_allowed() -> None:
    clock = Clock()
    times = send(Pace(requests_per_minute=30, clock=clock), clock, 200)
    for start in times:
        assert sum(start <= time < start + 60 for time in times) <= 30


def test_time_not_used_is_not_saved_up() -> None:
    clock = Clock()
    pace = Pace(requests_per_minute=60, clock=clock)
    send(pace, clock, 1)
    clock.now += 600
    first, *rest = send(pace, clock, 3)
    assert [time - first for time in rest] == [1.0, 2.0]


def test_no_minute_holds_more_tokens_than_allowed_once_calls_are_known() -> None:
    clock = Clock()
    times = send(Pace(tokens_per_minute=6000, clock=clock), clock, 100, spent=500)
    for start in times:
        assert sum(start <= time < start + 60 for time in times) * 500 <= 6000


def test_a_call_that_failed_gives_its_tokens_back() -> None:
    clock = Clock()
    pace = Pace(tokens_per_minute=60, clock=clock)
    _, booked = pace.book(600)
    assert pace.book(0)[0] == 600
    pace.correct(booked, 0)
    assert pace.book(0)[0] == 0


def test_a_hold_keeps_everything_back_and_the_longest_counts() -> None:
    clock = Clock()
    pace = Pace(clock=clock)
    pace.hold(10)
    pace.hold(3)
    assert (pace.book(0)[0], pace.held()) == (10, 10)
    clock.now += 10
    assert (pace.book(0)[0], pace.held()) == (0, 0)


def test_without_limits_nothing_waits() -> None:
    clock = Clock()
    assert set(send(Pace(clock=clock), clock, 50, spent=10_000)) == {1000.0}


def test_pauses_double_up_to_a_minute_and_are_partly_random() -> None:
    for attempt in range(200):
        whole = min(MAX_PAUSE, 0.5 * 2.0**attempt)
        assert whole / 2 <= pause(attempt, 0.5) <= whole
    assert len({pause(0, 1.0) for _ in range(20)}) > 1


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("2", 2), ("0.5", 0.5), ("-1", 0), (None, None), ("soon", None), ("nan", None), ("inf", None)],
)
def test_retry_after_in_seconds(value: str | None, seconds: float | None) -> None:
    assert retry_after(value) == seconds


def test_retry_after_as_a_date() -> None:
    when = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert retry_after(when) == pytest.approx(90, abs=30)
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
