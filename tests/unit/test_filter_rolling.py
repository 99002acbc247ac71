# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The decisions of rolling runs: selection, batches, budget, windows, locks of the dead, repairs."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import subprocess
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from ansible_collections.vmbeam.xen.plugins.filter.rolling import FilterModule
from ansible_collections.vmbeam.xen.plugins.plugin_utils import _controller

FILTERS = FilterModule().filters()


def apply(name: str, *arguments: Any) -> Any:
    return FILTERS[name](*arguments)


def moment(text: str) -> float:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC).timestamp()


# --- which machines, in which batches --------------------------------------------------------

HOSTVARS: dict[str, dict[str, Any]] = {
    "m1": {"vmbeam_labels": {"rack": "r1", "tier": 1}, "rolling_created": "2026-03-01T00:00:00+00:00"},
    "m2": {
        "vmbeam_labels": {"rack": "r2"},
        "rolling_created": "2026-01-01T00:00:00+00:00",
        "vmbeam_aging_score": "0.2",
    },
    "m3": {"vmbeam_labels": {"rack": "r1"}, "rolling_created": "", "vmbeam_aging_score": 0.9},
    "m4": {"rolling_created": "2026-02-01T00:00:00+00:00"},
}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("inventory",), ["m1", "m2", "m3", "m4"]),
        (("oldest",), ["m3", "m2", "m4", "m1"]),
        (("aging",), ["m3", "m2", "m4", "m1"]),
        (("inventory", {"rack": "r1"}), ["m1", "m3"]),
        (("inventory", {"rack": ["r1", "r2"]}), ["m1", "m2", "m3"]),
        (("inventory", "rack=r1, tier=1"), ["m1"]),
        (("inventory", "rack=r1 tier=1"), ["m1"]),
        (("inventory", "rack = r1, tier =1"), ["m1"]),
        (("inventory", {}, "rack=r1"), ["m2", "m4"]),
        (("inventory", {"rack": "r1"}, {"tier": 1}), ["m3"]),
        (("inventory", {"rack": "None"}), []),
    ],
)
def test_selection(arguments, expected):
    assert apply("rolling_select", list(HOSTVARS), HOSTVARS, *arguments) == expected


def test_a_label_that_is_named_twice_may_have_either_value():
    hostvars = {name: {"vmbeam_labels": {"rack": name}} for name in ("r1", "r2", "r3")}
    assert apply("rolling_select", list(hostvars), hostvars, "inventory", "rack=r1,rack=r2") == ["r1", "r2"]
    assert apply("rolling_select", list(hostvars), hostvars, "inventory", {}, "rack=r1,rack=r2") == ["r3"]


def test_a_machine_may_have_several_values_of_a_label():
    labels = {"web": {"role": ["web", "cache"]}, "db": {"role": ["db"]}, "both": "role=db,role=cache", "none": {}}
    hostvars = {name: {"vmbeam_labels": given} for name, given in labels.items()}
    assert apply("rolling_select", list(hostvars), hostvars, "inventory", {"role": "cache"}) == ["web", "both"]
    assert apply("rolling_select", list(hostvars), hostvars, "inventory", {}, "role=db") == ["web", "none"]


def test_aging_goes_before_age():
    hostvars = {"young": {"rolling_created": "2026-02", "vmbeam_aging_score": 5}, "old": {"rolling_created": "2026-01"}}
    assert apply("rolling_select", ["old", "young"], hostvars, "aging") == ["young", "old"]
    assert apply("rolling_select", ["old", "young"], hostvars, "oldest") == ["old", "young"]


@pytest.mark.parametrize("labels", ["rack", "=r1", 7])
def test_labels_that_cannot_be_read_are_refused(labels):
    with pytest.raises(AnsibleFilterError, match="labels"):
        apply("rolling_select", ["m1"], HOSTVARS, "inventory", labels)


def test_an_unknown_order_is_refused():
    with pytest.raises(AnsibleFilterError, match="vmbeam_order is 'newest'"):
        apply("rolling_select", ["m1"], HOSTVARS, "newest")


