# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""A channel's throughput: memory of one daemon to memory of the other, as a stream like any other.

What commands send passes pipes too, two more copies on each side and another process to switch to; what that leaves of
the throughput tells vmbeam-channel discard.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

MIB = 1 << 20
#: Bytes of memory at each end: more than caches hold.
SIZE = 64 * MIB
#: Bytes to send before the time counts: the other side has its memory then.
WARM = 8 * MIB


class Supply:
    """Source of a stream, for that many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._memory = memoryview(bytes(range(256)) * (SIZE // 256))
        self._place = self._sent = 0
        self._began: float | None = None
        self._soon: asyncio.Handle | None = None

    def watch(self, readable: Callable[[], None]) -> None:
        def again() -> None:
            # First, because readable() may end in unwatch().
            self._soon = loop.call_soon(again)
            readable()

        loop = asyncio.get_running_loop()
        self._soon = loop.call_soon(again)

    def unwatch(self) -> None:
        if self._soon:
            self._soon.cancel()
            self._soon = None

    def read(self, pieces: tuple[memoryview, ...]) -> int:
        now = time.monotonic()
        if self._began is None and self._sent >= WARM:
            self._began, self._sent = now, 0
        if self._began is not None and now - self._began >= self._seconds:
            return 0
        length = sum(map(len, pieces))
        if self._place + length > SIZE:
            self._place = 0
        for piece in pieces:
            end = self._place + len(piece)
            piece[:] = self._memory[self._place : end]
            self._place = end
        self._sent += length
        return length

    def close(self) -> None:
        self.unwatch()
        self._memory = memoryview(b"")

    def result(self) -> dict[str, float]:
        """What has been sent since it counts, now that the other side has told that it has taken all of it."""
        if self._began is None:
            raise ValueError("measure: nothing was sent")
        seconds = time.monotonic() - self._began
        return {"bytes": self._sent, "seconds": round(seconds, 3), "mib_per_s": round(self._sent / MIB / seconds, 3)}


class Drain:
    """Sink of a stream, which takes everything at once. ended: called when all is taken."""

    def __init__(self, ended: Callable[[], None], taken: Callable[[int], None], _broken: Callable[[], None]) -> None:
        self._ended = ended
        self._taken = taken
        # Filled, so that its pages are there.
        self._memory = memoryview(bytearray(b"x") * SIZE)
        self._place = 0
        self.open = True

    def write(self, pieces: tuple[memoryview, ...]) -> None:
        length = sum(map(len, pieces))
        if self._place + length > SIZE:
            self._place = 0
        for piece in pieces:
            end = self._place + len(piece)
            self._memory[self._place : end] = piece
            self._place = end
        self._taken(length)

    def end(self, then: Callable[[], None]) -> None:
        self.close()
        then()
        self._ended()

    def close(self) -> None:
        self.open = False
        self._memory = memoryview(b"")
