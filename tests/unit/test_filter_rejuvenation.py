# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decisions of the rejuvenate role, through its filters."""

from __future__ import annotations

import copy

import pytest
from ansible.errors import AnsibleFilterError
from observed import (
    BY_ID,
    DAY,
    FILTERS,
    NOW,
    SETTINGS,
    SILENT,
    age,
    dom0,
    guest,
    host_vm,
    observe,
    observe_both,
    plan,
    problems,
)


class TestAction:
    def test_old_host_vm_is_replaced(self):
        made = plan(observe())
        assert made["action"] == "rejuvenate"
        assert (made["source"]["name"], made["destination"]["name"]) == ("m1-a", "m1-b")
        assert made["destination"]["start"]
        assert made["destination"]["generation"] == 2
        assert made["problems"] == []
        assert [(item["name"], item["step"], item["strategy"]) for item in made["guests"]] == [
            ("web1", "move", "precopy")
        ]
        assert made["guests"][0]["disks"][0]["path"] == "/guests/web1-root.raw"

    def test_guests_that_options_name_and_the_machine_lacks_are_told(self):
        anti_affinity = [{"name": "web", "guests": ["web1", "web2"]}, {"name": "db", "label": "db"}]
        made = plan(observe(), pinned_guests=["web2", "off1"], anti_affinity=anti_affinity, guest_labels={"web1": "db"})
        assert made["unknown_guests"] == [
            {"guest": "off1", "variables": ["vmbeam_pinned_guests"]},
            {"guest": "web2", "variables": ["vmbeam_pinned_guests", "vmbeam_anti_affinity"]},
        ]
        text = "Named, but not on this machine: off1 (vmbeam_pinned_guests), web2 ("
        assert any(line.startswith(text) for line in FILTERS["rejuvenation_plan_text"](made))
        # One that is shut down has its configuration there.
        stopped = dict(
            dom0(guest("web1")), configurations=[{"path": "/etc/xen/guests/off1.cfg", "content": 'name="off1"'}]
        )
        assert not plan(observe(guest_dom0s={"a": stopped}), pinned_guests=["off1"])["unknown_guests"]
        # Those of a group of machines tell nothing, and neither does a dom0 that does not answer.
        assert not plan(observe(), pinned_guests=[f"x{number}" for number in range(21)])["unknown_guests"]
        assert not plan(observe(guest_dom0s={"a": SILENT}), pinned_guests=["web2"])["unknown_guests"]

    def test_fresh_host_vm_is_left_alone(self):
        made = plan(observe(host_vms=[host_vm("a", created=age(2 * 3600))]))
        assert made["action"] == "skip"
        assert "2.0 h old" in made["reason"]
        assert made["steps"] == []

    @pytest.mark.parametrize("done", [False, True])
    def test_fresh_host_vm_that_does_not_answer_is_a_problem(self, done):
        young = observe(host_vms=[host_vm("a", created=age(60))], guest_dom0s={"a": SILENT})
        made = plan(young, done_in_run=done)
        assert (made["action"], problems(made)) == ("skip", ["guest dom0"])
        # One that is not fresh has this problem once, too.
        assert problems(plan(young, due_reason="m1-a: it leaks")) == ["guest dom0"]

    def test_fresh_host_vm_is_replaced_if_forced(self):
        made = plan(observe(host_vms=[host_vm("a", created=age(60))]), force=True)
        assert made["action"] == "rejuvenate"
        assert made["reason"].endswith("forced")

    def test_fresh_host_vm_is_replaced_if_it_has_aged(self):
        fresh = observe(host_vms=[host_vm("a", created=age(60))])
        made = plan(fresh, due_reason="m1-a: dom0_available_memory will be exhausted in 5 min")
        assert made["action"] == "rejuvenate"
        assert made["reason"].endswith(
            "is due because of aging: m1-a: dom0_available_memory will be exhausted in 5 min"
        )
        assert plan(fresh, due_reason="")["action"] == "skip"

    @pytest.mark.parametrize(("seconds", "action"), [(DAY - 1, "skip"), (DAY, "rejuvenate")])
    def test_a_host_vm_that_has_just_begun_has_not_aged(self, seconds, action):
        young = observe(host_vms=[host_vm("a", created=age(seconds))])
        made = plan(young, due_reason="m1-a: it leaks", aging_min_age=DAY)
        assert made["action"] == action
        # It is told in any case.
        assert made["reason"].endswith(": m1-a: it leaks")
        # The other reasons do not wait.
        old_image = observe(host_vms=[host_vm("a", created=age(seconds), image_sha256="old")])
        assert plan(old_image, aging_min_age=DAY)["action"] == "rejuvenate"
        assert plan(young, due_reason="m1-a: it leaks", aging_min_age=DAY, force=True)["action"] == "rejuvenate"

    @pytest.mark.parametrize(
        ("record", "reason"),
        [
            ({"created": age(7 * DAY)}, {}),
            ({"created": None}, {}),
            ({"created": age(60), "image_sha256": "old"}, {}),
            ({"created": age(60)}, {"due_reason": "m1-a: it leaks"}),
            ({"created": age(60)}, {"force": True}),
        ],
    )
    def test_no_reason_makes_a_run_do_a_machine_twice(self, record, reason):
        observed = observe(host_vms=[host_vm("a", **record)])
        assert plan(observed, **reason)["action"] == "rejuvenate"
        made = plan(observed, done_in_run=True, **reason)
        assert made["action"] == "skip"
        assert "this run has made" in made["reason"]

    @pytest.mark.parametrize(
        ("record", "word"),
        [
            ({"created": age(7 * DAY)}, "limit"),
            ({"created": age(60), "image_sha256": "old"}, "another image"),
            ({"created": None}, "no record"),
            ({"created": "yesterday"}, "no record"),
        ],
    )
    def test_what_is_not_fresh(self, record, word):
        made = plan(observe(host_vms=[host_vm("a", **record)]))
        assert made["action"] == "rejuvenate"
        assert word in made["reason"]

    def test_missing_image_does_not_make_a_host_vm_old(self):
        image = {"path": "/golden.raw", "exists": False, "sha256": None}
        assert plan(observe(host_vms=[host_vm("a", created=age(60))], image=image))["action"] == "skip"

    def test_slot_b_is_replaced_by_slot_a(self):
        made = plan(observe(host_vms=[host_vm("b", generation=4)], guest_dom0s={"b": dom0()}))
        assert (made["source"]["name"], made["destination"]["name"]) == ("m1-b", "m1-a")
        assert made["destination"]["generation"] == 5

    def test_generation_counts_on_from_a_stopped_host_vm(self):
        stopped = host_vm("b", domid=None, state="absent", generation=8, disks=[])
        made = plan(observe(host_vms=[host_vm("a"), stopped]))
        assert made["action"] == "rejuvenate"
        assert made["destination"]["generation"] == 9

    def test_no_host_vm(self):
        made = plan(observe(host_vms=[], guest_dom0s={}))
        assert made["action"] == "impossible"
        assert "host_vm.yml" in made["problems"][0]["fix"]

    def test_run_that_was_cut_before_its_record(self):
        run = {"source": "m1-b", "destination": "m1-a", "guests": ["web1"]}
        fresh = [host_vm("a", created=age(60))]
        assert plan(observe(host_vms=fresh, state={"run": run}))["unrecorded_run"]
        assert not plan(observe(host_vms=fresh, state={"run": None}))["unrecorded_run"]