@pytest.mark.parametrize(
    ("serial", "sizes"),
    [
        (1, [1] * 10),
        ("3", [3, 3, 3, 1]),
        ("25%", [2, 2, 2, 2, 2]),
        ("1%", [1] * 10),
        ([1, "20%", "100%"], [1, 2, 7]),
        ("1, 50%", [1, 5, 4]),
        (99, [10]),
    ],
)
def test_batches(serial, sizes):
    names = [f"m{number}" for number in range(10)]
    batches = apply("rolling_batches", names, serial, False)
    assert [len(batch) for batch in batches] == sizes
    assert [name for batch in batches for name in batch] == names


def test_each_batch_has_a_place_for_the_controller():
    batches = apply("rolling_batches", ["m1", "m2", "m3"], 2, True)
    assert batches == [["batch-1", "m1", "m2"], ["batch-2", "m3"]]
    assert apply("rolling_machines", batches[0]) == ["m1", "m2"]


@pytest.mark.parametrize("serial", [0, -1, "some", "", [], "0", [1, "x%"]])
def test_a_wrong_serial_is_refused(serial):
    with pytest.raises(AnsibleFilterError, match="vmbeam_serial"):
        apply("rolling_batches", ["m1"], serial, False)


@pytest.mark.parametrize(("budget", "failed", "stops"), [(0, 0, False), (0, 1, True), (2, 2, False), (2, 3, True)])
def test_budget(budget, failed, stops):
    reason = apply("rolling_stop_reason", [f"m{number}" for number in range(failed)], 10, budget)
    assert bool(reason) == stops
    if stops:
        assert "m0" in reason


def test_a_budget_in_percent_is_rounded_down():
    assert apply("rolling_budget", "5%", 1000) == 50
    assert apply("rolling_budget", "5%", 10) == 0
    with pytest.raises(AnsibleFilterError, match="vmbeam_failure_budget"):
        apply("rolling_budget", "few", 10)


@pytest.mark.parametrize(
    ("action", "steps", "acts", "repairs", "result"),
    [
        ("rejuvenate", ["move", "leave"], True, {}, "done"),
        ("rejuvenate", ["move"], False, {}, "planned"),
        ("skip", ["stay"], True, {}, "fresh"),
        ("skip", ["move", "skip_host"], True, {}, "skipped"),
        ("skip", ["leave"], False, {}, "skipped"),
        ("skip", ["skip_host"], True, {"done": False, "summary": "because"}, "fresh"),
        ("skip", ["skip_host"], True, {"done": True, "summary": "because"}, "done"),
    ],
)
def test_a_machine_that_its_guests_keep_from_being_done_is_not_fresh(action, steps, acts, repairs, result):
    plan = {"action": action, "reason": "because", "guests": [{"step": step} for step in steps]}
    assert apply("rolling_outcome", plan, acts, repairs) == {"result": result, "reason": "because"}


def test_a_role_that_makes_no_plan_is_done():
    assert apply("rolling_outcome", {}, True, {}) == {"result": "done", "reason": ""}


def test_a_machine_without_an_outcome_was_lost():
    outcomes = apply("rolling_outcomes", ["m1", "m2"], {"m1": {"rolling_outcome": {"result": "done"}}, "m2": {}})
    assert outcomes["m1"]["result"] == "done"
    assert outcomes["m2"]["result"] == "failed"
    assert "unreachable" in outcomes["m2"]["reason"]


def test_hooks():
    assert apply("rolling_hooks", {"before_run": "a.yml", "after_run": "/b.yml", "before_guest": ""}, "/etc/x") == {
        "before_run": {"name": "before_run", "file": "/etc/x/a.yml"},
        "after_run": {"name": "after_run", "file": "/b.yml"},
    }


