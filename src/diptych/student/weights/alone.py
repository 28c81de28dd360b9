"""One thread at a time makes modules.

diffusers and transformers patch torch for the whole process while they read weights, so a module that another thread
builds meanwhile is left without values. A server with a worker for each device has such threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_BUILDING = threading.RLock()
Given = ParamSpec("Given")
Made = TypeVar("Made")


def alone(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """Calls of all functions marked so wait for each other, but for those within one."""

    @wraps(function)
    def waits(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        with _BUILDING:
            return function(*args, **kwargs)

    return waits
