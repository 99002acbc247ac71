# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Waits for a condition: monotonic clock, bounded, with growing but capped pauses."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from ansible_collections.vmbeam.xen.plugins.module_utils._errors import WaitTimeout

T = TypeVar("T")

FIRST_PAUSE = 0.2
LONGEST_PAUSE = 5.0


class Clock:
    """The time, as seconds of a monotonic clock, and sleeping; replaced in tests."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Deadline:
    """A moment on the monotonic clock that several steps share."""

    def __init__(self, seconds: float, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.seconds = seconds
        self._started = self.clock.now()

    @property
    def elapsed(self) -> float:
        return self.clock.now() - self._started

    @property
    def left(self) -> float:
        """Seconds that are left, never negative."""
        return max(0.0, self.seconds - self.elapsed)


def wait_for(probe: Callable[[], T], deadline: Deadline, what: str) -> T:
    """Calls probe until it returns something true, and returns that.

    The probe is called at least once, and once more at the deadline. Its errors are the caller's.
    Raises WaitTimeout, which names what was waited for.
    """
    pause = FIRST_PAUSE
    while True:
        value = probe()
        if value:
            return value
        left = deadline.left
        if left <= 0:
            raise WaitTimeout(f"Waited {deadline.seconds:g} s for {what}.", elapsed=round(deadline.elapsed, 3))
        deadline.clock.sleep(min(pause, left))
        pause = min(pause * 1.5, LONGEST_PAUSE)


def watch(
    look: Callable[[], T], problem: Callable[[T], str], seen: Callable[[T], dict[str, Any]], deadline: Deadline
) -> dict[str, Any]:
    """Looks until there is no problem any more; returns the result of a module that does nothing else.

    problem: in words, what is wrong with what was looked at, empty if nothing is. seen: what the module tells of it.
    Raises WaitTimeout, with the problem and the same details as the result has.
    """
    last: list[T] = []

    def well() -> bool:
        last[:] = [look()]
        return not problem(last[0])

    try:
        wait_for(well, deadline, "")
    except WaitTimeout as exc:
        raise WaitTimeout(problem(last[0]), elapsed=round(deadline.elapsed, 3), **seen(last[0])) from exc
    return {"changed": False, "elapsed": round(deadline.elapsed, 3), **seen(last[0])}
