# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""How long a plan will take, by what the machine's earlier runs took."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

# These take time in proportion to the guest's memory.
COPYING = ("precopy", "suspend")


def estimate(plan: dict[str, Any], history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return {seconds, parts, guests, runs, unknown}, times in seconds, each the median of earlier runs.

    `history` are reports of runs of this machine; only what succeeded counts. `parts` are {part, seconds}, one for
    each phase that the plan will have; `guests` has {seconds, downtime_seconds} by name. What no run tells
    is None, its part is named in `unknown`, and then so is the sum.
    """
    runs = [run for run in history if run.get("outcome") == "completed" and run.get("phases")]
    guests = {
        guest["name"]: {key: _of_guest(guest, key, history) for key in ("seconds", "downtime_seconds")}
        for guest in plan["guests"]
        if guest["step"] in ("move", "finish")
    }
    overhead = _median(seconds for run in runs for seconds in _overheads(run))
    parts = {"observe and plan": _of_phase("observe and plan", runs)}
    if plan["destination"]["start"]:
        parts[f"start {plan['destination']['name']}"] = _of_phase("start ", runs)
    for batch in plan["batches"]:
        parts[f"move {', '.join(batch)}"] = total([overhead, _longest([guests[name]["seconds"] for name in batch])])
    parts[f"retire {plan['source']['name']}"] = _of_phase("retire ", runs)
    unknown = [part for part, seconds in parts.items() if seconds is None]
    return {
        "seconds": total(list(parts.values())),
        "parts": [{"part": part, "seconds": seconds} for part, seconds in parts.items()],
        "guests": guests,
        "runs": len(runs),
        "unknown": unknown,
    }


def _of_phase(beginning: str, runs: list[dict[str, Any]]) -> float | None:
    return _median(phase["seconds"] for run in runs for phase in run["phases"] if phase["phase"].startswith(beginning))


def _overheads(run: dict[str, Any]) -> Iterable[float]:
    """What moving a batch took beside the migrations: disks, gates."""
    took = {guest["guest"]: guest.get("seconds") for guest in run.get("guests") or []}
    for phase in run["phases"]:
        if phase["phase"].startswith("move "):
            longest = _longest([took.get(name) for name in phase["phase"].removeprefix("move ").split(", ")])
            if longest is not None:
                yield max(0.0, phase["seconds"] - longest)


def _of_guest(guest: dict[str, Any], key: str, history: list[dict[str, Any]]) -> float | None:
    """What the guest took with its strategy, else what others did, in proportion to memory if that is copied."""
    moved = [
        account
        for run in history
        for account in run.get("guests") or []
        if isinstance(account, dict)
        and account.get("result") == "moved"
        and account.get("strategy") == guest["strategy"]
        and account.get(key) is not None
    ]
    own = [float(account[key]) for account in moved if account["guest"] == guest["name"]]
    if own:
        return _median(own)
    if guest["strategy"] not in COPYING:
        return _median(float(account[key]) for account in moved)
    return _median(
        float(account[key]) / account["memory_mb"] * guest["memory_mb"] for account in moved if account.get("memory_mb")
    )


def total(values: Sequence[float | None]) -> float | None:
    """Return the sum of times, None if one of them is not known."""
    known = [value for value in values if value is not None]
    return round(sum(known), 1) if len(known) == len(values) else None


def _longest(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return round(statistics.median(found), 1) if found else None
