"""Bounded waits on a condition."""

from __future__ import annotations

import time
import typing

Value = typing.TypeVar("Value")


def until(
    check: typing.Callable[[], Value | None],
    *,
    timeout: float,
    failure: typing.Callable[[], Exception],
    interval: float = 0.5,
) -> Value:
    """Return the first truthy value of `check()`, asking every `interval` seconds.

    :raises Exception: what `failure()` returns, after `timeout` seconds
    """
    deadline = time.monotonic() + timeout
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise failure()
        time.sleep(interval)