def test_hooks_that_are_commands():
    given = {"after_run": ["ls"], "before_guest": {"command": ["drain", 5], "timeout": "9"}, "after_machine": ["ls"]}
    hooks = apply("rolling_hooks", given, "/etc/x")
    assert {name: (hook["command"], hook["timeout"], hook["on"]) for name, hook in hooks.items()} == {
        "after_run": (["ls"], 300, "controller"),
        "before_guest": (["drain", "5"], 9, "machine"),
        "after_machine": (["ls"], 300, "machine"),
    }
    assert all(os.path.exists(hook["file"]) for hook in hooks.values())


@pytest.mark.parametrize(
    "hooks",
    [
        {"befor_run": "a.yml"},
        {"before_run": {"comand": ["ls"]}},
        {"before_run": {"command": "ls -l"}},
        {"before_run": {"command": ["ls"], "timeout": 0}},
        {"before_run": {"command": ["ls"], "on": "machine"}},
        {"before_guest": {"command": ["ls"], "on": "guest"}},
    ],
)
def test_a_hook_that_cannot_be_read_is_named(hooks):
    with pytest.raises(AnsibleFilterError, match=rf"vmbeam_hooks.*{next(iter(hooks))}"):
        apply("rolling_hooks", hooks, "/etc/x")


def test_the_plays_hosts_are_those_of_all_batches_in_order():
    assert apply("rolling_hosts", {"rolling_batches": [["batch-1", "m2"], ["batch-2", "m1", "m3"]]}) == [
        "batch-1",
        "m2",
        "batch-2",
        "m1",
        "m3",
    ]
    batches = {"rolling_batches": [["batch-1", "m2"], ["batch-2", "m1", "m3"]]}
    assert apply("rolling_hosts", batches, False) == ["batch-1", "m2", "m1", "m3"]
    # With --limit no host stands for the controller.
    assert apply("rolling_hosts", {"rolling_batches": [["m2"], ["m1", "m3"]]}, False) == ["m2", "m1", "m3"]
    assert apply("rolling_hosts", {"rolling_batches": []}) == []
    assert apply("rolling_hosts", {}) == ["vmbeam_rolling"]


# --- when ------------------------------------------------------------------------------------

NIGHT = yaml.safe_load('[{days: mon-fri, from: 22:00, to: "04:00", timezone: Europe/Berlin}]')


@pytest.mark.parametrize(
    ("now", "opens"),
    [
        ("2026-11-23T20:59", False),  # Monday, 21:59 in Berlin
        ("2026-11-23T21:00", True),
        ("2026-11-24T02:59", True),
        ("2026-11-24T03:00", False),
        ("2026-11-23T02:00", False),  # the night of Sunday
        ("2026-11-28T02:00", True),  # the night of Friday
        ("2026-11-28T22:00", False),
        ("2026-07-06T20:00", True),  # 22:00 in summer
    ],
)
def test_a_window_over_midnight_in_a_timezone(now, opens):
    spaced = [NIGHT[0] | {"days": "mon - fri"}]
    for windows in (NIGHT, spaced):
        assert (apply("rolling_closed", windows, [], moment(now)) == "") == opens


def test_the_reason_names_the_window():
    reason = apply("rolling_closed", NIGHT, [], moment("2026-11-23T12:00"))
    assert "mon, tue, wed, thu, fri 22:00 to 04:00 Europe/Berlin" in reason
    assert "Mon 2026-11-23 12:00 UTC" in reason


def test_a_window_has_to_stay_open_for_the_margin():
    assert apply("rolling_closed", NIGHT, [], moment("2026-11-24T02:30"), 1700) == ""
    assert "1900 s" in apply("rolling_closed", NIGHT, [], moment("2026-11-24T02:30"), 1900)


ADJOINING = [{"days": "mon", "from": "22:00", "to": "24:00"}, {"days": "tue", "from": "00:00", "to": "03:00"}]


