# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A run on seven machines, each of which ended in another way: what Ansible knows of them at its end."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.vmbeam.xen.plugins.filter.rejuvenation import FilterModule as RejuvenationFilters
from ansible_collections.vmbeam.xen.plugins.filter.report import FilterModule as ReportFilters

FILTERS = {**RejuvenationFilters().filters(), **ReportFilters().filters()}
STARTED = 1_700_000_000.0  # 2023-11-14T22:13:20Z
FINISHED = STARTED + 900
RUN = {"id": "20231114T221320Z-alice-ops1-4711", "operator": "alice", "controller": "ops1", "check_mode": False}
#: Names and messages that would do harm where they are not taken as text.
HOSTILE = (
    "<script>document.title='owned'</script><img src=http://attacker.invalid/x onerror=\"document.title='owned'\">"
)


def plan_of(machine: str, action: str = "rejuvenate", **values: Any) -> dict[str, Any]:
    return {
        "machine": machine,
        "action": action,
        "reason": f"{machine}-a (generation 1) is 9.0 d old, at or over the limit of 7.0 d",
        "source": {"name": f"{machine}-a"},
        "destination": {"name": f"{machine}-b", "generation": 2},
        "guests": [],
        "problems": [],
        **values,
    }


def began_at(moment: float) -> list[dict[str, Any]]:
    """Return what the role notes of its phases as soon as it begins."""
    return [{"phase": "observe and plan", "at": moment}]


def account(guest: str, started: float, downtime: float | None, **values: Any) -> dict[str, Any]:
    return {
        "guest": guest,
        "type": "pvh",
        "memory_mb": 1024,
        "vcpus": 2,
        "strategy": "zero_copy",
        "strategy_reason": "both hypervisors can",
        "result": "moved",
        "started": started,
        "finished": started + 42,
        "seconds": 21.5,
        "downtime_seconds": downtime,
        "bytes": 123456,
        "phases": {"connect": 4.0, "memory": 12.5, "state": 1.0, "hand_over": 0.2, "start": 0.8, "clean_up": 3.0},
        "memory": None,
        "repairs": [],
        **values,
    }


def report_of(
    plan: dict[str, Any], began: float, guests: list[dict[str, Any]], failure: dict[str, Any] | None = None
) -> dict[str, Any]:
    names = ["observe and plan", "start m-b", *(f"move {guest['guest']}" for guest in guests)]
    starts = [began, began + 15, *(guest["started"] - 8 for guest in guests)]
    end = (guests[-1]["finished"] if guests else began + 90) + 1
    phases = [{"phase": name, "at": at} for name, at in zip(names, starts, strict=True)]
    phases.append({"phase": "recover" if failure else "retire m-a", "at": end})
    return FILTERS["rejuvenation_report"](plan, phases, guests, failure or {}, end + 28)


def completed(machine: str, began: float) -> dict[str, Any]:
    """Return what is known of a machine whose four guests were moved."""
    plan = plan_of(machine)
    names = ["web1", "web2", "db1", "mail1"]
    downtimes = [0.412, 0.38, 1.27, None]
    guests = [
        account(name, began + 70 + 60 * number, downtime)
        for number, (name, downtime) in enumerate(zip(names, downtimes, strict=True))
    ]
    report = report_of(plan, began, guests)
    return {
        "rejuvenate_phases": began_at(began),
        "rejuvenate_plan": plan,
        "rejuvenate_report": report,
        "rejuvenate_ended": True,
    }


def failed(machine: str, began: float, guest: str, message: str) -> dict[str, Any]:
    """Return what is known of a machine of whose two guests the second one failed."""
    plan = plan_of(machine)
    guests = [
        account("app1", began + 70, 0.51, strategy="suspend", phases={}, seconds=33.0),
        account(
            guest,
            began + 130,
            None,
            result="failed",
            seconds=11.0,
            text=f"{guest}: {message}",
            log_tail=["xc: error: Failed to get types for pfn batch (22 = Invalid argument)", f"libxl: {message}"],
        ),
    ]
    failure = {
        "phase": f"move {guest}",
        "task": "Stop if a guest was not moved",
        "message": message,
        "summary": f"{machine}: stopped in phase 'move {guest}': {message}. Guest app1 is in {machine}-b.",
        "guests": [{"name": "app1", "location": "destination", "state": "blocked"}],
        "undone": False,
    }
    report = report_of(plan, began, guests, failure)
    return {"rejuvenate_phases": began_at(began), "rejuvenate_plan": plan, "rejuvenate_report": report}


@pytest.fixture
def hostvars() -> dict[str, dict[str, Any]]:
    problem = {
        "what": "machine memory",
        "message": "the host hypervisor has 99 MiB too little free memory for m3-b",
        "fix": "give the host VM less memory (vmbeam_host_vm_memory_mb)",
        "needed": 3099,
    }
    memory = {"name": "dom0_available_memory", "unit": "MiB", "direction": "down"}
    xenstore = {"name": "xenstore_nodes", "unit": "count", "direction": "up"}
    aging = {
        "before": [{**memory, "value": 112.4}, {**xenstore, "value": 70123}],
        "after": [{**memory, "value": 655.0}, {**xenstore, "value": 412}, {"name": "uptime", "value": 91.0}],
    }
    fresh = "m4-a (generation 3) is fresh: 2.0 h old, limit 7.0 d, current golden image"
    return {
        "m1": {**completed("m1", STARTED), "rejuvenate_aging": aging},
        "m2": failed("m2", STARTED + 420, HOSTILE, f"the receiver was lost {HOSTILE}"),
        "m3": {"rejuvenate_plan": plan_of("m3", problems=[problem]), "rejuvenate_phases": began_at(STARTED + 800)},
        "m4": {
            "rejuvenate_phases": began_at(STARTED + 810),
            "rejuvenate_plan": plan_of("m4", "skip", reason=fresh),
            "rejuvenate_ended": True,
        },
        "m5": {},
        "m6": {
            "rejuvenate_phases": began_at(STARTED + 800),
            "rejuvenate_image_stat": {"unreachable": True, "msg": "ssh: connect to host m6: No route to host"},
        },
        "m7": {
            "rejuvenate_phases": began_at(STARTED + 800),
            "rejuvenate_image_stat": {"failed": False, "stat": {}},
            "rejuvenate_host_vms": {"failed": True, "msg": "xl cannot reach xenstored"},
        },
    }


@pytest.fixture
def fleet(hostvars) -> dict[str, Any]:
    """The report of the whole run."""
    return FILTERS["rejuvenation_fleet_report"](list(hostvars), hostvars, RUN, FINISHED)
