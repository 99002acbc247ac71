# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan of a whole run, made of what the run's parts noted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.vmbeam.xen.plugins.filter.rolling import FilterModule
from observed import NOW, dom0, guest, observe
from observed import plan as machine_plan

FILTERS = FilterModule().filters()
SCHEMA = json.loads(
    (Path(__file__).resolve().parents[2] / "roles" / "rolling" / "files" / "plan.schema.json").read_text()
)
ABOUT = {"run_id": "night", "lock_owner": "me", "controller": "c1", "order": "inventory", "forks": 5, "now": NOW}
HISTORY = [
    {
        "outcome": "completed",
        "phases": [
            {"phase": "observe and plan", "seconds": 10.0},
            {"phase": "start m1-b", "seconds": 100.0},
            {"phase": "move web1", "seconds": 30.0},
            {"phase": "retire m1-a", "seconds": 20.0},
        ],
        "guests": [
            {
                "guest": "web1",
                "result": "moved",
                "strategy": "precopy",
                "seconds": 25.0,
                "downtime_seconds": 0.5,
                "memory_mb": 128,
            }
        ],
    }
]


def machine(name: str, history: Any = HISTORY, **settings: Any) -> dict[str, Any]:
    """The facts of a machine whose plan is the role's own."""
    observed = observe(machine=name, state={"history": history}, guest_dom0s={"a": dom0(guest("web1"))})
    made = machine_plan(observed, **settings)
    outcome = FILTERS["rolling_outcome"](made, False, {})
    if made["problems"]:
        outcome["result"] = "failed"
    return {"rejuvenate_plan": made, "rolling_outcome": outcome}


def fleet(batches: list[list[str]], facts: dict[str, Any], allowed: int = 0, **about: Any) -> dict[str, Any]:
    run = {"rolling_batches": batches, "rolling_budget": allowed, "rolling_left_out": {}}
    made = FILTERS["rolling_plan"](run, facts, {**ABOUT, **about})
    jsonschema.validate(made, SCHEMA)
    return made


def outcomes(made: dict[str, Any]) -> dict[str, tuple[str, str | None]]:
    return {one["machine"]: (one["outcome"], one["cause"]) for one in made["machines"]}


def test_totals_and_times_by_earlier_runs():
    facts = {name: machine(name) for name in ("m1", "m2", "m3")}
    made = fleet([["batch-1", "m1"], ["batch-2", "m2", "m3"]], facts)
    assert [batch["machines"] for batch in made["batches"]] == [["m1"], ["m2", "m3"]]
    assert [batch["begins_after_seconds"] for batch in made["batches"]] == [0.0, 160.0]
    # Machines of one batch go together.
    assert made["totals"]["seconds"] == 320.0
    assert made["totals"]["guests"] == 3
    assert made["totals"]["memory_mb"] == made["totals"]["memory_copied_mb"] == 384
    assert made["totals"]["strategies"] == {"precopy": {"guests": 3, "memory_mb": 384}}
    assert made["machines"][0]["longest_downtime_seconds"] == 0.5
    assert made["machines"][0]["destination"] == "m1-b"


def test_a_guest_that_moved_before_a_run_was_cut_does_not_move_again():
    facts = {"m1": machine("m1")}
    facts["m1"]["rejuvenate_plan"]["guests"][0]["step"] = "finish"
    made = fleet([["m1"]], facts)
    assert outcomes(made) == {"m1": ("rejuvenate", None)}
    assert (made["totals"]["guests"], made["totals"]["memory_copied_mb"], made["totals"]["strategies"]) == (0, 0, {})
    assert [one["step"] for one in made["machines"][0]["guests"]] == ["finish"]


def test_another_role_that_is_rolled_makes_no_plan_and_is_of_unknown_time():
    facts = {"m1": {"rolling_outcome": {"result": "planned", "reason": ""}}, "m2": machine("m2")}
    made = fleet([["m1"], ["m2"]], facts)
    assert outcomes(made) == {"m1": ("rejuvenate", None), "m2": ("rejuvenate", None)}
    assert made["totals"]["machines_of_unknown_time"] == ["m1"]
    assert [batch["seconds"] for batch in made["batches"]] == [None, 160.0]


@pytest.mark.parametrize(("forks", "seconds"), [(3, 160.0), (2, 320.0), (1, 480.0)])
def test_no_more_machines_go_together_than_there_are_forks(forks, seconds):
    facts = {name: machine(name) for name in ("m1", "m2", "m3")}
    assert fleet([["m1", "m2", "m3"]], facts, forks=forks)["totals"]["seconds"] == seconds


def test_machines_of_one_anti_affinity_group_go_one_after_the_other():
    facts = {name: machine(name, anti_affinity=[{"name": "web", "guests": ["web1"]}]) for name in ("m1", "m2")}
    made = fleet([["m1", "m2"]], facts)
    assert [one["turn"] for one in made["machines"]] == [0, 1]
    assert made["totals"]["seconds"] == 10 + 2 * 150


def test_a_time_that_no_run_tells_is_unknown_and_so_is_what_comes_after():
    facts = {"m1": machine("m1", history=[]), "m2": machine("m2")}
    made = fleet([["m1"], ["m2"]], facts)
    assert [batch["seconds"] for batch in made["batches"]] == [None, 160.0]
    assert made["batches"][1]["begins_after_seconds"] is None
    assert made["totals"]["seconds"] is None
    assert made["totals"]["machines_of_unknown_time"] == ["m1"]
    assert "Estimated time: unknown, as no earlier run tells it of m1" in FILTERS["rolling_plan_text"](made)
    assert FILTERS["rolling_plan_objections"](made, "unknown_time") == ["No earlier run tells how long it takes: m1"]