class TestResume:
    def test_newer_generation_is_the_destination(self):
        made = plan(observe_both(dom0(guest("web1")), dom0(guest("app1"))))
        assert made["action"] == "resume"
        assert made["destination"]["name"] == "m1-b"
        assert not made["destination"]["start"]
        assert [(item["name"], item["step"]) for item in made["guests"]] == [("app1", "finish"), ("web1", "move")]
        assert problems(made) == []

    def test_fresh_destination_does_not_end_a_cut_run(self):
        vms = [host_vm("a"), host_vm("b", generation=2, created=age(60))]
        observed = observe_both(dom0(), dom0(guest("web1")))
        assert plan({**observed, "host_vms": vms})["action"] == "resume"

    @pytest.mark.parametrize("generation", [1, None])
    def test_unclear_direction(self, generation):
        vms = [host_vm("a"), host_vm("b", generation=generation)]
        observed = {**observe_both(dom0(), dom0()), "host_vms": vms}
        made = plan(observed)
        assert made["action"] == "impossible"
        assert problems(made) == ["direction"]
        assert plan(observed, destination_slot="a")["destination"]["name"] == "m1-a"

    def test_wrong_destination_slot(self):
        assert problems(plan(observe(), destination_slot="a")) == ["direction"]

    @pytest.mark.parametrize(
        ("source", "destination"),
        [
            ([guest("web1")], [guest("web1--incoming", state="paused")]),
            ([guest("web1--migratedaway", state="suspended")], [guest("web1")]),
            ([guest("web1--migratedaway", state="suspended")], [guest("web1--incoming", state="paused")]),
            ([guest("web1", state="paused")], [guest("web1", state="paused")]),
        ],
    )
    def test_remains_of_a_migration_are_left_to_the_module(self, source, destination):
        made = plan(observe_both(dom0(*source), dom0(*destination)))
        assert problems(made) == []
        assert [(item["name"], item["step"]) for item in made["guests"]] == [("web1", "move")]
        assert made["steps"][0].startswith("repair")

    def test_silent_destination_with_unknown_guests_is_kept(self):
        made = plan(observe_both(dom0(guest("web1")), SILENT))
        assert problems(made) == ["guest dom0"]
        assert "m1-b" in made["problems"][0]["message"]

    def test_silent_destination_that_cannot_hold_a_guest_is_made_anew(self):
        run = {"source": "m1-a", "destination": "m1-b", "guests": ["web1"]}
        observed = observe_both(dom0(guest("web1")), SILENT, state={"run": run})
        observed["hypervisor"]["free_memory_mb"] = 500  # enough once the old one is gone
        made = plan(observed)
        assert made["destination"]["recreate"]
        assert made["destination"]["generation"] == 3
        assert problems(made) == []

    def test_silent_destination_is_kept_if_a_guest_of_the_run_is_not_at_the_source(self):
        run = {"source": "m1-a", "destination": "m1-b", "guests": ["web1", "app1"]}
        made = plan(observe_both(dom0(guest("web1")), SILENT, state={"run": run}))
        assert not made["destination"]["recreate"]
        assert problems(made) == ["guest dom0"]

    def test_destination_without_room(self):
        full = dom0()
        full["hypervisor"]["free_memory_mb"] = 100
        made = plan(observe_both(dom0(guest("web1")), full))
        assert problems(made) == ["guest memory"]
        assert made["problems"][0]["missing"] == 31