@pytest.mark.parametrize(
    ("windows", "now", "margin", "opens"),
    [
        (ADJOINING, "2026-11-23T23:00", 4 * 3600 - 60, True),
        (ADJOINING, "2026-11-23T23:00", 4 * 3600 + 60, False),
        (ADJOINING, "2026-11-23T21:59", 600, False),
        ([ADJOINING[0], {**ADJOINING[1], "from": "00:01"}], "2026-11-23T23:00", 7200, False),
        # Overlapping, in any order, and one that adjoins itself.
        ([{"from": "02:00", "to": "05:00"}, {"from": "01:00", "to": "03:00"}], "2026-11-24T01:30", 3 * 3600, True),
        ([{"from": "00:00", "to": "24:00"}], "2026-11-24T01:30", 50 * 3600, True),
    ],
)
def test_windows_that_adjoin_are_one_for_the_margin(windows, now, margin, opens):
    assert (apply("rolling_closed", windows, [], moment(now), margin) == "") == opens


def test_without_windows_every_time_will_do():
    assert apply("rolling_closed", [], [], moment("2026-11-24T02:30")) == ""


@pytest.mark.parametrize(
    ("now", "opens"),
    [
        ("2026-12-23T22:59", True),
        ("2026-12-23T23:00", False),
        ("2026-12-26T22:59", False),
        ("2026-12-26T23:00", True),
    ],
)
@pytest.mark.parametrize("quoted", [True, False])
def test_a_blackout_of_whole_days(now, opens, quoted):
    days = ['"2026-12-24"', '"2026-12-26"'] if quoted else ["2026-12-24", "2026-12-26"]
    blackouts = yaml.safe_load(f"[{{from: {days[0]}, to: {days[1]}, timezone: Europe/Berlin, reason: Christmas}}]")
    reason = apply("rolling_closed", [], blackouts, moment(now))
    assert (reason == "") == opens
    assert opens or "Christmas" in reason


def test_a_blackout_by_the_minute_beats_a_window_and_counts_for_the_margin():
    blackout = [{"from": "2026-11-23T22:00+00:00", "to": "2026-11-23T23:00+00:00"}]
    assert apply("rolling_closed", NIGHT, blackout, moment("2026-11-23T21:30")) == ""
    assert "blackout" in apply("rolling_closed", NIGHT, blackout, moment("2026-11-23T21:30"), 1800)
    assert "blackout" in apply("rolling_closed", NIGHT, blackout, moment("2026-11-23T22:59"))
    assert apply("rolling_closed", NIGHT, blackout, moment("2026-11-23T23:00")) == ""


@pytest.mark.parametrize(
    ("windows", "blackouts", "words"),
    [
        ([{"days": "funday", "from": "1:00", "to": "2:00"}], [], "funday"),
        ([{"from": "noon", "to": "2:00"}], [], "from of"),
        ([{"from": "1:00"}], [], "to of"),
        ([{"from": "1:00", "to": "2:00", "timezone": "Mars/Base"}], [], "Mars/Base"),
        ([], [{"from": "tomorrow", "to": "2026-01-01"}], "from of"),
        ([], [{"from": "2026-01-02", "to": "2026-01-01"}], "ends before"),
    ],
)
def test_what_cannot_be_read_is_named(windows, blackouts, words):
    with pytest.raises(AnsibleFilterError, match=words):
        apply("rolling_closed", windows, blackouts, moment("2026-11-23T12:00"))


# --- locks of the dead -----------------------------------------------------------------------


def test_the_identity_is_that_of_the_process_whose_children_ask():
    mine = _controller.identity()
    assert mine["process"]["pid"] == os.getpid()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_controller.identity) == mine


def holder(process: dict[str, Any], run_id: str = "theirs") -> dict[str, Any]:
    return {"owner": "them", "details": {"run_id": run_id, "process": process}}


def test_a_lock_is_abandoned_if_its_process_is_dead():
    mine = _controller.identity()["process"]
    assert not apply("host_lock_abandoned", holder(mine), "ours")
    assert apply("host_lock_abandoned", holder({**mine, "started": mine["started"] - 1}), "ours")
    child = subprocess.Popen(["sleep", "0"])
    child.wait()
    assert apply("host_lock_abandoned", holder({**mine, "pid": child.pid}), "ours")


