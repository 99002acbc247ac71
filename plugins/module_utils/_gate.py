# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Whether a gate holds: each function tries once, and returns in words why it does not, or an empty text."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from ansible_collections.vmbeam.xen.plugins.module_utils import _process
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import VmbeamError

# Gets a URL within so many seconds: the status, -1 if there was no answer, and the body or, without answer, why.
Get = Callable[[str, float], tuple[int, str]]

# Seconds that one attempt may take over the network; the next one may do.
ATTEMPT = 10.0


def command(argv: Sequence[str], left: float) -> str:
    """A command, which may take all the time that is left."""
    try:
        _process.run(argv, left).check()
    except VmbeamError as exc:
        return exc.message
    return ""


def tcp(address: str, port: int, left: float) -> str:
    try:
        socket.create_connection((address, port), min(ATTEMPT, left)).close()
    except OSError as exc:
        return f"{address} port {port} takes no connection: {exc}"
    return ""


def http(get: Get, url: str, wanted: Sequence[int], left: float) -> str:
    status, said = get(url, min(ATTEMPT, left))
    if status in wanted:
        return ""
    return f"{url} gives no answer: {said}" if status < 0 else f"{url} answers with status {status}"


def metrics(get: Get, url: str, query: str, least: float | None, most: float | None, left: float) -> str:
    address = f"{url.rstrip('/')}/api/v1/query?query={quote(query)}"
    status, said = get(address, min(ATTEMPT, left))
    try:
        answer = json.loads(said)
        return metric_problem(answer, least, most)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError):
        return f"{url} gives no answer of a Prometheus: {f'status {status}' if status >= 0 else said}"


def metric_problem(response: Mapping[str, Any], least: Any = None, most: Any = None) -> str:
    """What is wrong with the answer of a Prometheus query, empty if each of its samples is within bounds.

    An answer without a sample is wrong, too: a comparison in the query leaves none if it does not hold.
    """
    if response.get("status") != "success":
        return f"the query failed: {response.get('error') or 'no answer'}"
    data = response.get("data") or {}
    kind, result = data.get("resultType"), data.get("result") or []
    if kind == "scalar":
        result = [{"metric": {}, "value": result}]
    elif kind != "vector":
        return f"the query returns a {kind}; it has to return a vector or a scalar"
    if not result:
        return "the query returns no sample"
    for sample in result:
        value = float(sample["value"][1])
        nan = math.isnan(value)  # out of any bounds
        low = least is not None and (nan or value < float(least))
        high = most is not None and (nan or value > float(most))
        if low or high:
            bounds = " and ".join(
                text for text, given in ((f"at least {least}", least), (f"at most {most}", most)) if given is not None
            )
            return f"{sample.get('metric') or 'the result'} is {value:g}, wanted {bounds}"
    return ""
