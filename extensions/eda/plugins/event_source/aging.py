# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An event source for ansible-rulebook: machines whose hypervisors have aged, as Prometheus tells."""

from __future__ import annotations

DOCUMENTATION = r"""
short_description: Machines whose hypervisors have aged
description:
  - Asks a Prometheus server, over and over, for machines that are due for rejuvenation, and gives an event for each
    that becomes due. For one that stays due the event is given again after O(repeat_after).
  - One machine is told at a time. ansible-rulebook keeps events while an action runs, so those of one answer would be
    acted on hours later, whatever has become of the machines. The next machine is told once the one before is not due
    any more, or after O(patience), and only if it is due in the answer of that moment.
  - A machine that three answers in a row do not have is not due any more.
  - An event is C(aging), with C(machine), C(indicator), C(reason), C(value) and C(labels).
  - A server that does not answer is asked again at the next turn, with a message in the log.
author:
  - vmbeam contributors (@vmbeam)
options:
  url:
    description: Base URL of the Prometheus server.
    type: str
    required: true
  query:
    description: >-
      Query whose result has an element for each machine that is due. A value of 0 means that it is not.
    type: str
    default: vmbeam_aging_due
  alert:
    description: >-
      Name of an alert to watch for instead of O(query). A machine is due while it is firing.
    type: str
  machine_label:
    description: >-
      Label with the machine's name in the inventory. Where it is missing, the host name in C(instance) is taken.
    type: str
    default: machine
  indicator_label:
    description: Label with the name of the indicator that has aged. Where it is missing the alert's name is taken.
    type: str
    default: indicator
  reason_label:
    description: >-
      Label, or annotation of the alert, that says why in words. Where it is missing words are made.
    type: str
    default: reason
  interval:
    description: Seconds from one question to the next.
    type: float
    default: 60
  timeout:
    description: Seconds that the server may take to answer.
    type: float
    default: 10
  repeat_after:
    description: Seconds after which a machine that is still due is told again; 0 for never.
    type: float
    default: 86400
  patience:
    description: >-
      Seconds for which a machine that was told and stays due, as its rejuvenation takes long or has failed, keeps the
      next one from being told. With 0 each answer may give an event.
    type: float
    default: 7200
  headers:
    description: Further headers of the request, such as C(Authorization).
    type: dict
    default: {}
  ca_file:
    description: File of the certificate authority of the server, if it is not one that the system trusts.
    type: str
"""

EXAMPLES = r"""
- vmbeam.xen.aging:
    url: http://prometheus.example.org:9090
    query: vmbeam_aging_due == 1

- vmbeam.xen.aging:
    url: https://prometheus.example.org
    alert: HypervisorAges
    reason_label: summary
    headers:
      Authorization: "Bearer {{ prometheus_token }}"
"""

import asyncio
import http.client
import json
import logging
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

logger = logging.getLogger(__name__)

#: Bytes of an answer that are read; more is an error.
LIMIT = 16 << 20

#: Answers in a row that a machine has to be missing from: a single scrape that failed is no cure.
GONE_AFTER = 3

# Rulebooks hand words on to playbooks, which would evaluate a template in them.
_NO_BRACES = str.maketrans("{}", "()")

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class BadAnswer(Exception):
    """The server's answer is not of the form that Prometheus gives."""


@dataclass(frozen=True)
class Settings:
    """The arguments of the source, as DOCUMENTATION describes them. Raises ValueError for those that cannot be used."""

    url: str
    query: str = "vmbeam_aging_due"
    alert: str | None = None
    machine_label: str = "machine"
    indicator_label: str = "indicator"
    reason_label: str = "reason"
    interval: float = 60
    timeout: float = 10
    repeat_after: float = 86400
    patience: float = 7200
    headers: dict[str, str] = field(default_factory=dict)
    ca_file: str | None = None

    @classmethod
    def of(cls, args: dict[str, Any]) -> Settings:
        """Return the settings in the arguments that ansible-rulebook passes, which adds some of its own."""
        known = {item.name for item in fields(cls)}
        wrong = [name for name in args if name not in known and not name.startswith("eda_")]
        if wrong:
            raise ValueError(f"aging: unknown argument {', '.join(sorted(wrong))}")
        if not str(args.get("url", "")).startswith(("http://", "https://")):
            raise ValueError("aging: url must be the base URL of a Prometheus server (http:// or https://)")
        if "query" in args and "alert" in args:
            raise ValueError("aging: give query or alert, not both")
        found = cls(**{name: args[name] for name in known if name in args})
        if not (float(found.interval) > 0 and float(found.timeout) > 0):
            raise ValueError("aging: interval and timeout must be greater than 0")
        if not (float(found.repeat_after) >= 0 and float(found.patience) >= 0):
            raise ValueError("aging: repeat_after and patience must not be less than 0")
        return found

    @property
    def address(self) -> str:
        """The URL that has the answer."""
        base = self.url.rstrip("/")
        if self.alert:
            return f"{base}/api/v1/alerts"
        return f"{base}/api/v1/query?{urllib.parse.urlencode({'query': self.query})}"