class TestPreflight:
    def test_machine_memory(self):
        observed = observe()
        observed["hypervisor"]["free_memory_mb"] = 3000
        made = plan(observed)
        assert problems(made) == ["machine memory"]
        assert made["problems"][0]["needed"] == 3072 + 2 + 1 + 24
        assert "99 MiB missing" in made["problems"][0]["message"]

    def test_host_vm_too_small_for_its_guests(self):
        made = plan(observe(), host_vm_memory_mb=1000)
        assert problems(made) == ["host VM memory"]
        assert made["problems"][0]["missing"] == 128

    def test_image(self):
        made = plan(observe(image={"path": "/golden.raw", "exists": False, "sha256": None}))
        assert problems(made) == ["golden image"]
        assert "/golden.raw" in made["problems"][0]["message"]

    def test_disk_space(self):
        made = plan(observe(free_disk_mb=24))
        assert problems(made) == ["disk space"]
        assert made["problems"][0]["missing"] == 1000

    def test_name_of_a_foreign_domain(self):
        made = plan(observe(domains=["m1-a", "m1-b"]))
        assert problems(made) == ["name"]

    def test_silent_source(self):
        made = plan(observe(guest_dom0s={"a": SILENT}))
        assert problems(made) == ["guest dom0"]
        assert "timed out" in made["problems"][0]["message"]

    @pytest.mark.parametrize(
        ("values", "what"),
        [
            ({"type": "pv"}, "guest type"),
            ({"state": "paused"}, "guest state"),
            ({"state": "crashed"}, "guest state"),
            ({"disks": [{"id": None, "target": "/root/web1.img", "vdev": "xvda"}]}, "disk"),
            ({"disks": [{"id": "other", "target": f"{BY_ID}other", "vdev": "xvda"}]}, "disk"),
        ],
    )
    def test_guest_that_cannot_move(self, values, what):
        made = plan(observe(guest_dom0s={"a": dom0(guest("web1", **values))}))
        assert problems(made) == [what]
        assert "web1" in made["problems"][0]["message"]

    def test_empty_cd_drive_is_no_disk(self):
        drives = [{"id": None, "target": None, "vdev": "hdc"}]
        made = plan(observe(guest_dom0s={"a": dom0(guest("web1", disks=drives))}))
        assert problems(made) == []
        assert made["guests"][0]["disks"] == []

    def test_guest_that_does_not_serve_before_it_moves(self):
        made = plan(observe(probes={"web1": {"ok": False, "error": "refused"}}))
        assert problems(made) == ["probe"]

    def test_all_problems_at_once(self):
        observed = observe(free_disk_mb=0, domains=["m1-b"])
        observed["hypervisor"]["free_memory_mb"] = 0
        assert problems(plan(observed)) == ["name", "machine memory", "disk space"]

    def test_older_guest_hypervisor(self):
        older = FILTERS["rejuvenation_destination_problems"](
            plan(observe()), {"version": "4.20.1"}, {"version": "4.17.5", "free_memory_mb": 2000}
        )
        assert [problem["what"] for problem in older] == ["guest hypervisor version"]

    @pytest.mark.parametrize("version", ["4.17.4", "4.20.0", "unknown"])
    def test_same_newer_or_unknown_guest_hypervisor(self, version):
        hypervisor = {"version": version, "free_memory_mb": 2000}
        assert not FILTERS["rejuvenation_destination_problems"](plan(observe()), {"version": "4.17.5"}, hypervisor)


