# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""What a run did on all its machines: one document, whose form is roles/fleet_report/files/report.schema.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils._moments import iso

SCHEMA = 1
#: How a machine's part of a run can end, worst first.
OUTCOMES = ("failed", "unreachable", "refused", "not_touched", "planned", "skipped", "completed")
#: Those that leave nothing to be done.
GOOD = ("completed", "skipped", "planned")

# What the role asks a machine first, in this order: one of these tells why there is no plan.
_FIRST_ANSWERS = (
    "rejuvenate_image_stat",
    "rejuvenate_disk_space",
    "rejuvenate_host_vms",
    "rejuvenate_domains",
    "rejuvenate_state_read",
)
# A machine's report has these keys. All machines of the document have them, so that nobody has to ask.
_NOTHING: dict[str, Any] = {
    "action": None,
    "source": None,
    "destination": None,
    "generation": None,
    "started": None,
    "finished": None,
    "seconds": None,
    "phases": [],
    "guests": [],
    "guests_moved": 0,
    "longest_downtime_seconds": None,
    "failure": None,
}


def fleet_report(
    machines: list[str], hostvars: Mapping[str, Mapping[str, Any]], run: dict[str, Any], now: float
) -> dict[str, Any]:
    """Return the account of a run on `machines` that ends now (seconds since the epoch).

    `hostvars` are Ansible's: of each machine what the role rejuvenate noted, and what a rolling playbook noted of it
    (`rolling_outcome`) and of the run (`rolling_batches`, `rolling_batches_begun` and `rolling_stopped` of localhost).
    `run` says who ran it: {id, operator, controller, check_mode}.
    """
    rolling = hostvars.get("localhost", {})
    begun = _flat(rolling.get("rolling_batches", [])[: int(rolling.get("rolling_batches_begun", 0))])
    stopped = str(rolling.get("rolling_stopped") or "the run ended before it came to this machine")
    accounts = [_account(machine, hostvars[machine], machine in begun, stopped) for machine in machines]
    for account in accounts:
        if run["check_mode"] and account["outcome"] == "completed":
            account["outcome"] = "planned"
    counted = Counter(account["outcome"] for account in accounts)
    downtimes = [
        {"machine": account["machine"], "guest": guest["guest"], "seconds": float(guest["downtime_seconds"])}
        for account in accounts
        for guest in account["guests"]
        if guest["result"] == "moved" and guest.get("downtime_seconds") is not None
    ]
    started = min([now, *(_began(hostvars[machine]) or now for machine in machines)])
    return {
        "schema": SCHEMA,
        "run": {
            "id": run["id"],
            "operator": run["operator"],
            "controller": run["controller"],
            "check_mode": bool(run["check_mode"]),
            "started": iso(started),
            "finished": iso(now),
            "seconds": round(now - started, 1),
            "outcome": "completed" if all(account["outcome"] in GOOD for account in accounts) else "failed",
        },
        "summary": {
            "machines": len(accounts),
            "outcomes": {outcome: counted[outcome] for outcome in OUTCOMES},
            "guests_moved": sum(account["guests_moved"] for account in accounts),
            "guests_failed": sum(guest["result"] == "failed" for account in accounts for guest in account["guests"]),
            "longest_downtime": max(downtimes, key=lambda one: one["seconds"], default=None),
        },
        "machines": accounts,
    }


def _account(machine: str, seen: Mapping[str, Any], begun: bool, stopped: str) -> dict[str, Any]:
    """Return one machine's part of the document."""
    report = seen.get("rejuvenate_report") or {}
    plan = seen.get("rejuvenate_plan") or {}
    outcome, reason = _outcome(seen, report, plan) or (
        ("unreachable", "it stopped answering") if begun else ("not_touched", stopped)
    )
    source = plan.get("source") or {}
    action = "repair" if seen.get("rejuvenate_repairs") else plan.get("action")
    # A machine that is left alone has no destination, though its plan names the free slot.
    destination = (plan.get("destination") or {}) if action in ("rejuvenate", "resume") else {}
    from_plan = {
        "action": action,
        "source": source.get("name"),
        "destination": destination.get("name"),
        "generation": (destination or source).get("generation"),
    }
    return {
        "machine": machine,
        "outcome": outcome,
        "reason": reason,
        "problems": [{key: problem[key] for key in ("what", "message", "fix")} for problem in plan.get("problems", [])],
        **_NOTHING,
        **from_plan,
        **{key: report[key] for key in _NOTHING if key in report},
        "aging": seen.get("rejuvenate_aging"),
    }


def _outcome(seen: Mapping[str, Any], report: dict[str, Any], plan: dict[str, Any]) -> tuple[str, str] | None:
    """Return how a machine's part ended, and why in words; None if the machine says nothing of it."""
    told = seen.get("rolling_outcome") or {}
    repairs = seen.get("rejuvenate_repairs") or {}
    result, why = told.get("result"), str(told.get("reason") or "no reason given")
    if report:
        if report["outcome"] == "completed" and result == "failed":
            return "failed", why
        return report["outcome"], str((report["failure"] or {}).get("summary") or plan["reason"])
    if repairs and repairs["decide"]:
        return "failed", str(repairs["summary"])
    # What keeps a machine from being rejuvenated does not matter to a repair.
    if plan.get("problems") and not repairs:
        return "refused", "; ".join(problem["message"] for problem in plan["problems"])
    if result in ("failed", "skipped"):
        return result, why
    if result in ("done", "fresh", "planned") or "rejuvenate_ended" in seen:
        if repairs:
            return ("completed" if repairs["done"] else "skipped"), str(repairs["summary"])
        return ("skipped" if plan["action"] == "skip" else "planned"), str(plan["reason"])
    if "rejuvenate_phases" in seen:
        return _why_unended(seen, plan)
    return None


def _why_unended(seen: Mapping[str, Any], plan: dict[str, Any]) -> tuple[str, str]:
    """Return why the role began, and neither ended nor reported."""
    if plan:
        return "failed", "it ended without a report; the machine's audit log says what was begun"
    for name in _FIRST_ANSWERS:
        answer = seen.get(name) or {}
        if answer.get("unreachable"):
            return "unreachable", str(answer.get("msg") or "no reason given")
        if answer.get("failed"):
            return "failed", str(answer.get("msg") or "no reason given")
    return "failed", "it ended while it was observed; the run's output says why"


def _began(seen: Mapping[str, Any]) -> float | None:
    phases = seen.get("rejuvenate_phases") or []
    return float(phases[0]["at"]) if phases else None


def _flat(batches: list[list[str]]) -> set[str]:
    return {name for batch in batches for name in batch}