def fetch(settings: Settings) -> Any:
    """Return the data of Prometheus's answer.

    :raises OSError: no connection, no answer in time, or one that is an error
    :raises http.client.HTTPException: it is cut, or not HTTP
    :raises BadAnswer: it is not Prometheus's
    """
    context = ssl.create_default_context(cafile=settings.ca_file) if settings.address.startswith("https") else None
    # The scheme was checked.
    request = urllib.request.Request(settings.address, headers=settings.headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=float(settings.timeout), context=context) as response:  # noqa: S310
            body = response.read(LIMIT + 1)
    except urllib.error.HTTPError as exc:
        if exc.code != 400:
            raise
        # Prometheus refuses a query so, and says in the answer why.
        body = exc.read(LIMIT + 1)
    if len(body) > LIMIT:
        raise BadAnswer(f"more than {LIMIT} bytes")
    try:
        answer = json.loads(body)
        if answer["status"] != "success":
            raise BadAnswer(f"{answer.get('errorType')}: {answer.get('error')}")
        return answer["data"]
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise BadAnswer(f"not an answer of Prometheus: {exc!r}") from exc


def due(data: Any, settings: Settings) -> list[dict[str, Any]]:
    """Return the machines that are due, each as the event tells it; one of several reasons stands for a machine.

    :param data: data of the answer of Prometheus, of a query or of its alerts
    :raises BadAnswer: it has another form
    """
    try:
        if settings.alert:
            firing = [
                alert
                for alert in data["alerts"]
                if alert["state"] == "firing" and alert["labels"].get("alertname") == settings.alert
            ]
            found = [(alert["labels"], alert.get("annotations") or {}, alert.get("value")) for alert in firing]
        elif data["resultType"] == "vector":
            found = [(element["metric"], {}, element["value"][1]) for element in data["result"]]
            found = [(labels, notes, value) for labels, notes, value in found if float(value) != 0]
        else:
            raise BadAnswer(f"the query gives a {data['resultType']}, not a vector")
        machines: dict[str, dict[str, Any]] = {}
        for labels, notes, value in found:
            event = _event(labels, notes, value, settings)
            if event:
                machines.setdefault(event["machine"], event)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as exc:
        raise BadAnswer(f"not an answer of Prometheus: {exc!r}") from exc
    return list(machines.values())


def _event(labels: dict[str, str], notes: dict[str, str], value: Any, settings: Settings) -> dict[str, Any] | None:
    machine = labels.get(settings.machine_label) or labels.get("instance", "").rsplit(":", 1)[0]
    # It becomes a pattern of hosts, which could name many.
    if not NAME.fullmatch(machine):
        logger.warning("aging: neither label %s nor instance names a machine in %s", settings.machine_label, labels)
        return None
    indicator = labels.get(settings.indicator_label) or settings.alert or ""
    reason = notes.get(settings.reason_label) or labels.get(settings.reason_label)
    reason = reason or f"{indicator or settings.query} of {machine}: {value}"
    return {
        "machine": machine,
        "indicator": indicator.translate(_NO_BRACES),
        "reason": reason.translate(_NO_BRACES),
        "value": value,
        "labels": dict(labels),
    }


class Watch:
    """Remembers who was told, so that each becomes an event once and not at every turn, one after the other."""

    def __init__(self, repeat_after: float, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._repeat_after = repeat_after
        self._patience = patience
        self._clock = clock
        self._told: dict[str, float] = {}
        self._missed: dict[str, int] = {}

    def news(self, machines: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
        """Return the one of the machines that are due now of which an event is to be given, if there is one."""
        now, due_now = self._clock(), {found["machine"]: found for found in machines}
        self._missed = {name: 0 if name in due_now else self._missed.get(name, 0) + 1 for name in self._told}
        self._told = {name: at for name, at in self._told.items() if self._missed[name] < GONE_AFTER}
        if any(now - at < self._patience for at in self._told.values()):
            return None
        for name, found in due_now.items():
            if name not in self._told or (self._repeat_after and now - self._told[name] >= self._repeat_after):
                self._told[name] = now
                return found
        return None


async def main(queue: asyncio.Queue[Any], args: dict[str, Any]) -> None:
    """Put events into the queue until it is cancelled. Raises ValueError for arguments that cannot be used."""
    settings = Settings.of(args)
    watch = Watch(float(settings.repeat_after), float(settings.patience))
    while True:
        try:
            machines = due(await asyncio.to_thread(fetch, settings), settings)
        except (OSError, http.client.HTTPException, BadAnswer) as exc:
            # Neither news nor the end of them: who was due counts as due still.
            logger.warning("aging: %s: %s", settings.url, exc)
        else:
            machine = watch.news(machines)
            if machine:
                await queue.put({"aging": machine})
        await asyncio.sleep(float(settings.interval))


if __name__ == "__main__":
    # By hand: aging.py URL [QUERY]; prints events.
    import sys

    class Printer(asyncio.Queue[Any]):
        """Takes the queue's place."""

        async def put(self, item: Any) -> None:
            """Print an event."""
            print(json.dumps(item), flush=True)  # noqa: T201

    asyncio.run(main(Printer(), dict(zip(("url", "query"), sys.argv[1:], strict=False))))
