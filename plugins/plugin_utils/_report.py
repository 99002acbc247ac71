# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""What a run did: for the person who watches it, for files, and for the machine's own record."""

from __future__ import annotations

from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils._moments import iso
from ansible_collections.vmbeam.xen.plugins.plugin_utils._text import duration, text_table


def account(
    guest: dict[str, Any], outcome: dict[str, Any], ordered: float, finished: float, session: int | None
) -> dict[str, Any]:
    """Return what a run did with a guest of its plan, without how that ended.

    `outcome` is the result of module guest_migrate, or whatever came in its place; `ordered` and `finished` are in
    seconds since the epoch; `session` is that of zero-copy.
    """
    told = outcome.get("migration") or {}
    return {
        "guest": guest["name"],
        **{key: guest[key] for key in ("type", "memory_mb", "vcpus", "strategy")},
        "started": ordered,
        "finished": finished,
        "strategy_reason": guest["strategy_reason"],
        **{key: told.get(key) for key in ("seconds", "downtime_seconds", "bytes")},
        "phases": told.get("phases") or {},
        "memory": told.get("memory"),
        "session": session,
        "repairs": told.get("repairs") or [],
    }


def make_report(
    plan: dict[str, Any],
    phases: list[dict[str, Any]],
    results: list[dict[str, Any]],
    failure: dict[str, Any],
    now: float,
) -> dict[str, Any]:
    """Return the account of a run that ends now.

    `phases` are {phase, at}, each lasting until the next one; `results` are the guests' accounts, whose
    `started` and `finished` are seconds since the epoch too; `failure` is empty unless the run failed. All moments
    are the controller's, so that they can be compared between machines.
    """
    ends = [float(phase["at"]) for phase in phases[1:]] + [float(now)]
    lasted = [
        {
            "phase": phase["phase"],
            "seconds": round(end - float(phase["at"]), 1),
            "started": iso(phase["at"]),
            "finished": iso(end),
        }
        for phase, end in zip(phases, ends, strict=True)
    ]
    back = [result["guest"] for result in results if result["result"] == "moved back"]
    moved = [result for result in results if result["result"] == "moved" and result["guest"] not in back]
    downtimes = [result["downtime_seconds"] for result in moved if result.get("downtime_seconds") is not None]
    return {
        "machine": plan["machine"],
        "action": plan["action"],
        "outcome": "failed" if failure else "completed",
        "source": plan["source"]["name"],
        "destination": plan["destination"]["name"],
        "generation": plan["destination"]["generation"],
        "started": iso(phases[0]["at"]),
        "finished": iso(now),
        "seconds": round(float(now) - float(phases[0]["at"]), 1),
        "phases": lasted,
        "guests": [_with_moments(result) for result in results],
        "guests_moved": len(moved),
        "guests_moved_back": back,
        "guests_left": [guest["name"] for guest in plan["guests"] if guest["step"] == "leave"],
        "longest_downtime_seconds": max(downtimes, default=None),
        "failure": failure or None,
    }


def report_text(report: dict[str, Any]) -> list[str]:
    """Return the account as lines for a person."""
    lines = [
        f"{report['machine']}: {report['outcome']} in {duration(report['seconds'])}: "
        f"{report['source']} -> {report['destination']} (generation {report['generation']}), "
        f"{report['guests_moved']} guest(s) moved"
    ]
    if report["guests_left"]:
        lines += ["", f"{report['source']} is kept for {', '.join(report['guests_left'])}"]
    if report["guests"]:
        rows = [
            {
                "guest": guest["guest"],
                "type": guest["type"],
                "memory": f"{guest['memory_mb']} MiB",
                "strategy": guest["strategy"],
                "result": guest["result"],
                "seconds": _number(guest.get("seconds")),
                "downtime": _number(guest.get("downtime_seconds")),
            }
            for guest in report["guests"]
        ]
        lines += [
            "",
            *text_table(rows, ["guest", "type", "memory", "strategy", "result", "seconds", "downtime"]),
        ]
    lines += ["", *text_table(report["phases"], ["phase", "seconds"])]
    return lines


def record_run(
    state: dict[str, Any], plan: dict[str, Any], report: dict[str, Any] | None, started: float, limit: int
) -> dict[str, Any]:
    """Return the machine's record with this run in it: as the present one, or in the history once it has a report.

    A present run in the record says that a run was cut; `guests` are those that it was to move. `limit`
    is how many runs the history keeps.
    """
    history = list(state.get("history") or [])
    run: dict[str, Any] | None
    if report is None:
        run = {
            "started": iso(started),
            "action": plan["action"],
            "source": plan["source"]["name"],
            "destination": plan["destination"]["name"],
            "generation": plan["destination"]["generation"],
            "guests": [guest["name"] for guest in plan["guests"]],
            "strategies": {guest["name"]: guest["strategy"] for guest in plan["guests"]},
            # Once it is shut down, nothing else tells that such a guest is to be started in the destination.
            "cold": [guest for guest in plan["guests"] if guest["step"] == "move" and guest["strategy"] == "cold"],
        }
    else:
        history.append(report)
        # A failed run that was not undone is still to be continued. So is one whose guest runs nowhere: nothing else
        # tells that this guest is to be started.
        failure = report["failure"] or {}
        down = any(guest["location"] == "nowhere" for guest in failure.get("guests") or [])
        run = _unfinished(state.get("run"), report) if failure and (down or not failure.get("undone")) else None
    return {"machine": plan["machine"], "run": run, "history": history[-limit:]}


def _unfinished(run: dict[str, Any] | None, report: dict[str, Any]) -> dict[str, Any] | None:
    """Return a run without the guests that it started anew: from now on they may be stopped on purpose."""
    if run is None:
        return None
    arrived = {guest["guest"] for guest in report["guests"] if guest["result"] in ("moved", "was there")}
    there = arrived - set(report["guests_moved_back"])
    return dict(run, cold=[guest for guest in run.get("cold") or [] if guest["name"] not in there])


def close_cut_run(state: dict[str, Any], now: float, limit: int) -> dict[str, Any]:
    """Return the machine's record after a run was found to be done, though it was cut before it could say so."""
    run = dict(state["run"], outcome="completed", finished=iso(now), note="completed; cut before it was recorded")
    return dict(state, run=None, history=[*(state.get("history") or []), run][-limit:])


def _with_moments(result: dict[str, Any]) -> dict[str, Any]:
    moments = {key: result.get(key) for key in ("started", "finished")}
    return {**result, **{key: None if value is None else iso(value) for key, value in moments.items()}}


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
