"""What a guest says of itself over HTTP (lab/guests/README.md), on a port of this computer."""

from __future__ import annotations

import http.client
import json
import typing
import urllib.request

from . import wait
from .errors import LabError


def _request(port: int, path: str, body: bytes | None = None) -> bytes:
    # A POST if there is a body.
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", body, timeout=10) as answer:
        return answer.read()


def await_status(
    port: int,
    wanted: typing.Callable[[dict], bool] = bool,
    *,
    timeout: float,
    what: str = "answer",
    control: tuple[str, str] | None = None,
) -> dict:
    """Return the guest's first status that is `wanted`.

    :param control: (name, word) to post before each look, until it is in force
    :raises LabError: none came in `timeout` seconds
    """
    last: dict | None = None

    def ask() -> dict | None:
        nonlocal last
        try:
            if control:
                _request(port, f"/control/{control[0]}", control[1].encode())
            last = json.loads(_request(port, "/status"))
        except (OSError, ValueError, http.client.HTTPException):
            return None
        return last if wanted(last) else None

    return wait.until(
        ask,
        timeout=timeout,
        failure=lambda: LabError(f"guest: no {what} in {timeout:.0f} s; its last status: {last}"),
    )


def await_start(port: int, timeout: float, *others: str) -> dict:
    """Return the status of a guest that boots, once its memory writer, its ticker and `others` have reported."""
    parts = ("memory", "ticks", *others)
    return await_status(port, lambda status: all(status[part] for part in parts), timeout=timeout, what="start")


def set_rate(port: int, rate: int, timeout: float) -> None:
    """Have the guest's memory writer rewrite so many pages a second."""
    await_status(
        port,
        lambda status: status["memory"]["rate"] == rate,
        timeout=timeout,
        what=f"rate of {rate} pages/s",
        control=("memory-rate", str(rate)),
    )


def await_rounds(port: int, before: dict, timeout: float, what: str = "full check of memory") -> dict:
    """Return a status after the memory writer has verified each of its pages since the status `before`."""
    return await_status(
        port,
        lambda status: status["memory"]["round"] >= before["memory"]["round"] + 2,
        timeout=timeout,
        what=what,
    )


def reset_ticks(port: int, word: str, timeout: float = 120) -> dict:
    """Begin a new measurement of the guest's pauses, named by a `word` not used before; return its status."""
    return await_status(
        port,
        lambda status: status["ticks"]["reset"] == word,
        timeout=timeout,
        what="new measurement of pauses",
        control=("ticks-reset", word),
    )


def settled_status(port: int, timeout: float) -> dict:
    """Return a status whose ticks are newer than this call: they are published once a second."""
    first = await_status(port, timeout=timeout)
    return await_status(
        port, lambda status: status["ticks"]["updated"] >= first["uptime"], timeout=timeout, what="tick"
    )


def longest_gap(status: dict) -> float:
    """Return the longest time between two ticks in seconds, on the clock that saw the longest."""
    return max(status["ticks"]["longest_gap_ms"].values()) / 1000


def trouble(before: dict, after: dict) -> str | None:
    """Return what a guest lost between two statuses, None if nothing."""
    if after["boot_id"] != before["boot_id"]:
        return f"another instance: boot id {after['boot_id']}, was {before['boot_id']}"
    if after["uptime"] < before["uptime"]:
        return f"went back in time: up {after['uptime']} s, was {before['uptime']} s"
    memory, disk = after["memory"], after["disk"]
    if memory["errors"]:
        return f"{memory['errors']} memory errors, the last: {memory['last_error']}"
    if disk and (disk["write_errors"] or disk["readback_errors"] or disk["foreign_records"]):
        return f"disk errors: {disk}"
    return None


def lost(before: dict, after: dict) -> str | None:
    """Return what a guest lost between two statuses, or what does not go on in it; None if all is well."""
    problem = trouble(before, after)
    if problem:
        return problem
    if after["memory"]["verified"] <= before["memory"]["verified"]:
        return f"its memory is not verified any more: {after['memory']}"
    if after["disk"]["sequence"] <= before["disk"]["sequence"]:
        return f"it does not write to its disk any more: {after['disk']}"
    return None
