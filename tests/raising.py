"""What tests expect of an error: its code and the facts in its message, not its wording."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from diptych.errors import UserError


@contextmanager
def raises(code: str, *facts: object, kind: type[UserError] = UserError) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Checks that the block raises a `UserError` with this code, whose message has every fact.

    Args:
        code: a code of `errors.yaml`.
        facts: what the message must have: a path, a name, a number, a suggested word.
        kind: the class, where it matters: `UsageError` ends with exit code 2.
    """
    with pytest.raises(kind) as caught:
        yield caught
    error = caught.value
    assert error.code == code, f"the code is {error.code}, not {code}: {error}"
    absent = [str(fact) for fact in facts if str(fact) not in str(error)]
    assert not absent, f"not in the message: {absent}: {error}"
