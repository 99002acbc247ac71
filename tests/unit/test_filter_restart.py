# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is started again after a reboot of a machine, through the filters."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.vmbeam.xen.plugins.filter.restart import FilterModule
from observed import BY_ID, SETTINGS, SILENT, dom0, guest, host_vm, observe, plan, problems

FILTERS = FilterModule().filters()


def entry(slot: str, generation: int, *guests: dict[str, Any], **values: Any) -> dict[str, Any]:
    disks = {disk: f"/guests/{disk}.raw" for one in guests for disk in one["disks"]}
    base = {"host_vm": f"m1-{slot}", "generation": generation, "noted": "2023-11-02", "disks": disks}
    return {**base, "guests": list(guests), **values}


def kept(name: str, **values: Any) -> dict[str, Any]:
    config = {"path": f"/etc/xen/guests/{name}.cfg", "content": f'name = "{name}"\n'}
    return {"name": name, "runs": True, "disks": [f"{name}-root"], "config": config, **values}


def lost(slot: str, generation: int) -> dict[str, Any]:
    return host_vm(slot, domid=None, state="absent", generation=generation, disks=[])


def rebooted(*entries: dict[str, Any], **values: Any) -> dict[str, Any]:
    left = [lost(one["host_vm"][-1], one["generation"]) for one in entries]
    return observe(host_vms=left, domains=[], guest_dom0s={}, guest_record=list(entries), **values)