class TestDisksAndStrategies:
    def test_disks_of_stopped_guests_follow(self):
        disks = [{"id": "old-root", "path": "/guests/old.raw"}, {"id": "web1-root", "path": "/guests/web1.raw"}]
        made = plan(observe(host_vms=[host_vm("a", disks=disks)]))
        assert made["idle_disks"] == [{"id": "old-root", "path": "/guests/old.raw"}]

    def test_disk_of_a_moved_guest_is_not_idle(self):
        made = plan(observe_both(dom0(), dom0(guest("web1"))))
        assert made["idle_disks"] == []

    def test_strategy_of_a_single_guest(self):
        guests = dom0(guest("web1"), guest("web2", disks=[]))
        made = plan(observe(guest_dom0s={"a": guests}), guest_strategies={"web2": "suspend"})
        assert [item["strategy"] for item in made["guests"]] == ["precopy", "suspend"]


class TestRecovery:
    def recover(self, observed, in_flight=(), **settings):
        made = plan(observe())
        return FILTERS["rejuvenation_recovery"](made, observed, {**SETTINGS, **settings}, list(in_flight))

    def test_empty_destination_is_undone(self):
        result = self.recover(observe_both(dom0(guest("web1")), dom0()))
        assert result["destroy_destination"]
        assert result["detach"] == [{"host_vm": "m1-b", "disk": "web1-root"}]
        assert result["guests"] == [{"name": "web1", "location": "source", "state": "blocked"}]

    def test_destination_that_never_answered_is_undone(self):
        assert self.recover(observe_both(dom0(guest("web1")), SILENT))["destroy_destination"]

    def test_undo_can_be_declined(self):
        result = self.recover(observe_both(dom0(guest("web1")), dom0()), undo_on_failure=False)
        assert not result["destroy_destination"]

    @pytest.mark.parametrize(
        ("source", "destination"),
        [
            (dom0(), dom0(guest("web1"))),
            (dom0(guest("web1")), dom0(guest("web1--incoming", state="paused"))),
            (dom0(guest("web1")), dom0(guest("stranger"))),
            (dom0(guest("web1", state="suspended")), dom0()),
            (dom0(guest("web1", state="paused")), dom0(guest("web1", state="paused"))),
            (dom0(), dom0()),
            (SILENT, dom0()),
            (SILENT, SILENT),
        ],
    )
    def test_destination_that_may_hold_a_guest_is_kept(self, source, destination):
        assert not self.recover(observe_both(source, destination))["destroy_destination"]

    def test_nothing_of_a_migration_without_result_is_touched(self):
        observed = observe_both(dom0(guest("web1", state="paused")), dom0())
        result = self.recover(observed, in_flight=["web1"])
        assert not result["destroy_destination"]
        assert result["unpause"] == []
        assert result["detach"] == []

    def test_resumed_run_undoes_nothing(self):
        observed = observe_both(dom0(guest("web1", state="paused")), dom0())
        result = FILTERS["rejuvenation_recovery"](plan(observed), observed, SETTINGS, [])
        assert not result["destroy_destination"]
        assert result["unpause"] == []
        assert result["detach"] == []

    def test_sole_copy_that_is_paused_goes_on(self):
        result = self.recover(observe_both(dom0(guest("web1", state="paused")), dom0()))
        assert result["unpause"] == [{"slot_name": "m1-a", "name": "web1"}]

    @pytest.mark.parametrize(
        ("source", "destination", "location"),
        [
            (dom0(), dom0(guest("web1")), "destination"),
            (dom0(guest("web1")), dom0(guest("web1")), "both"),
            (dom0(), dom0(), "nowhere"),
            (dom0(), SILENT, "unknown"),
        ],
    )
    def test_location(self, source, destination, location):
        assert self.recover(observe_both(source, destination))["guests"][0]["location"] == location


