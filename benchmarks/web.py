"""Asks a guest over HTTP as fast as it answers, and tells how many answers a second came, and when."""

from __future__ import annotations

import http.client
import threading
import time
import typing


class Answers(typing.NamedTuple):
    """Answers per second before, during and after something."""

    before: float
    during: float
    after: float


class Load(threading.Thread):
    """One client that asks again as soon as it has an answer, over one connection for as long as that lives."""

    #: Seconds until a request counts as lost. The guest may be stopped for long.
    TIMEOUT = 5.0

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._over = threading.Event()
        self._times: list[float] = []

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=self.TIMEOUT)
        while not self._over.is_set():
            try:
                connection.request("GET", "/boot_id")
                connection.getresponse().read()
                self._times.append(time.monotonic())
            except (OSError, http.client.HTTPException):
                connection.close()
                # Nobody listens, perhaps: no use in asking a thousand times a second.
                self._over.wait(0.05)
        connection.close()

    def end(self) -> None:
        """Stop asking."""
        self._over.set()
        self.join(2 * self.TIMEOUT)

    def answers(self, began: float, ended: float) -> Answers:
        """Return the rates before, during and after the time from `began` to `ended` (time.monotonic)."""
        first, last = (self._times[0], self._times[-1]) if self._times else (began, ended)
        spans = ((first, began), (began, ended), (ended, last))
        return Answers(*(self._rate(*span) for span in spans))

    def _rate(self, began: float, ended: float) -> float:
        inside = sum(began < at <= ended for at in self._times)
        return round(inside / (ended - began), 2) if ended > began else 0.0
