# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report of a run on several machines."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from ansible_collections.vmbeam.xen.plugins.filter.report import FilterModule
from ansible_collections.vmbeam.xen.plugins.plugin_utils._fleet import OUTCOMES

ROLE = Path(__file__).resolve().parents[3] / "roles" / "fleet_report"
SCHEMA = json.loads((ROLE / "files" / "report.schema.json").read_text())
FILTERS = FilterModule().filters()
RUN = {"id": "r1", "operator": "alice", "controller": "ops1", "check_mode": False}
NOW = 1_700_000_900.0


def report(hostvars, **machine):
    """The report of a run on machine m1, of which more is known."""
    seen = {**hostvars["m1"], **machine}
    return FILTERS["rejuvenation_fleet_report"](["m1"], {"m1": seen}, RUN, NOW)


class TestFleetReport:
    def test_has_its_schema(self, fleet):
        jsonschema.Draft202012Validator.check_schema(SCHEMA)
        jsonschema.validate(fleet, SCHEMA)
        assert fleet["schema"] == SCHEMA["properties"]["schema"]["const"]

    @pytest.mark.parametrize("spoil", [{"schema": 2}, {"more": 1}, {"summary": {}}])
    def test_schema_tells_another_form(self, fleet, spoil):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**fleet, **spoil}, SCHEMA)

    def test_schema_has_the_outcomes(self):
        assert SCHEMA["$defs"]["outcome"]["enum"] == list(OUTCOMES)

    def test_each_machine_is_in_it_with_how_it_ended(self, fleet):
        assert {machine["machine"]: machine["outcome"] for machine in fleet["machines"]} == {
            "m1": "completed",
            "m2": "failed",
            "m3": "refused",
            "m4": "skipped",
            "m5": "not_touched",
            "m6": "unreachable",
            "m7": "failed",
        }
        reasons = {machine["machine"]: machine["reason"] for machine in fleet["machines"]}
        assert "9.0 d old" in reasons["m1"]
        assert "Guest app1 is in m2-b" in reasons["m2"]
        assert "99 MiB" in reasons["m3"]
        assert "is fresh" in reasons["m4"]
        assert "No route to host" in reasons["m6"]
        assert "xenstored" in reasons["m7"]

    def test_figures(self, fleet):
        assert fleet["summary"]["machines"] == 7
        assert fleet["summary"]["guests_moved"] == 5
        assert fleet["summary"]["guests_failed"] == 1
        assert fleet["summary"]["longest_downtime"] == {"machine": "m1", "guest": "db1", "seconds": 1.27}
        assert sum(fleet["summary"]["outcomes"].values()) == 7
        assert fleet["run"]["seconds"] == 900.0
        assert fleet["run"]["outcome"] == "failed"

    def test_run_without_trouble(self, hostvars):
        done = {name: hostvars[name] for name in ("m1", "m4")}
        assert FILTERS["rejuvenation_fleet_report"](list(done), done, RUN, NOW)["run"]["outcome"] == "completed"

    def test_run_without_any_downtime(self, hostvars):
        made = FILTERS["rejuvenation_fleet_report"](["m4"], hostvars, RUN, NOW)
        assert made["summary"]["longest_downtime"] is None
        jsonschema.validate(made, SCHEMA)

    def test_machine_that_is_left_alone_has_no_destination(self, fleet):
        skipped = next(machine for machine in fleet["machines"] if machine["machine"] == "m4")
        assert (skipped["source"], skipped["destination"]) == ("m4-a", None)

    def test_check_mode_is_a_plan(self, hostvars):
        made = report(hostvars, rejuvenate_report=None)
        assert made["machines"][0]["outcome"] == "planned"

    def test_machine_that_neither_ended_nor_reported(self, hostvars):
        del hostvars["m1"]["rejuvenate_ended"]
        machine = report(hostvars, rejuvenate_report=None)["machines"][0]
        assert machine["outcome"] == "failed"
        assert "audit log" in machine["reason"]

    def test_run_begins_with_its_first_machine(self, hostvars):
        later = FILTERS["rejuvenation_fleet_report"](["m5", "m2"], hostvars, RUN, NOW)
        assert later["run"]["started"] == "2023-11-14T22:20:20.000+00:00"
        nothing = FILTERS["rejuvenation_fleet_report"](["m5"], hostvars, RUN, NOW)
        assert nothing["run"]["started"] == nothing["run"]["finished"]