PHASES = [{"phase": "observe and plan", "at": NOW}, {"phase": "move web1", "at": NOW + 10}]
RESULT = {
    "guest": "web1",
    "type": "pvh",
    "memory_mb": 128,
    "vcpus": 1,
    "strategy": "precopy",
    "seconds": 12.5,
    "started": NOW + 12.25,
    "downtime_seconds": 0.75,
    "bytes": None,
    "repairs": [],
    "result": "moved",
}


PLANNED = {
    "name": "web1",
    "type": "pvh",
    "memory_mb": 128,
    "vcpus": 1,
    "strategy": "precopy",
    "strategy_reason": "asked",
}


class TestAccount:
    def account(self, outcome):
        return FILTERS["rejuvenation_account"]({**PLANNED, "step": "move"}, outcome, NOW, NOW + 5, None)

    def test_it_has_what_the_migration_told(self):
        told = {"seconds": 2.0, "downtime_seconds": 0.5, "bytes": 7, "phases": {"memory": 1.0}, "repairs": ["a disk"]}
        guest = {key: value for key, value in PLANNED.items() if key != "name"}
        assert self.account({"migration": told, "location": "destination"}) == {
            **guest,
            **told,
            "guest": "web1",
            "started": NOW,
            "finished": NOW + 5,
            "memory": None,
            "session": None,
        }

    @pytest.mark.parametrize("outcome", [{}, {"unreachable": True, "msg": "gone"}, {"migration": None}])
    def test_without_an_answer_it_has_no_figures(self, outcome):
        account = self.account(outcome)
        assert (account["seconds"], account["phases"], account["repairs"]) == (None, {}, [])