def test_a_process_elsewhere_counts_as_alive_unless_its_run_is_resumed():
    mine = _controller.identity()["process"]
    for there in ({**mine, "boot": "another"}, {**mine, "namespace": "pid:[1]"}, {}):
        assert not apply("host_lock_abandoned", holder(there), "ours")
        assert apply("host_lock_abandoned", holder(there, "ours"), "ours")
    # The run is not resumed while it runs.
    assert not apply("host_lock_abandoned", holder(mine, "ours"), "ours")


def test_the_owner_of_a_lock_is_one_process_of_one_run():
    me = {"run_id": "20261124-alice"}
    assert apply("host_lock_owner", me, "20261124-alice") == "20261124-alice"
    assert apply("host_lock_owner", me, "night") == "night (20261124-alice)"


def test_machines_of_other_runs_are_told_by_run():
    def holder(owner: str, expires: float) -> dict[str, Any]:
        return {"owner": owner, "details": {"user": "bob"}, "since": "2026-11-24", "expires_in_seconds": expires}

    hostvars: dict[str, dict[str, Any]] = {
        f"m{number}": {"rolling_leased": {"holder": holder("theirs", number)}} for number in range(1, 13)
    }
    hostvars |= {
        "ours": {"rolling_leased": {"holder": holder("me", 9)}, "rolling_taken": {"skipped": True}},
        "taken": {"rolling_leased": {"holder": holder("dead", 9)}, "rolling_taken": {"holder": holder("me", 9)}},
        "lost": {"rolling_leased": {"holder": holder("dead", 9)}, "rolling_taken": {"holder": holder("quick", 61)}},
        "silent": {"rolling_leased": {"unreachable": True}},
        "broken": {},
    }
    theirs, quick = apply("rolling_held", list(hostvars), hostvars, "me")
    assert theirs.startswith("m1, m2, ")
    assert "m10, 2 more: reserved by run theirs of bob" in theirs
    assert "in 1 min" in theirs
    assert quick.startswith("lost: reserved by run quick")
    assert "in 2 min" in quick


def test_a_lock_is_broken_only_by_its_owners_name():
    mine = holder(_controller.identity()["process"])
    assert apply("host_lock_abandoned", mine, "ours", "them")
    assert not apply("host_lock_abandoned", mine, "ours", "others")
    assert not apply("host_lock_abandoned", {}, "ours", "them")


# --- done already, and what is to be repaired ------------------------------------------------

SETTINGS = {"slots": {"a": {"name": "m1-a"}, "b": {"name": "m1-b"}}}


def observed(guests: list[tuple[str, str]], run: dict[str, Any] | None = None, running: str = "a") -> dict[str, Any]:
    names = {"a": "m1-a", "b": "m1-b"}
    return {
        "machine": "m1",
        "now": 1000.0,
        "host_vms": [{"name": name, "domid": 5 if slot == running else None} for slot, name in names.items()],
        "guest_dom0s": {running: {"reachable": True, "guests": [{"name": n, "state": s} for n, s in guests]}},
        "state": {"run": run, "history": []},
    }


RUN = {"run_id": "mine", "source": "m1-a", "destination": "m1-b", "guests": ["web1"]}