class TestRollingPlaybook:
    """What the playbook knows of machines that say nothing themselves."""

    def test_failure_after_the_role(self, hostvars):
        told = {"result": "failed", "reason": "the health gate after it failed"}
        machine = report(hostvars, rolling_outcome=told)["machines"][0]
        assert (machine["outcome"], machine["reason"]) == ("failed", told["reason"])
        assert machine["guests_moved"] == 4

    @pytest.mark.parametrize(("action", "outcome"), [("skip", "skipped"), ("rejuvenate", "planned")])
    def test_machine_on_which_nothing_was_done(self, hostvars, action, outcome):
        seen = {"m1": {"rejuvenate_plan": {**hostvars["m1"]["rejuvenate_plan"], "action": action}}}
        seen["m1"]["rolling_outcome"] = {"result": "done", "reason": ""}
        machine = FILTERS["rejuvenation_fleet_report"](["m1"], seen, RUN, NOW)["machines"][0]
        assert machine["outcome"] == outcome

    @pytest.mark.parametrize(
        ("found", "result", "outcome"),
        [
            ({"done": True}, "done", "completed"),
            ({}, "fresh", "skipped"),
            ({"decide": ["web1 runs nowhere"]}, "failed", "failed"),
            ({"done": True}, "failed", "failed"),
        ],
    )
    def test_repair(self, hostvars, found, result, outcome):
        """Of a machine on which there is no room to rejuvenate it now."""
        repairs = {"decide": [], "done": False, "summary": "as it was found", **found}
        told = {"result": result, "reason": "as it was found"}
        seen = {"m3": {**hostvars["m3"], "rejuvenate_repairs": repairs, "rolling_outcome": told}}
        made = FILTERS["rejuvenation_fleet_report"](["m3"], seen, RUN, NOW)
        jsonschema.validate(made, SCHEMA)
        machine = made["machines"][0]
        assert (machine["action"], machine["outcome"], machine["reason"]) == ("repair", outcome, "as it was found")
        assert machine["destination"] is None
        previewed = FILTERS["rejuvenation_fleet_report"](["m3"], seen, {**RUN, "check_mode": True}, NOW)["machines"][0]
        assert previewed["outcome"] == ("planned" if outcome == "completed" else outcome)

    @pytest.mark.parametrize(("result", "outcome"), [("failed", "failed"), ("skipped", "skipped")])
    def test_machine_that_the_role_did_not_come_to(self, result, outcome):
        seen = {"m1": {"rolling_outcome": {"result": result, "reason": "outside its window"}}}
        machine = FILTERS["rejuvenation_fleet_report"](["m1"], seen, RUN, NOW)["machines"][0]
        assert (machine["outcome"], machine["reason"]) == (outcome, "outside its window")

    def test_refusal_is_not_taken_for_another_failure(self, hostvars):
        hostvars["m3"]["rolling_outcome"] = {"result": "failed", "reason": "Ansible says failed"}
        made = FILTERS["rejuvenation_fleet_report"](["m3"], hostvars, RUN, NOW)
        assert made["machines"][0]["outcome"] == "refused"

    def test_machine_whose_turn_came_and_that_says_nothing_is_lost(self):
        rolling = {
            "rolling_batches": [["batch-1", "m1"], ["batch-2", "m2"]],
            "rolling_batches_begun": 1,
            "rolling_stopped": "1 of 2 machine(s) failed (m1), and the failure budget is 0",
        }
        seen = {"localhost": rolling, "m1": {}, "m2": {}}
        made = FILTERS["rejuvenation_fleet_report"](["m1", "m2"], seen, RUN, NOW)
        assert [machine["outcome"] for machine in made["machines"]] == ["unreachable", "not_touched"]
        assert made["machines"][1]["reason"] == rolling["rolling_stopped"]