class TestSettled:
    """app1 and web1, side by side, at each step of their move."""

    BATCH = tuple({**PLANNED, "name": name, "step": "move", "strategy": "zero_copy"} for name in ("app1", "web1"))

    def steps(self, web1, **further):
        """Both were ordered; app1 arrived, and of web1 its job says what is given."""
        orders = [{"item": {**guest, "ordered": NOW}} for guest in self.BATCH]
        arrived = {"location": "destination", "migration": {"seconds": 2.0, "log_tail": ["done"]}}
        jobs = [{**arrived, "item": orders[0]}, {**web1, "item": orders[1]}]
        return {"destination": "m1-b", "migrations": orders, "jobs": jobs, **further}

    def judged(self, steps):
        """The names of those who passed, web1's account, and who may be on its way."""
        passed = FILTERS["rejuvenation_passed"](list(self.BATCH), steps)
        sessions = [{"session": 4}, {"session": 5}]
        settled = FILTERS["rejuvenation_settled"](list(self.BATCH), steps, sessions, NOW + 5)
        app1, web1 = settled["results"]
        assert (app1["result"], app1["session"], app1["started"], app1["finished"]) == ("moved", 4, NOW, NOW + 5)
        return [guest["name"] for guest in passed], web1, settled["in_flight"]

    def test_who_passed_all_has_moved(self):
        alive = [{"item": "app1"}, {"item": "web1"}]
        detached = [{"item": {"guest": "web1", "id": "web1-root"}}]
        steps = self.steps({"location": "destination"}, alive=alive, refused={}, detached=detached)
        passed, web1, in_flight = self.judged(steps)
        assert (passed, web1["result"], web1["session"], in_flight) == (["app1", "web1"], "moved", 5, [])

    @pytest.mark.parametrize(
        ("job", "text", "in_flight"),
        [
            ({"failed": True, "msg": "no route", "location": "source"}, "no route", []),
            ({"unreachable": True, "msg": "gone"}, "gone", ["web1"]),
            ({"location": "source"}, "the migration gave no result", []),
            ({"failed": True}, "the migration gave no result", ["web1"]),
        ],
    )
    def test_a_migration_without_success(self, job, text, in_flight):
        passed, web1, seen = self.judged(self.steps(job))
        assert (passed, web1["result"], web1["text"], seen) == (["app1"], "failed", f"web1: {text}", in_flight)

    def test_whose_job_was_not_started_is_told_why(self):
        steps = self.steps({})
        steps["migrations"][1] |= {"unreachable": True, "msg": "no route"}
        del steps["jobs"][1]
        passed, web1, in_flight = self.judged(steps)
        assert (passed, web1["text"], in_flight) == (["app1"], "web1: no route", ["web1"])

    @pytest.mark.parametrize(
        ("step", "text"),
        [
            ({"alive": [{"item": "web1", "failed": True, "msg": "no sign of life"}]}, "no sign of life"),
            ({"alive": [{"item": "web1", "unreachable": True}]}, "the guest dom0 of m1-b does not answer"),
            ({"refused": {"web1": "no answer to its probe"}}, "no answer to its probe"),
            ({"detached": [{"item": {"guest": "web1"}, "failed": True, "msg": "busy"}]}, "busy"),
        ],
    )
    def test_a_later_step_that_fails(self, step, text):
        steps = self.steps({"location": "destination", "migration": {"log_tail": ["end"]}}, **step)
        passed, web1, in_flight = self.judged(steps)
        assert (passed, web1["text"], web1["log_tail"], in_flight) == (["app1"], f"web1: {text}", ["end"], [])

    @pytest.mark.parametrize("kept", [{"failed": True, "msg": "not yours"}, {"unreachable": True, "msg": "not yours"}])
    def test_nobody_passes_on_a_machine_that_is_not_kept_reserved(self, kept):
        steps = {**self.steps({"unreachable": True, "msg": "gone"}), "kept": kept}
        assert FILTERS["rejuvenation_passed"](list(self.BATCH), steps) == []
        settled = FILTERS["rejuvenation_settled"](list(self.BATCH), steps, [{"session": 4}, {"session": 5}], NOW)
        app1, web1 = settled["results"]
        assert (app1["result"], web1["result"], settled["in_flight"]) == ("failed", "failed", ["web1"])
        assert "not kept reserved: not yours" in app1["text"]
        assert web1["text"] == "web1: gone"

    def test_nobody_left_for_a_host_vm_that_does_not_answer(self):
        steps = {"destination": "m1-b", "migrations": [], "jobs": None}
        guests = [{**PLANNED, "step": "back"}]
        assert FILTERS["rejuvenation_passed"](guests, steps) == []
        settled = FILTERS["rejuvenation_settled"](guests, steps, [], NOW)
        assert settled["results"][0]["text"].endswith("m1-b stopped to answer while disks were attached")
        assert settled["in_flight"] == []

    def test_who_was_there_or_went_back(self):
        order = {"item": {**PLANNED, "ordered": NOW}, "location": "destination"}
        steps = {"destination": "m1-b", "migrations": [order], "jobs": None}
        words = [
            FILTERS["rejuvenation_settled"]([{**PLANNED, "step": step}], steps, [], NOW)["results"][0]["result"]
            for step in ("move", "back", "resume")
        ]
        assert words == ["moved", "moved back", "was there"]


GIVEN = {
    "machine": "m1",
    "slots": {
        slot: {"name": f"m1-{slot}", "address": f"192.0.2.2{number}/24", "mac": f"00:16:3e:00:00:0{number}"}
        for number, slot in enumerate("ab")
    },
    "slot": "a",
    "memory_mb": 4096,
    "vcpus": 1,
    "logins": ["ssh-ed25519 AAAAC3NzaC1 me"],
    "mappings": {
        "vmbeam_guest_strategies": {"web1": "cold"},
        "vmbeam_guest_unmovable_policies": {"web1": "leave_and_skip"},
        "vmbeam_guest_labels": {},
        "vmbeam_guest_probes": {"web1": {"address": "192.0.2.30", "port": 80}},
        "vmbeam_hooks": {"before_machine": "before.yml"},
    },
    "auto_strategies": ["precopy"],
    "parallel_guests": 1,
    "ssh_args": [],
    "anti_affinity": [{"name": "db", "guests": ["db1"]}],
    "gates": [{"name": "load", "command": ["true"]}],
    "lock_ttl": 4500,
    "longest_move_seconds": 4500,
    "repair_seconds": 600,
}
HOSTS = {"m1": {}, "m1-a": {}, "m1-b": {}}


def mapped(**values):
    return {"mappings": {**GIVEN["mappings"], **values}}


def slots(**values):
    return {"slots": {**GIVEN["slots"], "b": {**GIVEN["slots"]["b"], **values}}}


