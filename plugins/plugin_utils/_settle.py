# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""What became of the guests of a batch, judged by what the steps of their move returned.

A task for each guest would cost the controller a process each; so a step is one task for all guests of a batch, and a
guest whom it failed does not keep the others from the next step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils._report import account
from ansible_collections.vmbeam.xen.plugins.plugin_utils._text import failure_reason

_WORDS = {"move": "moved", "back": "moved back"}


def passed(batch: Iterable[Mapping[str, Any]], steps: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the guests of a batch that no step has failed so far. Steps that are not yet done are left out."""
    return [guest for guest in batch if _problem(guest["name"], steps) is None]


def settled(
    batch: Iterable[dict[str, Any]], steps: Mapping[str, Any], sessions: Sequence[Mapping[str, Any]], finished: float
) -> dict[str, list[Any]]:
    """Return the guests' accounts as `results`, and as `in_flight` who may still be on its way.

    `sessions` are those of zero-copy by the guests' places in the batch, `finished` is in seconds since the epoch.
    """
    results: list[dict[str, Any]] = []
    in_flight: list[str] = []
    for place, guest in enumerate(batch):
        name = guest["name"]
        order, migrated = _order(name, steps), _migrated(name, steps)
        session = sessions[place]["session"] if guest["strategy"] == "zero_copy" and order else None
        ordered = order["item"]["ordered"] if order else finished
        result = account(guest, dict(migrated), ordered, finished, session)
        problem = _problem(name, steps)
        if problem is None:
            results.append({**result, "result": _WORDS.get(guest["step"], "was there")})
            continue
        tail = (migrated.get("migration") or {}).get("log_tail") or []
        results.append({**result, "result": "failed", "text": f"{name}: {problem}", "log_tail": tail})
        # Without a result nobody knows whether the migration is still at work: nothing of this guest is undone.
        if order and "location" not in migrated:
            in_flight.append(name)
    return {"results": results, "in_flight": in_flight}


def _order(name: str, steps: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((result for result in steps["migrations"] if result["item"]["name"] == name), None)


def _migrated(name: str, steps: Mapping[str, Any]) -> Mapping[str, Any]:
    # In the background each has a job, whose result counts, unless none could be started.
    jobs = steps.get("jobs") or []
    return next((job for job in jobs if job["item"]["item"]["name"] == name), _order(name, steps) or {})


def _problem(name: str, steps: Mapping[str, Any]) -> str | None:
    if _order(name, steps) is None:
        return f"the guest dom0 of {steps['destination']} stopped to answer while disks were attached"
    migrated = _migrated(name, steps)
    if not _good(migrated) or migrated.get("location") != "destination":
        return str(migrated.get("msg") or "the migration gave no result")
    if (kept := steps.get("kept")) and not _good(kept):
        return f"it has arrived, but nothing more is done, as the machine is not kept reserved: {failure_reason(kept)}"
    for result in steps.get("alive") or []:
        if result["item"] == name and result.get("unreachable"):
            return f"the guest dom0 of {steps['destination']} does not answer"
        if result["item"] == name and not _good(result):
            return failure_reason(result)
    if name in (steps.get("refused") or {}):
        return str(steps["refused"][name])
    for result in steps.get("detached") or []:
        if result["item"]["guest"] == name and not _good(result):
            return failure_reason(result)
    return None


def _good(result: Mapping[str, Any]) -> bool:
    return not result.get("failed") and not result.get("unreachable")