def test_machines_are_left_out_because_of_guests_or_windows():
    pinned = {"pinned_guests": ["web1"], "unmovable_policy": "skip_host"}
    closed = {"rolling_outcome": {"result": "skipped", "reason": "freeze: from"}}
    made = fleet(
        [["m1", "m2", "m3"]], {"m1": machine("m1", **pinned), "m2": closed, "m3": machine("m3", max_age=10**9)}
    )
    assert outcomes(made) == {"m1": ("left_out", "guests"), "m2": ("left_out", "window"), "m3": ("fresh", None)}
    assert made["totals"]["guests"] == 0
    assert made["totals"]["seconds"] == 0.0
    assert FILTERS["rolling_plan_objections"](made, ["refused", "stop"]) == []
    first, second = FILTERS["rolling_plan_objections"](made, ["left_out"])
    assert "vmbeam_pinned_guests" in first
    assert second == "m2 would be left out: freeze: from"


def test_a_window_that_closes_before_a_later_batch_leaves_its_machines_out():
    # NOW is a Tuesday, 22:13 UTC; the second batch begins 160 s later.
    calendar = {
        "windows": [{"from": "22:00", "to": "22:15"}],
        "blackouts": [],
        "margin": 0,
        "timezone": "UTC",
    }
    facts = {name: {**machine(name), "rolling_calendar": calendar} for name in ("m1", "m2")}
    made = fleet([["m1"], ["m2"]], facts)
    assert outcomes(made) == {"m1": ("rejuvenate", None), "m2": ("left_out", "window")}
    assert made["machines"][1]["reason"].startswith("when its turn comes: outside of its maintenance window")


def test_failures_that_are_foreseen_use_up_the_budget():
    refused = machine("m2", strategy="zero_copy", pinned_guests=["web1"])
    facts = {"m1": {}, "m2": refused, "m3": machine("m3"), "m4": machine("m4")}
    batches = [["m1", "m3"], ["m2"], ["m4"]]
    within = fleet(batches, facts, allowed=2)
    assert outcomes(within) == {
        "m1": ("failed", None),
        "m3": ("rejuvenate", None),
        "m2": ("refused", None),
        "m4": ("rejuvenate", None),
    }
    assert within["failure_budget"] == {"allowed": 2, "foreseen": ["m1", "m2"], "stops_after_batch": None, "reason": ""}
    over = fleet(batches, facts, allowed=1)
    assert outcomes(over)["m4"] == ("not_reached", None)
    assert over["failure_budget"]["stops_after_batch"] == 2
    assert over["batches"][2]["seconds"] is None
    assert over["totals"]["seconds"] == 160.0
    [stop] = FILTERS["rolling_plan_objections"](over, ["stop"])
    assert stop.startswith("The run would stop after batch 2: 2 of 4 machine(s) failed (m1, m2)")
    assert len(FILTERS["rolling_plan_objections"](over, "refused, stop")) == 3


def test_a_run_that_stops_after_its_last_batch_leaves_nothing_undone():
    made = fleet([["m1"]], {"m1": {}})
    assert made["failure_budget"]["stops_after_batch"] is None
    assert FILTERS["rolling_plan_objections"](made, ["stop"]) == []


def test_labels_that_leave_a_machine_out_are_named():
    hostvars = {"m1": {"vmbeam_labels": {"rack": "r1"}}, "m2": {"vmbeam_labels": {"rack": "r2"}}, "m3": {}}
    left_out = FILTERS["rolling_left_out"](list(hostvars), hostvars, "rack=r1", "")
    assert left_out == dict.fromkeys(["m2", "m3"], "label rack is none of r1 (vmbeam_select)")
    skipped = FILTERS["rolling_left_out"](list(hostvars), hostvars, {}, {"rack": ["r1", "r2"]})
    assert skipped == dict.fromkeys(["m1", "m2"], "label rack is one of r1, r2 (vmbeam_skip)")
    assert FILTERS["rolling_left_out"](list(hostvars), hostvars) == {}


def test_what_is_not_accepted_has_a_name():
    with pytest.raises(AnsibleFilterError, match="vmbeam_plan_fail_on: nonsense is not one of refused, stop"):
        FILTERS["rolling_plan_objections"](fleet([], {}), "refused,nonsense")


def test_a_guest_that_a_gate_names_and_no_machine_has_is_told():
    gates = [{"name": "up", "guest": "wbe1", "command": ["true"]}, {"name": "all", "command": ["true"]}]
    # The guest of the other machine is known to the run, if not to this one.
    first = machine("m1", gates=gates, guest_probes={"db1": {"url": "http://192.0.2.7"}})
    second = machine("m2")
    second["rejuvenate_plan"]["guests"][0]["name"] = "db1"
    assert [one["guest"] for one in first["rejuvenate_plan"]["unknown_guests"]] == ["db1", "wbe1"]
    made = fleet([["m1", "m2"]], {"m1": first, "m2": second})
    assert made["unknown_guests"] == [{"guest": "wbe1", "variables": ["vmbeam_gates"]}]
    assert "Named in vmbeam_gates, but on none of these machines: guest wbe1" in FILTERS["rolling_plan_text"](made)
    assert FILTERS["rolling_plan_objections"](made, "unknown_guest") == [
        "vmbeam_gates names guest wbe1, which is on none of these machines"
    ]
    assert FILTERS["rolling_plan_objections"](made, "refused") == []