class TestObjections:
    @pytest.mark.parametrize("role", ["rejuvenation", "host_vm"])
    def test_there_is_none_to_what_is_right(self, role):
        assert FILTERS[f"{role}_objections"](GIVEN, HOSTS) == []

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            ({"slots": {}}, "vmbeam_slots of m1 must describe both slots"),
            ({"slots": "ab"}, "vmbeam_slots of m1 must describe both slots"),
            (slots(name="m9-b"), "m9-b, slot b of m1, is not a host of the inventory"),
            ({"memory_mb": 511}, "at least 512 (MiB; is 511)"),
            ({"vcpus": 0}, "vmbeam_host_vm_vcpus at least 1 (is 0)"),
            (mapped(vmbeam_guest_labels="web"), "vmbeam_guest_labels must be a dictionary"),
            (mapped(vmbeam_guest_strategies={"web1": "fast"}), "Every value of vmbeam_guest_strategies must be one of"),
            (mapped(vmbeam_guest_strategies={"web1": ["cold"]}), "vmbeam_guest_strategies must be one of"),
            (mapped(vmbeam_guest_unmovable_policies={"web1": "auto"}), "policies one of fail, skip_host"),
            ({"auto_strategies": []}, "vmbeam_auto_strategies must not be empty"),
            ({"parallel_guests": 0}, "vmbeam_parallel_guests at least 1 (is 0)"),
            ({"ssh_args": "-4"}, "rejuvenate_ssh_args a list (is -4)"),
            ({"anti_affinity": [{"name": "db", "guests": "db1"}]}, "vmbeam_anti_affinity must have a name and either"),
            ({"anti_affinity": [{"name": "db", "guests": [], "label": "x"}]}, "vmbeam_anti_affinity must have a name"),
            (mapped(vmbeam_guest_probes={"web1": {"port": 80}}), "vmbeam_guest_probes.web1 must have either url"),
            ({"gates": [{"name": "load", "command": "true"}]}, "Each of vmbeam_gates must have a name and either"),
            ({"gates": [{"command": ["true"]}]}, "Each of vmbeam_gates must have a name and either"),
            (
                {"gates": [{"name": "load", "command": ["false"], "url": "http://p/", "query": "up", "min": 1}]},
                "Gate load of vmbeam_gates has command and url, query, min, and can ask only one of both.",
            ),
            ({"gates": [{"name": "load", "command": ["true"], "max": 2}]}, "has command and max, and can ask only"),
            (
                {"gates": [{"name": "load", "command": ["true"], "guests": "web1"}]},
                "Gate load of vmbeam_gates has guests, which no gate has. Correct that or leave it out; a gate",
            ),
            ({"lock_ttl": 4499}, "vmbeam_lock_ttl (4499 s) must be at least as long as a guest may take, 4500 s"),
        ],
    )
    def test_to_variables_of_a_rejuvenation(self, change, word):
        (objection,) = FILTERS["rejuvenation_objections"]({**GIVEN, **change}, HOSTS)
        assert word in objection

    def test_a_gate_may_have_all_that_its_kind_has(self):
        asked = [
            {"name": "load", "guest": "web1", "command": ["true"], "timeout": 5},
            {"name": "up", "guest": "web1", "url": "http://p/", "query": "up", "min": 1, "max": 1, "timeout": 5},
        ]
        assert FILTERS["rejuvenation_objections"]({**GIVEN, "gates": asked}, HOSTS) == []

    def test_hooks_are_checked_by_those_who_use_them(self):
        with pytest.raises(AnsibleFilterError, match="vmbeam_hooks: often is not one of"):
            FILTERS["rejuvenation_objections"]({**GIVEN, **mapped(vmbeam_hooks={"often": "x.yml"})}, HOSTS)

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            ({"slots": {"a": GIVEN["slots"]["a"]}}, "must describe both slots"),
            (slots(mac=GIVEN["slots"]["a"]["mac"]), "name, address and mac must differ"),
            (slots(mac="00:16:3e"), "mac six pairs"),
            (slots(address="192.0.2.21"), "address must have a prefix length"),
            (slots(name="m1.b"), "name must be a host name without dots"),
            ({"memory_mb": 0}, "at least 512"),
            ({"logins": ["me"]}, "this is none: me"),
            (
                {"slots": {**GIVEN["slots"], "a": {**GIVEN["slots"]["a"], "name": "m9"}}},
                "m9, slot a of m1, is not a host",
            ),
        ],
    )
    def test_to_variables_of_a_host_vm(self, change, word):
        (objection,) = FILTERS["host_vm_objections"]({**GIVEN, **change}, HOSTS)
        assert word in objection