def repairs(seen: dict[str, Any], restarted: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    slot = next(slot for slot in "ab" if slot in seen["guest_dom0s"])
    return apply("rejuvenation_repairs", {"source": {"slot": slot}}, seen, {**SETTINGS, **settings}, restarted)


def test_nothing_is_to_be_repaired_on_a_healthy_machine():
    assert repairs(observed([("web1", "blocked"), ("app1", "paused")])) == {
        "host_vm": "m1-a",
        "unpause": [],
        "decide": [],
        "close_run": False,
        "done": False,
        "summary": "one host VM, m1-a, with each guest once; nothing else to repair",
    }


NOT_RESTARTED = {"steps": [], "start": False, "guests": [], "disks": [], "configurations": [], "leftovers": []}


@pytest.mark.parametrize(
    ("restarted", "words"),
    [
        ({"start": True, "guests": [{}, {}]}, "m1-a started, 2 guest(s) started, nothing else to repair"),
        ({"disks": [{}], "configurations": [{}]}, "2 disk(s) and configuration(s) put back, nothing else to repair"),
        (
            {"leftovers": ["m1-b"], "close_run": True},
            "1 lost disk(s) moved aside, the record of the run that was cut is closed",
        ),
    ],
)
def test_what_was_started_again_counts_as_repaired(restarted, words):
    done = {"host_vm": "m1-a", "close_run": False, **NOT_RESTARTED, "steps": ["as told"], **restarted}
    found = repairs(observed([("web1", "blocked")]), done)
    assert found["done"]
    assert found["summary"] == f"one host VM, m1-a, with each guest once; {words}"


def test_a_machine_on_which_nothing_had_to_be_started_again_is_as_it_was():
    found = repairs(observed([("web1", "blocked")]), NOT_RESTARTED)
    assert not found["done"]
    assert found["summary"].endswith("; nothing else to repair")


def test_a_guest_that_the_cut_run_left_paused_is_set_going():
    found = repairs(observed([("web1", "paused"), ("app1", "paused")], RUN))
    assert found["unpause"] == ["web1"]
    assert found["close_run"]
    assert found["done"]
    assert "1 guest(s) set going, the record of the run that was cut is closed" in found["summary"]


@pytest.mark.parametrize(
    ("guests", "words"),
    [
        ([("web1", "running"), ("web1--migratedaway", "suspended")], "beside web1"),
        ([("web1--migratedaway", "suspended")], "all that is left of guest web1"),
        ([("web1", "suspended")], "web1 is suspended"),
        ([], "runs nowhere"),
    ],
)
def test_what_a_person_has_to_decide(guests, words):
    found = repairs(observed(guests, RUN))
    assert any(words in matter for matter in found["decide"])
    assert words in found["summary"]
    assert not found["close_run"]
    assert not found["done"]
    assert found["unpause"] == []


def test_a_guest_that_was_stopped_on_purpose_is_not_missed():
    found = repairs(observed([], RUN), confirm_gone=["web1"])
    assert found["decide"] == []
    assert found["close_run"]


def test_a_silent_guest_dom0_is_for_a_person():
    seen = observed([])
    seen["guest_dom0s"]["a"] = {"reachable": False, "error": "no route"}
    assert "no route" in repairs(seen)["decide"][0]


def test_no_machine_is_taken_for_the_controllers_place_in_a_batch():
    """It would be left out, and its tasks would be run on the controller."""
    with pytest.raises(AnsibleFilterError, match="batch-runner: no machine's name may begin with 'batch-'"):
        apply("rolling_select", ["m1", "batch-runner"], {"m1": {}, "batch-runner": {}})


@pytest.mark.parametrize(("host_vm", "outcome"), [("m1-a", "failed"), ("m1-b", "completed")])
def test_a_closed_run_says_where_it_ended(host_vm, outcome):
    closed = apply("rejuvenation_close_run", {"run": RUN, "history": []}, host_vm, 1000.0, 5)
    assert closed["run"] is None
    assert closed["history"][-1]["outcome"] == outcome


def test_a_run_does_no_machine_twice():
    done = observed([])
    done["state"]["history"] = [{"run_id": "mine", "outcome": "completed", "destination": "m1-a"}]
    assert apply("rejuvenation_done_in_run", done, "mine")
    assert not apply("rejuvenation_done_in_run", done, "another")
    done["state"]["history"][0]["outcome"] = "failed"
    assert not apply("rejuvenation_done_in_run", done, "mine")
    # Cut after its last step, before it could say so; and cut before its first.
    assert apply("rejuvenation_done_in_run", observed([], RUN, running="b"), "mine")
    assert not apply("rejuvenation_done_in_run", observed([], RUN, running="a"), "mine")