def restart(observed: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return FILTERS["restart_plan"](observed, {**SETTINGS, **settings})


def names(items: list[dict[str, Any]]) -> list[str]:
    return [item["name"] for item in items]


def test_all_that_ran_starts_in_a_fresh_host_vm():
    observed = rebooted(entry("a", 7, kept("web1"), kept("db1", runs=False), kept("app1")))
    made = restart(observed)
    assert (made["host_vm"], made["slot"], made["start"], made["generation"]) == ("m1-a", "a", True, 8)
    assert names(made["guests"]) == ["app1", "web1"]
    assert made["guests"][1] == {
        "name": "web1",
        "config": kept("web1")["config"],
        "disks": [{"id": "web1-root", "path": "/guests/web1-root.raw", "target": f"{BY_ID}web1-root"}],
    }
    assert made["disks"] == [{"id": "db1-root", "path": "/guests/db1-root.raw"}]
    assert [file["path"].rsplit("/", 1)[1] for file in made["configurations"]] == ["app1.cfg", "db1.cfg", "web1.cfg"]
    assert made["leftovers"] == []
    assert made["steps"][0].startswith("start m1-a (generation 8)")


def test_in_the_middle_of_a_rejuvenation_the_newer_one_gets_all():
    """web1 had moved, and is known of both; what ran in either runs again."""
    source = entry("a", 7, kept("web1"), kept("app1"))
    destination = entry("b", 8, kept("web1", config=None, runs=False), noted="2023-11-03")
    state = {"run": {"source": "m1-a", "destination": "m1-b", "guests": ["app1", "web1", "new1"], "cold": []}}
    made = restart(rebooted(source, destination, state=state))
    assert (made["host_vm"], made["generation"]) == ("m1-b", 9)
    assert names(made["guests"]) == ["app1", "web1"]
    # The run knew of a guest that is recorded nowhere: nothing is put away until a person has decided.
    assert made["unknown"] == [{"name": "new1", "why": "its configuration is recorded nowhere"}]
    assert made["leftovers"] == []
    assert not made["close_run"]

    made = restart(rebooted(source, destination, state=state), confirm_gone=["new1"])
    assert made["leftovers"] == ["m1-a"]
    assert made["close_run"]
    assert restart(rebooted(source, destination, state=state), destination_slot="a")["host_vm"] == "m1-a"


def test_guests_that_were_stopped_for_a_reboot_start_in_the_host_vm_that_still_runs():
    """The reboot was cut: meanwhile the record has app1 as one that does not run."""
    record = [entry("a", 7, kept("web1"), kept("app1", runs=False))]
    files = [kept("web1")["config"], kept("app1")["config"]]
    disks = [{"id": f"{name}-root", "path": f"/guests/{name}-root.raw"} for name in ("web1", "app1")]
    seen = {
        "host_vms": [host_vm("a", generation=7, disks=disks)],
        "guest_dom0s": {"a": dom0(guest("web1"), configurations=files)},
        "guest_record": record,
    }
    assert restart(observe(**seen))["steps"] == []

    made = restart(observe(**seen, state={"run": None, "down": {"since": 1.0, "guests": ["app1", "web1"]}}))

    assert (made["host_vm"], made["start"], made["up_again"]) == ("m1-a", False, True)
    assert names(made["guests"]) == ["app1"]
    assert made["steps"][-1] == "record that the guests that were stopped for a reboot run again"


def test_a_repair_that_was_cut_before_it_had_closed_the_run_goes_on():
    """All guests run again; what is left of the source, and the record of the run, are not."""
    files = [kept("web1")["config"]]
    state = {"run": {"source": "m1-a", "destination": "m1-b", "guests": ["web1"], "cold": []}}
    seen = {
        "host_vms": [lost("a", 7), host_vm("b", generation=9, disks=[])],
        "domains": ["m1-b"],
        "guest_dom0s": {"b": dom0(guest("web1"), configurations=files)},
        "guest_record": [entry("b", 9, kept("web1"))],
    }
    made = restart(observe(**seen, state=state))
    assert (made["host_vm"], made["guests"], made["leftovers"], made["close_run"]) == ("m1-b", [], ["m1-a"], True)
    assert restart(observe(**seen, state={"run": None}))["steps"] == []
    # What the run has left paused is the next thing to be repaired, and only then the run is over.
    seen["guest_dom0s"]["b"] = dom0(guest("web1", state="paused"), configurations=files)
    assert not restart(observe(**seen, state=state))["close_run"]


def test_a_disk_that_may_be_another_one_since_is_not_attached():
    disks = {"web1-root": "/dev/sdb", "app1-root": "/dev/vg0/app1"}
    made = restart(rebooted(entry("a", 7, kept("web1"), kept("app1"), disks=disks)))
    assert names(made["guests"]) == ["app1"]
    assert made["unknown"] == [{"name": "web1", "why": "/dev/sdb may be another disk since: attach the right one"}]


def test_a_restart_that_was_cut_goes_on():
    observed = rebooted(entry("a", 7, kept("web1"), kept("app1")))
    running = dom0(guest("app1"), configurations=[kept("app1")["config"]])
    observed |= {"host_vms": [host_vm("a", generation=8, disks=[])], "guest_dom0s": {"a": running}}
    made = restart(observed)
    assert not made["start"]
    assert names(made["guests"]) == ["web1"]
    assert [file["path"] for file in made["configurations"]] == ["/etc/xen/guests/web1.cfg"]


def test_a_host_vm_that_runs_is_believed_rather_than_its_record():
    """web1 was stopped on purpose since: its host VM is the one that is recorded."""
    observed = observe(guest_dom0s={"a": dom0()}, guest_record=[entry("a", 1, kept("web1"))])
    assert restart(observed)["steps"] == []


@pytest.mark.parametrize(
    "observed",
    [
        rebooted(),
        rebooted(entry("a", 7, kept("web1")))
        | {"host_vms": [host_vm("a", generation=8)], "guest_dom0s": {"a": SILENT}},
        rebooted(entry("a", 7, kept("web1")))
        | {"host_vms": [host_vm("a", generation=8), host_vm("b", generation=9)], "guest_dom0s": {}},
    ],
    ids=["nothing known", "silent", "both run"],
)
def test_nothing_is_done_on_what_cannot_be_seen(observed):
    assert restart(observed)["steps"] == []


def test_what_is_not_known_is_named():
    observed = rebooted(entry("a", 7, kept("web1", config=None), kept("app1"), disks={}))
    made = restart(observed)
    assert made["guests"] == []
    assert made["unknown"] == [
        {"name": "app1", "why": "it is not recorded where its disk app1-root is"},
        {"name": "web1", "why": "its configuration is recorded nowhere"},
    ]


def test_a_configuration_that_a_person_has_put_back_is_taken():
    file = {"path": "/etc/xen/guests/other.cfg", "content": 'name = "web1"\n'}
    observed = rebooted(entry("a", 7, kept("web1", config=None), kept("app1")))
    observed |= {"host_vms": [host_vm("a", generation=8)], "guest_dom0s": {"a": dom0(configurations=[file])}}
    made = restart(observed)
    assert [(one["name"], one["config"]["path"]) for one in made["guests"]] == [
        ("app1", "/etc/xen/guests/app1.cfg"),
        ("web1", "/etc/xen/guests/other.cfg"),
    ]
    assert made["configurations"] == [kept("app1")["config"]]
    assert made["unknown"] == []


def test_what_is_foreseen_needs_no_restart():
    state = {"run": {"source": "m1-a", "destination": "m1-b", "guests": ["web1"], "cold": []}}
    observed = rebooted(entry("a", 7, kept("web1")), entry("b", 8), state=state)
    made = restart(observed)
    after = FILTERS["restart_foreseen"](observed, made, SETTINGS)
    assert restart(after)["steps"] == []
    planned = plan(after)
    assert (planned["action"], planned["source"]["name"], planned["problems"]) == ("skip", "m1-b", [])
    assert names(planned["guests"]) == ["web1"]
    assert after["state"]["run"] is None


class TestAdvice:
    def test_no_host_vm_ever(self):
        made = plan(rebooted())
        assert made["problems"][0]["fix"] == "start the first one: playbooks/host_vm.yml"

    def test_rebooted(self):
        [problem] = plan(rebooted(entry("a", 7, kept("web1"))))["problems"]
        assert "web1 ran when one did" in problem["message"]
        assert "playbooks/repair.yml" in problem["fix"]

    def test_rebooted_and_nothing_recorded(self):
        observed = rebooted() | {"host_vms": [lost("a", 3), lost("b", 4)]}
        [problem] = plan(observed)["problems"]
        assert "m1-b was lost" in problem["message"]
        assert "vmbeam_slot=b -e vmbeam_previous_disk=keep" in problem["fix"]

    def test_one_host_vm_lost(self):
        observed = observe(guest_record=[entry("b", 4, kept("app1"), kept("web1"))])
        made = plan(observed)
        assert problems(made) == ["missing guests"]
        assert made["problems"][0]["message"].startswith("app1 ran in a host VM that is lost")
        assert "m1-a" in made["problems"][0]["fix"]
        assert plan(observed, confirm_gone=["app1"])["problems"] == []


class TestSeen:
    def test_only_who_answers(self):
        running = dom0(guest("web1"), configurations=[kept("web1")["config"]])
        observed = observe(host_vms=[host_vm("a"), host_vm("b", generation=2)], guest_dom0s={"a": running, "b": SILENT})
        [told] = FILTERS["restart_seen"](observed, SETTINGS)
        assert told["name"] == "m1-a"
        assert told["guests"] == [{"name": "web1", "state": "blocked", "disks": guest("web1")["disks"]}]
        assert told["configurations"] == [kept("web1")["config"]]

    def test_after_all_moves(self):
        before = observe(guest_dom0s={"a": dom0(guest("app1"), guest("web1"), configurations=[])})
        made = plan(before)
        made["guests"][0]["step"] = "leave"
        both = {"host_vms": [host_vm("a"), host_vm("b", generation=2)]}
        observed = before | both | {"guest_dom0s": {**before["guest_dom0s"], "b": dom0(configurations=[])}}
        told = FILTERS["restart_seen"](observed, SETTINGS, made)
        assert {one["name"]: names(one["guests"]) for one in told} == {"m1-a": ["app1"], "m1-b": ["web1"]}