class TestReport:
    def report(self, failure=None):
        return FILTERS["rejuvenation_report"](plan(observe()), PHASES, [RESULT], failure or {}, NOW + 30)

    def test_figures(self):
        report = self.report()
        assert report["outcome"] == "completed"
        assert report["seconds"] == 30.0
        moments = [f"2023-11-14T22:13:{second}.000+00:00" for second in (20, 30, 50)]
        assert report["phases"] == [
            {"phase": "observe and plan", "seconds": 10.0, "started": moments[0], "finished": moments[1]},
            {"phase": "move web1", "seconds": 20.0, "started": moments[1], "finished": moments[2]},
        ]
        assert (report["started"], report["finished"]) == (moments[0], moments[2])
        guest = report["guests"][0]
        assert (guest["started"], guest["finished"]) == ("2023-11-14T22:13:32.250+00:00", None)
        assert report["longest_downtime_seconds"] == 0.75
        assert report["guests_moved"] == 1

    def test_text_aligns_its_columns(self):
        lines = FILTERS["rejuvenation_report_text"](self.report())
        assert "m1-a -> m1-b (generation 2), 1 guest(s) moved" in lines[0]
        heading = next(line for line in lines if line.startswith("guest"))
        row = next(line for line in lines if line.startswith("web1"))
        assert row.index("12.5") == heading.index("seconds")
        assert row.index("0.8") == heading.index("downtime")

    def test_record_of_a_run(self):
        made = plan(observe())
        begun = FILTERS["rejuvenation_record"]({}, made, None, NOW, 2)
        assert begun["run"]["guests"] == ["web1"]
        assert begun["history"] == []
        ended = FILTERS["rejuvenation_record"](begun, made, self.report(), NOW, 2)
        assert ended["run"] is None
        assert [run["outcome"] for run in ended["history"]] == ["completed"]

    @pytest.mark.parametrize(("undone", "left"), [(True, False), (False, True)])
    def test_failed_run_stays_in_the_record_unless_undone(self, undone, left):
        made = plan(observe())
        begun = FILTERS["rejuvenation_record"]({}, made, None, NOW, 2)
        failure = {"phase": "move web1", "summary": "failed", "undone": undone}
        ended = FILTERS["rejuvenation_record"](begun, made, self.report(failure), NOW, 2)
        assert (ended["run"] is not None) == left
        assert ended["history"][0]["outcome"] == "failed"

    def test_history_is_limited(self):
        made, state = plan(observe()), {"history": [{"outcome": "old"}] * 5}
        ended = FILTERS["rejuvenation_record"](state, made, self.report(), NOW, 3)
        assert [run["outcome"] for run in ended["history"]] == ["old", "old", "completed"]

    def test_cut_run_is_closed(self):
        state = {"machine": "m1", "run": {"destination": "m1-a"}, "history": []}
        closed = FILTERS["rejuvenation_close_cut_run"](state, NOW, 3)
        assert closed["run"] is None
        assert closed["history"][0]["outcome"] == "completed"


class TestText:
    def test_plan_lists_guests_steps_and_problems(self):
        lines = FILTERS["rejuvenation_plan_text"](plan(observe(free_disk_mb=24)))
        text = "\n".join(lines)
        assert text.startswith("m1: rejuvenate: m1-a (generation 1) is 13.9 d old")
        assert "1. start m1-b (generation 2) and wait until it is healthy" in text
        assert "2. move web1 from m1-a to m1-b (precopy), 1 disk(s) with it" in text
        assert "Refused, 1 problem(s):" in text
        assert "1000 MiB missing. Fix: free space" in text

    def test_plan_of_a_fresh_machine_is_one_table(self):
        lines = FILTERS["rejuvenation_plan_text"](plan(observe(host_vms=[host_vm("a", created=age(60))])))
        assert lines[0].startswith("m1: skip: ")
        assert "stay" in lines[-1]


class TestErrors:
    def test_missing_input_is_named(self):
        observed = observe()
        del observed["host_vms"]
        with pytest.raises(AnsibleFilterError, match="rejuvenation_plan: the input lacks 'host_vms'"):
            plan(observed)

    def test_wrong_input(self):
        with pytest.raises(AnsibleFilterError, match="rejuvenation_plan: the input has the wrong form"):
            plan(observe(host_vms=5))

    def test_filters_do_not_change_their_input(self):
        observed = observe()
        before = copy.deepcopy(observed)
        plan(observed)
        assert observed == before
